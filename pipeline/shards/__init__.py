"""WebDataset shards: what is in them, and their images by number."""

from pipeline.shards.image_file import ImageFile, decode, open_image, to_rgb
from pipeline.shards.images import Images, Keys, Skipped, Survey, content_hash, image_digest, require_labels
from pipeline.shards.index import OnError, expand_shards, index_beside, index_shards, relocate
from pipeline.shards.survey import survey

__all__ = [
    "ImageFile",
    "Images",
    "Keys",
    "OnError",
    "Skipped",
    "Survey",
    "content_hash",
    "decode",
    "expand_shards",
    "image_digest",
    "index_beside",
    "index_shards",
    "open_image",
    "relocate",
    "require_labels",
    "survey",
    "to_rgb",
]
