"""What a cache would cost, before it is made: `singer cache plan --teacher ... --shards ... --out CACHE`.

The teacher runs for some seconds on images from all over the shards, and every codec is tried on what it gives.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.behind import Behind
from pipeline.cache.codecs import CODECS, Calibration, Ragged, calibrate
from pipeline.cache.encoder import Batch, Encoder, Values
from pipeline.cache.fidelity import fidelity
from pipeline.cache.format import FEATURES, PIXELS, VIEWS, Manifest, image_bytes
from pipeline.cache.growth import Addition
from pipeline.cache.rows import RowReader, Rows
from pipeline.cache.zarr_shards import array_metadata, pack_shard
from pipeline.cache_teacher import check_codec, describe
from pipeline.config import Config
from pipeline.devices import make_accelerator
from pipeline.extract import Extractor, check_finite
from pipeline.models import load_teacher
from pipeline.prefetch import prefetch
from pipeline.progress import say
from pipeline.shards import ImageFile, decoding_quietly, index_shards
from pipeline.stores import Place, is_remote
from singer.backbones import resolve_blocks
from singer.errors import UserError
from singer.tail import tail_state

# Images that are drawn; records of which features are kept, at most so many bytes of them.
_IMAGES = 1024
_RECORDS = 32
_FEATURE_BYTES = 2**30
_SHARES = (1.0, 0.5)
# Of the free disk; the rest is for what else grows there.
_USABLE = 0.95
_END_OF_SHARD = 4


@dataclass(frozen=True)
class PlanOption:
    """A way to store the features. bytes: of the whole cache; bytes_per_image: of features, all blocks and views.

    error: relative error of clean patch tokens, at the worst block; fits: on the free disk; max_views, max_blocks: how
    many views of these blocks, and how many blocks of these views, would fit at most. None where the disk is not known.
    """

    codec: str
    token_share: float
    error: float
    bytes_per_image: int
    bytes: int
    fits: bool | None
    max_views: int | None
    max_blocks: int | None


@dataclass(frozen=True)
class PlanResult:
    """images_per_second: views that the teacher sees, with decoding and encoding; hours: for all views, on this device.

    online_hours: of the teacher for the `epochs` of one student that runs it anew for every image; the cache pays off
    from break_even_students on. chosen: as configured; best_fit: of the options that fit, the one with the smallest
    error, all tokens before fewer; tail_bytes: of the teacher's frozen end, which every option has once; free_bytes:
    where the cache would lie.
    """

    images: int
    views: int
    blocks: tuple[int, ...]
    pixels: str
    images_per_second: float
    hours: float
    epochs: int
    online_hours: float
    break_even_students: int
    tail_bytes: int
    free_bytes: int | None
    chosen: PlanOption
    best_fit: PlanOption | None
    options: list[PlanOption]


def plan(config: Config, shards: str | Sequence[str], out: Place | None = None, seconds: float = 20.0) -> PlanResult:
    """Run the teacher for some seconds; nothing is written. out: where the cache would lie.

    Images are read from memory after the first time, so a slow disk can make the real run slower. Raises UserError for
    whatever the user can mend.
    """
    check_codec(config.cache.codec)
    images = index_shards(shards, config.cache.on_error)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(images), min(len(images), _IMAGES), replace=False))
    few = images.select(chosen)
    vit = load_teacher(config.teacher)
    accelerator = make_accelerator(config.cache.precision)
    vit.model.to(accelerator.device)
    extract = Extractor(config, vit, accelerator)
    blocks = tuple(resolve_blocks(config.cache.blocks, extract.teacher.depth))
    addition = Addition(blocks, few, 0, config.views.count)
    manifest = describe(config, addition, extract.teacher)
    rows = Rows.of(manifest, few)

    records = rng.permutation(len(rows))
    with ImageFile(few) as files, decoding_quietly():
        sides = {extract.teacher.image_size} | ({manifest.pixels.size} if manifest.pixels is not None else set())
        read = RowReader(rows, files, manifest.view_form, sides, config.cache.on_error)
        features = sample_features(extract, read, records, blocks)
        calibration = {b: calibrate(x, extract.teacher.prefix_tokens) for b, x in features.items()}
        encode = Encoder(manifest, rows, calibration)
        say(f"the teacher runs for {seconds:g} s")
        rate = measure_rate(extract, encode, read, records, blocks, seconds)
        sample = records[: len(features[blocks[0]])]
        pixels = encode.load(read, sample).extra.get(PIXELS)
    probe = Probe(
        config=config,
        extract=extract,
        addition=addition,
        rows=rows,
        images=len(images),
        sample=sample,
        features=features,
        calibration=calibration,
        pixel_bytes=0.0 if pixels is None else sum(packed([(PIXELS, pixels)], manifest, len(sample)).values()),
        free=None if out is None or is_remote(out) else free_bytes(Path(out)),
        tail_bytes=sum(map(tensor_size, tail_state(vit.model.state_dict(), blocks[0]).values())),
    )
    codecs = [c for c in CODECS if not c.endswith("-plain") or c == config.cache.codec]
    shares = sorted({*_SHARES, config.cache.token_share}, reverse=True)
    options = [option for codec in codecs for option in probe.options(codec, shares)]
    own = next(o for o in options if (o.codec, o.token_share) == (config.cache.codec, config.cache.token_share))
    fitting = [o for o in options if o.fits]
    epochs, views = config.distill.epochs, config.views.count
    return PlanResult(
        images=len(images),
        views=views,
        blocks=blocks,
        pixels=config.views.pixels,
        images_per_second=rate,
        hours=len(images) * views / rate / 3600,
        epochs=epochs,
        online_hours=len(images) * epochs / rate / 3600,
        break_even_students=-(-views // epochs),
        tail_bytes=probe.tail_bytes,
        free_bytes=probe.free,
        chosen=own,
        best_fit=min(fitting, key=lambda o: (-o.token_share, o.error), default=None),
        options=options,
    )


def sample_features(
    extract: Extractor, read: RowReader, records: np.ndarray, blocks: Sequence[int]
) -> dict[int, Tensor]:
    """{block: features (n, N, d)} of the first of some records, on the teacher's device."""
    teacher, size = extract.teacher, extract.config.cache.batch_size
    record_bytes = 4 * len(blocks) * (teacher.prefix_tokens + teacher.patches) * teacher.width
    count = min(len(records), _RECORDS, max(1, _FEATURE_BYTES // record_bytes))
    outputs = []
    for batch in np.split(records[:count], range(size, count, size)):
        outputs.append(extract.features(read(batch).pixels[teacher.image_size], blocks))
        check_finite(outputs[-1], batch, read.rows.key)
    return {b: torch.cat([o[b] for o in outputs]) for b in blocks}


def measure_rate(
    extract: Extractor,
    encode: Encoder,
    read: RowReader,
    records: np.ndarray,
    blocks: Sequence[int],
    seconds: float,
) -> float:
    """Records a second that are decoded, run through the teacher and encoded."""
    size = extract.config.cache.batch_size
    batches = np.split(records, range(size, len(records), size))
    done, start = 0, time.perf_counter()

    def store(features: dict[int, Tensor], batch: Batch) -> None:
        for _, values in encode(features, batch):
            values.to("cpu")

    with Behind(store, "encode") as behind:
        for batch in prefetch(lambda r: encode.load(read, r), cycle(batches), extract.config.cache.workers):
            behind(extract.features(batch.pixels, blocks), batch)
            done += len(batch.records)
            if time.perf_counter() - start >= seconds:
                break
    return done / (time.perf_counter() - start)


@dataclass(frozen=True)
class Probe:
    """What is measured once for all options. addition, rows: images drawn; sample: records that `features` are of."""

    config: Config
    extract: Extractor
    addition: Addition
    rows: Rows
    images: int
    sample: np.ndarray
    features: Mapping[int, Tensor]
    calibration: Mapping[int, Calibration]
    pixel_bytes: float
    free: int | None
    tail_bytes: int

    def options(self, codec: str, shares: Sequence[float]) -> list[PlanOption]:
        """One for every share of tokens; none if a codec that is not the chosen one cannot hold these features."""
        try:
            measured = [fidelity(CODECS[codec], x, self.calibration[b]) for b, x in self.features.items()]
            error = max(m["clean"]["relative_error"] for m in measured)
            return [self.option(codec, share, error) for share in shares]
        except UserError:  # beyond its range
            if codec == self.config.cache.codec:
                raise
            return []

    def option(self, codec: str, share: float, error: float) -> PlanOption:
        cache = self.config.cache.model_copy(update={"codec": codec, "token_share": share})
        teacher, views = self.extract.teacher, self.config.views.count
        manifest = describe(self.config.model_copy(update={"cache": cache}), self.addition, teacher)
        encode = Encoder(manifest, self.rows, self.calibration)
        seen: Values = {VIEWS: torch.zeros(len(self.sample), manifest.view_form.itemsize, dtype=torch.uint8)}
        batch = Batch(self.sample, torch.empty(0), {**seen, **encode.positions(self.sample)}, {})
        arrays = packed(encode(dict(self.features), batch), manifest, len(self.sample))
        of_features = sum(size for name, size in arrays.items() if name.startswith(FEATURES))
        beside = sum(arrays.values()) - of_features + self.pixel_bytes
        # The images drawn stand for all.
        indexed = len(image_bytes(self.rows.images)) / len(self.rows) + manifest.view_form.itemsize
        fixed = self.fixed_bytes(manifest)

        def total(views: float, blocks: float) -> float:
            return self.images * views * (of_features * blocks / len(manifest.blocks) + beside + indexed) + fixed

        whole, an_image = round(total(views, len(manifest.blocks))), round(views * of_features)
        if self.free is None:
            return PlanOption(codec, share, error, an_image, whole, None, None, None)
        room = _USABLE * self.free
        a_view = total(1, len(manifest.blocks)) - fixed
        a_block = total(views, 1) - total(views, 0)
        return PlanOption(
            codec=codec,
            token_share=share,
            error=error,
            bytes_per_image=an_image,
            bytes=whole,
            fits=whole <= room,
            max_views=max(0, int((room - fixed) / a_view)),
            max_blocks=max(0, min(teacher.depth, int((room - total(views, 0)) / a_block))),
        )

    def fixed_bytes(self, manifest: Manifest) -> int:
        """Of what does not grow with the images: mostly the end of the teacher."""
        calibration = [t for c in self.calibration.values() for t in c.tensors().values()]
        compression = {name: manifest.compression(name) for name in manifest.arrays()}
        small = array_metadata(manifest.arrays(), compression, manifest.records, manifest.shard_records)
        return self.tail_bytes + sum(map(tensor_size, calibration)) + sum(map(len, small.values()))


def tensor_size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def packed(values: Iterable[tuple[str, Tensor | Ragged]], manifest: Manifest, records: int) -> dict[str, float]:
    """{array: stored bytes a record} of the values of so many records, given in parts."""
    sizes: dict[str, float] = {}
    for name, part in values:
        stored = part.to("cpu") if isinstance(part, Ragged) else part.cpu().numpy()
        count = len(stored.lengths) if isinstance(stored, Ragged) else len(stored)
        pieces = pack_shard(stored, count, manifest.compression(name))
        sizes[name] = sizes.get(name, 0.0) + (sum(map(len, pieces)) - _END_OF_SHARD) / records
    return sizes


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder lies or will lie."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
