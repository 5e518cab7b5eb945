"""WebDataset shards: their content, and their images by number."""

from pipeline.data.decoding import decode, decoding_quietly, one_line, open_image, open_known, to_rgb
from pipeline.data.image_reading import ImageFile
from pipeline.data.images import Images, Keys, Skipped, content_hash, image_digest, listing_hash, require_labels
from pipeline.data.shard_index import OnError, expand_shards, index_beside, index_shards, relocate

__all__ = [
    "ImageFile",
    "Images",
    "Keys",
    "OnError",
    "Skipped",
    "content_hash",
    "decode",
    "decoding_quietly",
    "expand_shards",
    "image_digest",
    "index_beside",
    "index_shards",
    "listing_hash",
    "one_line",
    "open_image",
    "open_known",
    "relocate",
    "require_labels",
    "to_rgb",
]
