"""Reading every image once before anything is made of them."""

import warnings
from dataclasses import replace

import numpy as np
from PIL import Image

from pipeline.prefetch import prefetch
from pipeline.progress import meter
from pipeline.shards.image_file import ImageFile, one_line, open_known
from pipeline.shards.images import Images, Survey, image_digest
from pipeline.shards.index import Defects, OnError
from singer.errors import UserError

_BATCH = 64


def survey(images: Images, workers: int, on_error: OnError) -> Survey:
    """Read every image once, in threads: its digest and size, and whether it can be decoded.

    Raises UserError for the first defective image, or, if on_error is "skip", leaves the defective ones out of the
    images and lists them in their `skipped`; raises UserError if none is left.
    """
    defects = Defects(on_error)
    columns = np.zeros(len(images), dtype=[("digest", np.uint64), ("width", np.int32), ("height", np.int32)])
    good = np.ones(len(images), dtype=np.bool_)
    batches = [range(i, min(i + _BATCH, len(images))) for i in range(0, len(images), _BATCH)]
    # The filters belong to the process, so they are set here and not in the threads. What PIL grumbles about is of no
    # use to the user, except that it finds an image suspiciously large.
    with ImageFile(images) as files, meter("index", len(images), "images") as m, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        inspected = prefetch(lambda numbers: [_inspect(files, i) for i in numbers], batches, workers, m)
        for numbers, batch in zip(batches, inspected, strict=True):
            for number, facts in zip(numbers, batch, strict=True):
                if isinstance(facts, str):
                    good[number] = False
                    defects.add(images.paths[int(images.shard[number])], images.keys[number], facts)
                else:
                    columns[number] = facts
            m.advance(len(numbers))
    if not good.any():
        raise UserError(f"none of {len(images)} images can be decoded; the first: {defects.skipped[0]}")
    images = replace(images, skipped=(*images.skipped, *defects.skipped))
    found = Survey(images, *(np.ascontiguousarray(columns[name]) for name in ("digest", "width", "height")))
    return found if good.all() else found.select(np.flatnonzero(good))


def _inspect(files: ImageFile, number: int) -> tuple[int, int, int] | str:
    """(digest, width, height) of an image, or why it is defective."""
    try:
        data, _ = files.encoded(number)
        image = open_known(data)
        width, height = image.size
        # libjpeg then reads all of the data, but computes few pixels; the other formats are decoded in full.
        image.draft("RGB", (1, 1))
        image.load()
    except Exception as error:  # decoders raise whatever broken data makes them stumble over
        return f"cannot be decoded: {one_line(error)}"
    return image_digest(data), width, height
