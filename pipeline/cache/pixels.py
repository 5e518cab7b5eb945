"""Get the views of records: from their images, or as stored beside the features, so that students need no images."""

import io
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.cache.index import Index
from pipeline.cache.stored import Ragged
from pipeline.data import ImageFile
from pipeline.data.jpeg_decoder import PILLOW, JpegDecoder, cut_view
from pipeline.runtime.buffers import empty
from singer.sizes import ImageSize, Size


def views_of(
    files: ImageFile, index: Index, records: np.ndarray, size: ImageSize, decoder: JpegDecoder = PILLOW
) -> Tensor:
    """Return the views of some records, (n, height, width, 3) uint8."""
    views = empty((len(records), *Size.of(size), 3), "uint8")
    pictures = decoder.read(files, index.image[records].tolist())
    for view, r, picture in zip(views, records.tolist(), pictures, strict=True):
        view[:] = cut_view(picture, index.record_view(r), size)
    return views


def encode_jpegs(views: Iterable[np.ndarray], quality: int) -> Ragged:
    """Encode every view, (height, width, 3) uint8, as JPEG with colours at full resolution."""
    strings = []
    for view in views:
        buffer = io.BytesIO()
        Image.fromarray(view).save(buffer, "JPEG", quality=quality, subsampling=0)
        strings.append(buffer.getvalue())
    data = np.frombuffer(bytearray().join(strings), dtype=np.uint8)
    return Ragged(torch.from_numpy(data), torch.tensor([len(s) for s in strings]))


def stored_views(stored: Tensor | Ragged) -> list[Image.Image]:
    """Return stored views of some records; JPEG views are not decoded yet."""
    if isinstance(stored, Tensor):
        return [Image.fromarray(view) for view in stored.numpy()]
    pieces = np.split(stored.data.numpy(), np.cumsum(stored.lengths.numpy())[:-1])
    return [Image.open(io.BytesIO(piece.tobytes()), formats=("JPEG",)) for piece in pieces]


def resize(view: Image.Image, size: ImageSize) -> np.ndarray:
    """Return a view as (height, width, 3) uint8; it is only resized if it has another size."""
    if view.size != (wanted := Size.of(size)[::-1]):
        view = view.resize(wanted, Image.Resampling.BICUBIC)
    return np.asarray(view)
