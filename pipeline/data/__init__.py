"""Images: where they come from, and each of them by its number.

What a user names (a Spec) is resolved to sources: tars, folders, lists, tables (specs, tars, sources/). Each gives a
SourceListing, columns of its samples, and image_index joins these to Images: the place of every image of a data set.
ImageFile reads one by its number. `prepare` needs more than that: importers/ read a folder or a known data set as a
Listing of entries, with masks, depth maps and names of classes, which are then packed into shards.
"""

from pipeline.data.decoding import decode, decode_rgb, named_errors
from pipeline.data.image_index import OnError, index_beside, index_images, list_images, list_probe_images
from pipeline.data.image_reading import ImageFile, files_of, places_of, readable
from pipeline.data.images import (
    Images,
    Keys,
    Skipped,
    accepted,
    check_class_numbers,
    content_hash,
    image_digest,
    listing_hash,
    longest_classes,
    numbered_as,
    require_labels,
)
from pipeline.data.relocation import check_images, relocate
from pipeline.data.specs import Spec, resolve

__all__ = [
    "ImageFile",
    "Images",
    "Keys",
    "OnError",
    "Skipped",
    "Spec",
    "accepted",
    "check_class_numbers",
    "check_images",
    "content_hash",
    "decode",
    "decode_rgb",
    "files_of",
    "image_digest",
    "index_beside",
    "index_images",
    "list_images",
    "list_probe_images",
    "listing_hash",
    "longest_classes",
    "named_errors",
    "numbered_as",
    "places_of",
    "readable",
    "relocate",
    "require_labels",
    "resolve",
]
