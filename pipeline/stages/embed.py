"""Embed images: their names and their vectors in one file, `singer embed MODEL IMAGES --out FILE`.

The vectors are features of the last block, computed as `singer evaluate` does. They go to the file batch by batch, and
the file appears when all are there. A format is a class and a line in FORMATS.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.checks import ROW_NAMES, check_embedding, check_model
from pipeline.config import Config
from pipeline.data import Spec, list_images, readable, resolve
from pipeline.evaluation.context import kinds_of
from pipeline.evaluation.feature_rows import mapped_file
from pipeline.evaluation.global_features import Name, feature_batches
from pipeline.evaluation.open_model import check_known_model, open_model
from pipeline.models.backbone import Backbone
from pipeline.runtime.devices import default_device, own_settings, resolved
from pipeline.storage import whole_file
from pipeline.storage.json_files import json_bytes
from singer.errors import UserError

# The words of --features, and what they are called among the features.
FEATURES: dict[str, Name] = {"cls": "cls", "mean": "mean_patch", "dense": "patches"}
# Adds the next rows: their names, and their vectors (n, ...) float32.
Write = Callable[[Sequence[str], np.ndarray], None]


@dataclass(frozen=True)
class EmbedResult:
    """The result of embedding.

    names: the file with the names, None if they are in `out`; features: cls, mean or dense; tokens: block (raw) or
    norm; shape: of one image's features; left_out: images that cannot be read (with data.on_error skip).
    """

    out: Path
    names: Path | None
    images: int
    left_out: int
    features: str
    tokens: str
    shape: tuple[int, ...]
    seconds: float
    images_per_second: float


@own_settings()
def embed(
    config: Config,
    model: Path | str,
    images: Spec,
    out: Path,
    features: str | None = None,
    weights: Path | None = None,
    overwrite: bool = False,
) -> EmbedResult:
    """Write names and vectors of images to `out`, whose name ends in .npy, .parquet or .csv.

    model, weights: as for evaluate; images: shards, folders of images, lists or tables; features: cls, mean or dense,
    by default cls if the model has a class token, else mean. evaluate.tokens chooses raw tokens (block, both) or normed
    ones (norm). data.on_error skip leaves out images that cannot be read; for this, all are read twice.
    Raises UserError for mistakes that the user can fix.
    """
    check_embedding(out, features, overwrite)
    if out.resolve() in {path.resolve() for path in resolve(images)}:
        raise UserError(f"--out {out} is what the images are read from; give another --out")
    check_model(model, weights)
    check_known_model(model)
    listed = list_images(config, images)
    backbone = open_model(model, weights, config.evaluate.image_size, config.student.name)
    features = features or ("cls" if backbone.has_cls else "mean")
    if features == "cls" and not backbone.has_cls:
        raise UserError(f"--features cls: {model} has no class token; take mean or dense")
    tokens, convert = next(iter(kinds_of(backbone, config.evaluate).items()))
    found = len(listed) + len(listed.skipped)
    if config.data.on_error == "skip":
        listed = readable(listed)
    device = default_device()
    backbone.model.to(device)
    shape, start, done, name = shape_of(backbone, features), time.perf_counter(), 0, FEATURES[features]
    about: dict[str, object] = {"model": str(model), "features": features, "tokens": tokens, "shape": list(shape)}
    about["precision"] = resolved(config.evaluate.precision)
    names = names_file(out) if out.suffix == ".npy" else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary, FORMATS[out.suffix](temporary, len(listed), shape, about) as write:
        for batch in feature_batches(backbone, listed, config.evaluate, device, {tokens: convert}, (name,)):
            rows = batch[tokens][name].numpy()
            write(listed.keys[done : done + len(rows)], rows.reshape(len(rows), *shape))
            done += len(rows)
        if names is not None:
            with whole_file(names) as list_of_names:
                list_of_names.write_bytes(json_bytes(list(listed.keys)))
    seconds = time.perf_counter() - start
    return EmbedResult(out, names, done, found - done, features, tokens, shape, seconds, done / seconds)


def shape_of(backbone: Backbone, features: str) -> tuple[int, ...]:
    """Return the shape of one image's features: (d,), or (rows, columns, d) of dense ones."""
    return (*backbone.grid, backbone.width) if features == "dense" else (backbone.width,)


def names_file(out: Path) -> Path:
    """Return the file beside FILE.npy that holds the names of its rows: FILE.names.json, a list."""
    return out.with_suffix(ROW_NAMES)


@contextmanager
def write_npy(path: Path, count: int, shape: tuple[int, ...], about: dict[str, object]) -> Iterator[Write]:
    """Write the vectors alone, (count, *shape) float32; only the pages in work are in memory."""
    vectors = mapped_file(path, (count, *shape), "give --out on a disk with more room")
    done = 0

    def write(names: Sequence[str], rows: np.ndarray) -> None:
        nonlocal done
        vectors[done : done + len(rows)] = rows
        done += len(rows)

    yield write
    vectors.flush()


@contextmanager
def write_csv(path: Path, count: int, shape: tuple[int, ...], about: dict[str, object]) -> Iterator[Write]:
    """Write a line for each image: its name, and its numbers with as many digits as float32 needs."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["name", *range(shape[0])])

        def write(names: Sequence[str], rows: np.ndarray) -> None:
            lines.writerows([name, *(f"{x:.9g}" for x in row)] for name, row in zip(names, rows.tolist(), strict=True))

        yield write


@contextmanager
def write_parquet(path: Path, count: int, shape: tuple[int, ...], about: dict[str, object]) -> Iterator[Write]:
    """Write the columns name and vector, a list of fixed length; dense features are flat, their shape is metadata."""
    import pyarrow
    from pyarrow import parquet

    vector = pyarrow.list_(pyarrow.float32(), int(np.prod(shape)))
    described = {f"singer.{key}": json.dumps(value) for key, value in about.items()}
    schema = pyarrow.schema([("name", pyarrow.string()), ("vector", vector)], metadata=described)
    with parquet.ParquetWriter(path, schema) as file:

        def write(names: Sequence[str], rows: np.ndarray) -> None:
            vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), type=vector)
            file.write_batch(pyarrow.record_batch([pyarrow.array(names), vectors], schema=schema))

        yield write


Format = Callable[[Path, int, tuple[int, ...], dict[str, object]], AbstractContextManager[Write]]
FORMATS: dict[str, Format] = {".npy": write_npy, ".parquet": write_parquet, ".csv": write_csv}
