"""What a plan measures: the real stages, on a few images, in a folder that is removed afterwards."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.cache.calibration import Calibration, few_records
from pipeline.cache.codecs import CODECS, Codec
from pipeline.cache.extract import Extractor
from pipeline.data import Images
from pipeline.planning.disk import MB, read_images, write_to_disk
from pipeline.planning.pilot import MOST_IMAGES, Pilot
from pipeline.planning.rates import REPEATS, Rate, not_measured, rate_beside, rate_of
from pipeline.planning.sample import Sample
from pipeline.planning.training_speed import TRAINING, train_on
from pipeline.runtime.progress import say
from pipeline.storage import Store

# The share of a plan's seconds for which each stage is measured alone.
_PART = 0.25


def encoding(
    codec: Codec, features: Mapping[int, Tensor], calibration: Mapping[int, Calibration]
) -> Generator[int, None, None]:
    """Encode a batch's features again and again; yield its number of records each time."""
    while True:
        for block, x in features.items():
            for few in few_records(x):
                for values in codec.encode(few, calibration[block]).values():
                    values.to("cpu")
        yield len(next(iter(features.values())))


@dataclass(frozen=True)
class Speeds:
    """The measured speeds, in views a second.

    caching: "images" (reading shards), "decoding", "teacher", "encoding", "writing", and "caching" (all of them
    together); training: "reading" (features), "student images" (decoding them), "student" (its steps alone), and the
    whole steps "cached" and "online"; targets: the targets of these steps; setup_seconds: the time of caching before
    its first record; written_bytes: bytes that were written to measure the disk.
    """

    caching: dict[str, Rate]
    training: dict[str, Rate]
    targets: str
    setup_seconds: float | None
    written_bytes: int


_CACHING = ("images", "decoding", "teacher", "encoding", "writing", "caching")


def no_speeds(why: str) -> Speeds:
    """Return speeds that were not measured, for the reason `why`."""
    nothing = not_measured(why)
    return Speeds(dict.fromkeys(_CACHING, nothing), dict.fromkeys(TRAINING, nothing), "none", None, 0)


def measure_speeds(
    listed: Images,
    sample: Sample,
    teacher: Extractor,
    calibration: Mapping[int, Calibration],
    pilot: Pilot,
    store: Store | None,
    free: int | None,
    cache_bytes: int,
    seconds: float,
) -> Speeds:
    """Measure every stage alone, and then all stages together.

    listed: all images; store: a temporary place on the future cache's disk, or None if there is none; free: the free
    bytes there; cache_bytes: the size of the whole cache; seconds: how long caching runs, and how long the disk is
    written to at most. Each other stage runs for a quarter of it.
    """
    config, device, part = pilot.config, teacher.device, _PART * seconds
    batch = sample.batches(config.cache.views_at_once)[0]
    pixels = sample.load(batch, teacher.backbone.image_size)

    def forward() -> Generator[int, None, None]:
        while True:
            teacher.trial(pixels)
            yield len(pixels)

    records, codec = len(listed) * config.views.count, CODECS[config.cache.codec]
    features = teacher.trial(pixels)
    say(f"measuring the stages of caching, {part:g} s each")
    caching = {
        "images": read_images(listed, part).scaled(config.views.count),
        "decoding": rate_beside(
            sample.decoding(len(batch), teacher.backbone.image_size),
            lambda: teacher.trial(pixels),
            part,
            sample.decoder.device,
        ),
        "teacher": rate_of(forward(), part, device),
        "encoding": rate_beside(encoding(codec, features, calibration), lambda: teacher.trial(pixels), part),
    }
    nowhere, written, setup = not_measured("no --out"), 0, None
    if store is None:
        caching |= {"writing": nowhere, "caching": nowhere}
    else:
        say(f"measuring the disk, {seconds:g} s at most")
        disk, written = write_to_disk(store, cache_bytes, free, seconds, config.cache.shard_mb * MB)
        caching["writing"] = disk.scaled(records / cache_bytes)
        say(f"caching for {seconds:g} s")
        # This follows the measurement of the disk, which has filled the drive's own cache.
        image_bytes = max(1.0, float(sample.images.size.mean())) + config.views.count * cache_bytes / records
        room = MOST_IMAGES if free is None else int(free / 10 / REPEATS / image_bytes)
        caching["caching"] = pilot.grow(pilot.first.images_per_second, seconds, room)
        if (rate := caching["caching"].per_second) is not None:
            setup = max(0.0, pilot.first.seconds - pilot.first.records / rate)
    say(f"measuring the steps of a student, {part:g} s each")
    training, targets = train_on(pilot, sample, teacher, part, store is not None)
    return Speeds(caching, training, targets, setup, written)
