"""WebDataset shards: their content, and their images by number."""

from pipeline.data.decoding import Decoding, decode, decode_rgb, named_errors, one_line
from pipeline.data.image_reading import ImageFile
from pipeline.data.images import Images, Keys, Skipped, content_hash, image_digest, listing_hash, require_labels
from pipeline.data.shard_index import OnError, expand_shards, index_beside, index_shards, relocate

__all__ = [
    "Decoding",
    "ImageFile",
    "Images",
    "Keys",
    "OnError",
    "Skipped",
    "content_hash",
    "decode",
    "decode_rgb",
    "expand_shards",
    "image_digest",
    "index_beside",
    "index_shards",
    "listing_hash",
    "named_errors",
    "one_line",
    "relocate",
    "require_labels",
]
