"""Features of images that stay in a folder (evaluate.features): repeated and interrupted probes go on from them."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from pipeline.config import EvaluateConfig
from pipeline.data import Images, listing_hash
from pipeline.evaluation.context import Features
from pipeline.evaluation.feature_rows import mapped_file
from pipeline.models.backbone import Backbone, weight_hash
from pipeline.runtime.devices import resolved
from pipeline.storage.file_locks import exclusive
from pipeline.storage.json_files import read_as, write_json
from singer.errors import UserError

PROGRESS = "progress.json"
# After a crash, at most so many seconds of work are repeated.
_SECONDS = 20.0


def identity(backbone: Backbone, images: Images, settings: EvaluateConfig) -> str:
    """Return a hash of all that features depend on.

    These are the model's weights, input and precision, the crop, and the keys, labels and sizes of the images.
    """
    state = backbone.model.state_dict()
    place = {"position": state["pos_embed"]} if "pos_embed" in state else {}
    about = [
        weight_hash(state),
        weight_hash(place),  # the other hash leaves it out
        backbone.architecture,
        backbone.model_args,
        backbone.image_size,
        backbone.mean,
        backbone.std,
        settings.crop,
        resolved(settings.precision),
        listing_hash(images),
    ]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


class StoredFeatures:
    """Features (count, width) float32 in files KIND.NAME.npy, mapped; the first `done` rows are there."""

    def __init__(self, folder: Path, kinds: Sequence[str], names: Sequence[str], count: int, width: int) -> None:
        self._folder, self._saved = folder, time.monotonic()
        kept = (folder / PROGRESS).is_file()
        self.done = read_as(folder / PROGRESS, dict[str, int], "folder of features").get("images", 0) if kept else 0
        files = {(kind, name): folder / f"{kind}.{name}.npy" for kind in kinds for name in names}
        if not all(file.is_file() for file in files.values()):
            # A kind of tokens that was not asked for before has no file yet, and all are computed together. This is
            # noted before there is a new file, whose rows are zeros.
            self.done = 0
            (folder / PROGRESS).unlink(missing_ok=True)
        self._arrays: list[np.memmap] = []
        self.rows: Features = {}
        for (kind, name), file in files.items():
            array = self._open(file, (count, width))
            self._arrays.append(array)
            self.rows.setdefault(kind, {})[name] = torch.from_numpy(array)

    @staticmethod
    def _open(file: Path, shape: tuple[int, int]) -> np.memmap:
        if not file.is_file():
            try:
                return mapped_file(file, shape, "give another folder, with more room")
            except (UserError, OSError):
                file.unlink(missing_ok=True)
                raise
        try:
            found = open_memmap(file, "r+")
            if found.shape != shape or found.dtype != np.float32:
                raise ValueError(f"it holds {found.dtype} of shape {found.shape}, not float32 of shape {shape}")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged: {error}; remove it") from None
        return found

    def advance(self, done: int) -> None:
        """Note that more rows are there; they are kept every few seconds, and at the end."""
        self.done = done
        if time.monotonic() - self._saved > _SECONDS:
            self.save()

    def save(self) -> None:
        """Write all rows, and then how many they are."""
        for array in self._arrays:
            array.flush()
        write_json(self._folder / PROGRESS, {"images": self.done})
        self._saved = time.monotonic()


@contextmanager
def stored_features(
    folder: Path,
    backbone: Backbone,
    images: Images,
    settings: EvaluateConfig,
    kinds: Sequence[str],
    names: Sequence[str],
) -> Iterator[StoredFeatures]:
    """Give the features of these images in a folder, to be completed by the block, which holds their lock.

    What the block has done is kept, also if it is interrupted. Raises UserError if another run completes them.
    """
    own = folder / identity(backbone, images, settings)[:16]
    own.mkdir(parents=True, exist_ok=True)
    with exclusive(own):
        stored = StoredFeatures(own, kinds, names, len(images), backbone.width)
        try:
            yield stored
        finally:
            stored.save()
