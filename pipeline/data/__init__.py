"""Images: where they come from, and each of them by its number."""

from pipeline.data.decoding import decode, decoding_quietly, one_line, open_image, open_known, to_rgb
from pipeline.data.image_reading import ImageFile, files_of
from pipeline.data.images import (
    Images,
    Keys,
    Skipped,
    content_hash,
    image_digest,
    listing_hash,
    numbered_as,
    require_labels,
)
from pipeline.data.relocation import relocate
from pipeline.data.shard_index import OnError, index_beside, index_shards, list_images, list_probe_images
from pipeline.data.specs import Spec, resolve

__all__ = [
    "ImageFile",
    "Images",
    "Keys",
    "OnError",
    "Skipped",
    "Spec",
    "content_hash",
    "decode",
    "decoding_quietly",
    "files_of",
    "image_digest",
    "index_beside",
    "index_shards",
    "list_images",
    "list_probe_images",
    "listing_hash",
    "numbered_as",
    "one_line",
    "open_image",
    "open_known",
    "relocate",
    "require_labels",
    "resolve",
    "to_rgb",
]
