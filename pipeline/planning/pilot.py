"""What `cache plan` measures: the real stages at work on a few images, in a folder that is removed afterwards."""

import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration, Codec, few_records
from pipeline.cache.pixels import encode_jpegs
from pipeline.config import Config
from pipeline.data import ImageFile, Images
from pipeline.data.background import BackgroundWorker
from pipeline.data.prefetch import prefetch
from pipeline.data.sampler import BatchIndices, batch_index_lists, prefetch_depth
from pipeline.data.tars import NO_LABEL
from pipeline.data.views import apply_view, draw_view, normalise
from pipeline.planning.costs import Rate, not_measured
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.progress import say
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.refine import refine
from pipeline.storage import Place, Store, is_remote, open_store
from pipeline.teachers.models import Backbone
from pipeline.training.distiller import Batch, TeacherFeatures
from pipeline.training.student_run import NewStudent, StudentSpec
from pipeline.training.teachers import open_images, open_teachers
from pipeline.training.trainer import BatchLoader
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.matching import take_patches

SCRATCH = ".singer-plan"
_REPEATS = 3
_MB = 2**20
# Of a disk that slows down in the second half of what is written, the rate is not known yet.
_SETTLED = 0.75
_MOST_REMOTE_BYTES = 2 * 2**30
_FILES_WRITTEN = 12
_MOST_IMAGES = 20_000
_CALIBRATION_RECORDS = 256
# Of the seconds of a plan: those of each stage by itself.
_PART = 0.25
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def scratch(out: Place) -> Iterator[Place]:
    """A place on the disk, or in the bucket, of `out`; it is emptied before and removed afterwards.

    SIGTERM removes it, too. What a killed plan has left is removed by the next one at the same place. Raises UserError
    if another plan is at work there.
    """
    place: Place = f"{str(out).rstrip('/')}/{SCRATCH}" if is_remote(out) else existing(Path(out)) / SCRATCH
    store = open_store(place)
    with _terminated(), store.lock():
        store.clear()
        try:
            yield place
        finally:
            store.clear()


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends this as Ctrl-C does, instead of at once."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rate_of(steps: Generator[int, None, None], seconds: float, device: torch.device | None = None) -> Rate:
    """How fast an endless generator goes whose every step tells how many records it has done; the first warms up.

    seconds: in all, as three repeats. device: which is waited for after each repeat. The generator is closed.
    """

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    repeats: list[tuple[float, float]] = []
    with closing(steps):
        next(steps)
        for _ in range(_REPEATS):
            wait()
            start, done = time.perf_counter(), 0
            while done == 0 or time.perf_counter() - start < seconds / _REPEATS:
                done += next(steps)
            wait()
            repeats.append((done, time.perf_counter() - start))
    return Rate.of(repeats)


def rate_beside(steps: Generator[int, None, None], busy: Callable[[], object], seconds: float) -> Rate:
    """As rate_of, in a thread of its own while this one is busy."""
    found: list[Rate] = []
    over = threading.Event()

    def run() -> None:
        try:
            found.append(rate_of(steps, seconds))
        finally:
            over.set()

    with BackgroundWorker(run, "measure") as behind:
        behind()
        while not over.is_set():
            busy()
    return found[0]


class Teacher:
    """The teacher at work: views (n, side, side, 3) uint8 -> {block: features (n, N, d) float32} on its device."""

    def __init__(self, config: Config, vit: Backbone, blocks: Sequence[int], device: torch.device) -> None:
        self.vit, self.blocks, self.device = vit, blocks, device
        self._half = _AUTOCAST.get(config.cache.precision)
        vit.model.to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[int, Tensor]:
        images = normalise(pixels, self.vit.mean, self.vit.std, self.device)
        with torch.autocast(self.device.type, self._half, self._half is not None):
            outputs = block_outputs(self.vit.model, images, self.blocks)
        return {block: x.float() for block, x in outputs.items()}


Record = tuple[int, int]
"""Number of an image, and of its view."""


class Sample:
    """Some images, by number, and their views as cache-teacher draws them."""

    def __init__(self, config: Config, images: Images, files: ImageFile) -> None:
        self.config, self.images, self.files = config, images, files
        rng = np.random.default_rng(0)
        self._records = [divmod(int(r), config.views.count) for r in rng.permutation(len(images) * config.views.count)]

    def views(self, records: Sequence[Record], sides: Iterable[int]) -> dict[int, Tensor]:
        """{side: (n, side, side, 3) uint8}. Each image is decoded once."""
        found: dict[int, list[np.ndarray]] = {side: [] for side in sides}
        for number, view in records:
            image = self.files.read(number)
            drawn = draw_view(self.config.views, self.images.keys[number], view, image.size)
            for side, pictures in found.items():
                pictures.append(apply_view(image, drawn, side))
        return {side: torch.from_numpy(np.stack(pictures)) for side, pictures in found.items()}

    def __len__(self) -> int:
        """Records."""
        return len(self._records)

    def batches(self, size: int) -> list[list[Record]]:
        """All records in a random order, a batch at a time; of few, some more than once."""
        endless = cycle(self._records)
        return [[next(endless) for _ in range(size)] for _ in range(-(-len(self._records) // size))]

    def load(self, records: Sequence[Record], side: int) -> Tensor:
        """The views for the teacher, (n, side, side, 3) uint8, as a thread of cache-teacher makes them: if views are
        stored, these are encoded, too.
        """
        settings = self.config.views
        small = (settings.pixel_size or side) if settings.pixels != "none" else side
        views = self.views(records, {side, small})
        if settings.pixels == "jpeg":
            encode_jpegs(views[small].numpy(), settings.jpeg_quality)
        return views[side]

    def decoding(self, size: int, side: int) -> Generator[int, None, None]:
        """Decode batches of so many views in as many threads as cache-teacher does."""
        batches = cycle(self.batches(size))
        for views in prefetch(lambda records: self.load(records, side), batches, self.config.cache.workers):
            yield len(views)

    def write_tar(self, path: Path, numbers: Sequence[int], prefix: str = "") -> None:
        """A shard of these images, under their keys after a prefix and, where one occurs again, its place."""
        seen: set[int] = set()
        with tarfile.open(path, "w") as tar:
            for place, number in enumerate(numbers):
                again = f"{place}-" if number in seen else ""
                seen.add(number)
                key = f"{prefix}{again}{self.images.keys[number]}"
                _add(tar, f"{key}.jpg", self.files.encoded(number)[0])
                label = int(self.images.labels[number])
                if label != NO_LABEL:
                    _add(tar, f"{key}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def write_to_disk(store: Store, whole: int, room: int | None, seconds: float, file_bytes: int) -> tuple[Rate, int]:
    """Bytes a second that a disk takes, sustained, and how many were written.

    Write synced files as cache-teacher does, up to the size of the whole cache, and leave them there.

    A drive's own cache takes the first gigabytes faster, so the rate is that of the second half. room: free bytes, of
    which a tenth is used; None: of an object store. file_bytes: of a file.
    """
    most = min(whole, _MOST_REMOTE_BYTES if room is None else room // 10)
    size = max(1, min(file_bytes, most // _FILES_WRITTEN))
    # Content that no disk compresses or finds again.
    noise = memoryview(np.random.default_rng(0).bytes(size))
    repeats: list[tuple[float, float]] = []
    first = time.perf_counter()
    while len(repeats) < 4 or (
        len(repeats) * size < most and (time.perf_counter() - first < seconds or len(repeats) < 2 * _REPEATS)
    ):
        cut = 4099 * len(repeats) % size
        start = time.perf_counter()
        store.write(f"written/{len(repeats):06d}", noise[cut:], noise[:cut])
        repeats.append((size, time.perf_counter() - start))
    return sustained(repeats, whole), len(repeats) * size


def sustained(files: Sequence[tuple[float, float]], whole: int) -> Rate:
    """The rate of the second half of (bytes, seconds) of files written one after the other.

    Not measured if it was still falling, unless all of the cache's bytes were written.
    """
    half = len(files) // 2

    def together(some: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return sum(b for b, _ in some), sum(s for _, s in some)

    early, late = together(files[:half]), together(files[half:])
    written = early[0] + late[0]
    if written < whole and late[0] / late[1] < _SETTLED * early[0] / early[1]:
        return not_measured(f"the disk was still slowing down after {written / 1e9:.3g} GB; use more --seconds")
    middle = half + (len(files) - half) // 2
    of_all = "" if written >= whole else f" on the first {written / 1e9:.3g} of {whole / 1e9:.3g} GB"
    return Rate.of([together(files[half:middle]), together(files[middle:])], f"measured{of_all}")


def read_shards(images: Images, seconds: float) -> Rate:
    """Images a second that are read from the shards in their order, from the disk and not from memory."""

    def bytes_read() -> Generator[int, None, None]:
        for path in cycle(images.paths):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := file.read(_MB):
                    yield len(piece)

    return rate_of(bytes_read(), seconds).scaled(len(images) / max(1, sum(images.shard_sizes)))


def forget_files(folder: Path) -> None:
    """Have the system read the files below a folder from the disk again."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def encoding(
    codec: Codec, features: Mapping[int, Tensor], calibration: Mapping[int, Calibration]
) -> Generator[int, None, None]:
    """Encode a batch's features again and again."""
    while True:
        for block, x in features.items():
            for few in few_records(x):
                for values in codec.encode(few, calibration[block]).values():
                    values.to("cpu")
        yield len(next(iter(features.values())))


class Pilot:
    """A small cache, made by the real stage. place: of the cache; work: a local folder for all else."""

    def __init__(self, config: Config, sample: Sample, place: Place, work: Path) -> None:
        self.config, self.place, self.work, self._sample = config, place, work, sample
        # As many records as calibration takes.
        count = min(len(sample.images), -(-_CALIBRATION_RECORDS // config.views.count))
        sample.write_tar(work / "0.tar", range(count))
        self.first = cache_teacher(config, str(work / "0.tar"), place)

    def sizes(self) -> dict[str, int]:
        """{file: bytes} of the cache."""
        return open_store(self.place).sizes()

    def grow(self, expected: float, seconds: float, most: int) -> Rate:
        """Records a second that cache-teacher adds, in runs of a third of the seconds. Three runs are three repeats.

        Calibration is not repeated, so that this is the rate of a long run. expected: records a second, for a guess of
        how many to take; most: images a run.
        """
        config, images = self.config, len(self._sample.images)
        batch = config.cache.batch_size
        records = max(batch, int(expected * seconds / _REPEATS) // batch * batch)
        count = max(1, min(most, _MOST_IMAGES, -(-records // config.views.count)))
        repeats = []
        for run in range(1, _REPEATS + 1):
            start = run * count
            numbers = [n % images for n in range(start, start + count)]
            tar = self.work / f"{run}.tar"
            self._sample.write_tar(tar, numbers, f"{run}/")
            result = cache_teacher(config, str(tar), self.place, "append")
            repeats.append((result.images_per_second * result.seconds, result.seconds))
        return Rate.of(repeats)


@dataclass(frozen=True)
class Speeds:
    """What was measured, views a second.

    caching: "images" (read from the shards), "decoding", "teacher", "encoding", "writing", and "caching": all of them
    together. training: "reading" (of features), "student images" (decoded), "student" (its steps alone), and whole
    steps: "cached" and "online". targets: of these steps. setup_seconds: of caching, before the first record.
    """

    caching: dict[str, Rate]
    training: dict[str, Rate]
    targets: str
    setup_seconds: float | None
    written_bytes: int


_CACHING = ("images", "decoding", "teacher", "encoding", "writing", "caching")
_TRAINING = ("reading", "student images", "student", "cached", "online")


def no_speeds(why: str) -> Speeds:
    nothing = not_measured(why)
    return Speeds(dict.fromkeys(_CACHING, nothing), dict.fromkeys(_TRAINING, nothing), "none", None, 0)


def measure_speeds(
    listed: Images,
    sample: Sample,
    teacher: Teacher,
    calibration: Mapping[int, Calibration],
    pilot: Pilot,
    store: Store | None,
    free: int | None,
    cache_bytes: int,
    seconds: float,
) -> Speeds:
    """Measure every stage by itself, and then all at work.

    listed: all images; store: a temporary place where the cache will be, if that is known; free: bytes there;
    cache_bytes: of the whole cache. seconds: how long caching runs, and the disk is written to at most; others have a
    quarter.
    """
    config, device, part = pilot.config, teacher.device, _PART * seconds
    batch = sample.batches(config.cache.batch_size)[0]
    pixels = sample.load(batch, teacher.vit.image_size)

    def forward() -> Generator[int, None, None]:
        while True:
            teacher(pixels)
            yield len(pixels)

    records, codec = len(listed) * config.views.count, CODECS[config.cache.codec]
    features = teacher(pixels)
    say(f"measuring the stages of caching, {part:g} s each")
    caching = {
        "images": read_shards(listed, part).scaled(config.views.count),
        "decoding": rate_beside(sample.decoding(len(batch), teacher.vit.image_size), lambda: teacher(pixels), part),
        "teacher": rate_of(forward(), part, device),
        "encoding": rate_beside(encoding(codec, features, calibration), lambda: teacher(pixels), part),
    }
    nowhere, written, setup = not_measured("no --out"), 0, None
    if store is None:
        caching |= {"writing": nowhere, "caching": nowhere}
    else:
        say(f"measuring the disk, {seconds:g} s at most")
        disk, written = write_to_disk(store, cache_bytes, free, seconds, config.cache.shard_mb * _MB)
        caching["writing"] = disk.scaled(records / cache_bytes)
        say(f"caching for {seconds:g} s")
        # After the disk, whose own cache is full by now.
        image_bytes = max(1.0, float(sample.images.size.mean())) + config.views.count * cache_bytes / records
        room = _MOST_IMAGES if free is None else int(free / 10 / _REPEATS / image_bytes)
        caching["caching"] = pilot.grow(pilot.first.images_per_second, seconds, room)
        if (rate := caching["caching"].per_second) is not None:
            setup = max(0.0, pilot.first.seconds - pilot.first.records / rate)
    say(f"measuring the steps of a student, {part:g} s each")
    training, targets = train_on(pilot, sample, teacher, part, store is not None)
    return Speeds(caching, training, targets, setup, written)


def train_on(
    pilot: Pilot, sample: Sample, teacher: Teacher, seconds: float, on_disk: bool
) -> tuple[dict[str, Rate], str]:
    """Train the configured student on the pilot's cache and, with the teacher in every step, on its images.

    Rates as in Speeds, and the targets. on_disk: whether the pilot is where the cache will be, so that reading says
    something. seconds: of each measurement.
    """
    own = {"trackers": (), "local_copy": None, "teacher": None}
    config = pilot.config
    config = config.model_copy(
        update={
            "distill": config.distill.model_copy(update=own),
            "student": config.student.model_copy(update={"pretrained": False}),
            # As many steps as it takes to have adapters: their speed is that of trained ones.
            "refine": config.refine.model_copy(update={"steps": 1, "local_copy": None, "teacher": None}),
        }
    )
    settings, refiner, targets = config.distill, None, "raw"
    if not settings.joint:
        try:
            refine(config, pilot.place, pilot.work / "refiner")
            refiner, targets = pilot.work / "refiner", f"{config.refine.cleaner}, {config.refine.normaliser}"
        except UserError as error:
            targets = f"raw: {error}"
    run = pilot.work / "run"
    run.mkdir()
    try:
        sources = open_teachers(settings, pilot.place, refiner)
        accelerator = make_accelerator(settings.precision)
        new = NewStudent(StudentSpec(config, run, refiner), sources, accelerator)
    except UserError as error:
        return dict.fromkeys(_TRAINING, not_measured(str(error))), "none"
    student_run = new.student_run("new", accelerator)
    student_run.model.train()
    cache, device, side = sources[0].cache, accelerator.device, new.student.image_size
    per_epoch = -(-len(cache) // settings.batch_size)

    with open_images(cache) as files:
        load = BatchLoader([cache], files, [side])
        ahead = prefetch_depth(settings, load.record_bytes, 1)

        def lists() -> Iterator[list[BatchIndices]]:
            return batch_index_lists(len(cache), load.record_bytes, settings, 0, 1, 0, 10**9)

        def shares() -> Iterator[BatchIndices]:
            return (share for group in lists() for share in group)

        def read_group(group: Sequence[BatchIndices]) -> int:
            load.features(group)
            return sum(len(share.records) for share in group)

        def read() -> Generator[int, None, None]:
            done = len(cache)
            for count in prefetch(read_group, lists(), settings.workers, None, ahead):
                if done >= len(cache) and not is_remote(pilot.place):
                    # Once a pass: what was read lately would come from memory.
                    forget_files(Path(pilot.place))
                    done = 0
                yield count
                done += count

        def decode() -> Generator[int, None, None]:
            for share, _ in prefetch(load.pixels, shares(), settings.workers):
                yield len(share.records)

        def step(batch: Batch, number: int) -> int:
            student_run.update(number, per_epoch, batch, accelerator)
            return len(batch.weights)

        def student() -> Generator[int, None, None]:
            (batch,) = next(load(lists(), settings.workers, None, ahead)).to(device, [cache], [new.student])
            for number in range(10**9):
                yield step(batch, number)

        def cached() -> Generator[int, None, None]:
            for number, stored in enumerate(load(lists(), settings.workers, None, ahead)):
                (batch,) = stored.to(device, [cache], [new.student])
                yield step(batch, number)

        def online() -> Generator[int, None, None]:
            size, (first,) = teacher.vit.image_size, load.features([next(shares())])
            batches = zip(shares(), cycle(sample.batches(settings.batch_size)), strict=False)
            loaded = prefetch(
                lambda pair: (pair[0], sample.views(pair[1][: len(pair[0].records)], {side, size})),
                batches,
                settings.workers,
            )
            for number, (share, views) in enumerate(loaded):
                features, positions = teacher(views[size]), first[0].positions
                if positions is not None:
                    # Which patches are compared makes no difference to the time.
                    positions = positions[:1].expand(len(share.records), -1).to(device)
                    features = {b: take_patches(x, teacher.vit.prefix, positions) for b, x in features.items()}
                images = normalise(views[side], new.student.mean, new.student.std, device)
                weights = torch.from_numpy(share.weights).to(device)
                labels = load.labels[torch.from_numpy(share.records)].to(device).long()
                yield step(Batch(images, [TeacherFeatures(features, positions)], weights, labels), number)

        reading = not_measured("no --out")
        if on_disk:
            reading = rate_of(read(), seconds)
        steps = {"student images": decode, "student": student, "cached": cached, "online": online}
        return {"reading": reading, **{n: rate_of(of(), seconds, device) for n, of in steps.items()}}, targets
