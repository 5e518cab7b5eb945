"""Lists, tables and several folders as one data set to pack: whatever --images takes, but shards."""

from functools import partial

from pipeline.config import Config
from pipeline.data.entries import Entry, Listing
from pipeline.data.image_index import list_images
from pipeline.data.image_reading import ImageFile
from pipeline.data.source_listing import NO_LABEL
from pipeline.data.sources import kind_of
from pipeline.data.sources.class_folders import beside
from pipeline.data.sources.tar import TAR
from pipeline.data.specs import Spec, resolve
from singer.errors import UserError


def list_sources(config: Config, spec: Spec) -> Listing:
    """List the images of several folders, lists and tables. Raises UserError for shards, which are packed already."""
    for path in resolve(spec):
        if kind_of(path) is TAR:
            raise UserError(f"{path} is a shard already; give it to the other commands with --images")
    images = list_images(config, spec)
    files, named = ImageFile(images), [kind_of(path).named for path in images.paths]
    entries = []
    for row, (key, shard, label) in enumerate(
        zip(images.keys, images.container.tolist(), images.labels.tolist(), strict=True)
    ):
        number = None if label == NO_LABEL else label
        if named[shard]:
            assert images.files is not None
            file = str(images.paths[shard] / images.files[row])
            entries.append(Entry(file, number, beside(file), key=key))
        else:
            where = f"{images.paths[shard]}/{key}"
            entries.append(Entry(where, number, key=key, read=partial(files.encoded, row)))
    return Listing(entries, list(images.classes), left_out=images.left_out)
