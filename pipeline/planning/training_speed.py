"""The speed of a student's steps, from the cache or with the teacher in every step."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, cycle
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.cache.extract import Extractor
from pipeline.cache.stored import Decoded
from pipeline.config import Config
from pipeline.data import ImageFile
from pipeline.data.sampler import BatchIndices, batch_index_lists, prefetch_depth, shuffle_of
from pipeline.planning.disk import forget_files
from pipeline.planning.pilot import Pilot
from pipeline.planning.rates import Rate, not_measured, rate_of
from pipeline.planning.sample import Sample
from pipeline.runtime.buffers import moved
from pipeline.runtime.devices import make_accelerator, own_settings
from pipeline.runtime.prefetch import prefetch
from pipeline.stages.refine import refine
from pipeline.storage import Place, is_remote
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.distilling.cached_teachers import open_images, open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.to_device import on_device
from singer.errors import UserError
from singer.tokens import take_patches

TRAINING = ("reading", "student images", "student", "cached", "online")
# Multiples of the golden ratio, without their whole parts, are spread evenly however many there are.
_GOLDEN = 0.6180339887
# So many steps take longer than any measurement.
_ENDLESS = 10**9
# So many blocks of neighbours are read together.
_BLOCKS = 16


@own_settings()
def train_on(
    pilot: Pilot, sample: Sample, teacher: Extractor, seconds: float, on_disk: bool
) -> tuple[dict[str, Rate], str]:
    """Train the configured student on the pilot's cache and, with the teacher in every step, on its images.

    Return the rates, as in Speeds, and the targets. on_disk: whether the pilot is on the future cache's disk, so that
    its reading can be measured; seconds: the time of each measurement.
    """
    config = _measured_config(pilot.config)
    refiner, targets = _refiner(config, pilot)
    run = pilot.work / "run"
    run.mkdir()
    try:
        sources = open_teachers(config.distill, pilot.place, refiner)
        accelerator = make_accelerator(config.distill.precision)
        new = NewStudent(StudentSpec(config, run, refiner), sources, accelerator)
    except UserError as error:
        return dict.fromkeys(TRAINING, not_measured(str(error))), "none"
    with open_images(sources[0].cache) as files:
        steps, device = _Steps(new, files, accelerator), accelerator.device
        rates = {
            "reading": rate_of(steps.reading(pilot.place), seconds) if on_disk else not_measured("no --out"),
            "student images": rate_of(steps.decoding(), seconds, device),
            "student": rate_of(steps.student(), seconds, device),
            "cached": rate_of(steps.cached(), seconds, device),
            "online": rate_of(steps.online(sample, teacher), seconds, device),
        }
    return rates, targets


def _measured_config(config: Config) -> Config:
    """Return the configuration without what costs time and changes no speed: copies, trackers, fetched weights."""
    own = {"local_copy": None, "local_copy_gb": None, "teacher": None}
    return config.changed(
        distill={**own, "trackers": (), "share_by": "random"},
        student={"pretrained": False, "init": "random"},
        # One step is enough, because adapters are as fast before training as after it.
        refine={**own, "steps": 1},
    )


def _refiner(config: Config, pilot: Pilot) -> tuple[Path | None, str]:
    """Fit the configured refiner to the pilot's cache; return its folder and what it makes of the targets, in words.

    Without one, the targets are raw. Joint training needs none.
    """
    if config.distill.joint:
        return None, "raw"
    try:
        refine(config, pilot.place, pilot.work / "refiner")
    except UserError as error:
        return None, f"raw: {error}"
    return pilot.work / "refiner", f"{config.refine.cleaner}, {config.refine.normaliser}"


class _Steps:
    """The parts of a student's steps on a cache, each without an end: they yield how many records they have done."""

    def __init__(self, new: NewStudent, files: ImageFile | None, accelerator: Accelerator) -> None:
        self._distiller, self._size, self._accelerator = new.distiller, new.student.image_size, accelerator
        self._settings, self._cache = new.spec.config.distill, new.teachers[0].cache
        self._run = new.student_run("new", accelerator)
        self._run.model.plain.train()
        self._per_epoch = -(-len(self._cache) // self._settings.batch_size)
        self._load = BatchLoader([self._cache], files, [self._size], others=new.others)
        size = self._load.record_bytes
        # Blocks are read as in a large cache, but a few at a time: the pilot would fit in one window.
        block = shuffle_of(self._settings, _ENDLESS, size).block
        blocks = {"read_block": block, "shuffle_window": _BLOCKS * block}
        self._settings = self._settings.model_copy(update=blocks)
        self._ahead = prefetch_depth(self._settings, len(self._cache), size, 1)

    def reading(self, place: Place) -> Generator[int, None, None]:
        """Read features, as batches need them. place: of the cache."""

        def read(group: Sequence[BatchIndices]) -> int:
            self._load.features(group)
            return sum(len(share.records) for share in group)

        done = len(self._cache)
        for count in prefetch(read, self._lists(), self._settings.workers, None, self._ahead):
            if done >= len(self._cache) and not is_remote(place):
                # Once a pass, because records that were read in the last pass would come from memory.
                forget_files(Path(place))
                done = 0
            yield count
            done += count

    def decoding(self) -> Generator[int, None, None]:
        """Decode the images for the student."""
        for share, _ in prefetch(self._load.pixels, self._shares(), self._settings.workers):
            yield len(share.records)

    def student(self) -> Generator[int, None, None]:
        """Train the student on one batch that is on its device."""
        batch = next(self._batches()).map(partial(moved, device=self._accelerator.device))
        decoded = self._distiller.decoded(batch)
        for number in range(_ENDLESS):
            yield self._step(decoded, number)

    def cached(self) -> Generator[int, None, None]:
        """Train the student from the cache."""
        for number, batch in enumerate(on_device(self._batches(), self._accelerator.device)):
            yield self._step(batch, number)

    def online(self, sample: Sample, teacher: Extractor) -> Generator[int, None, None]:
        """Train the student with the teacher in every step, on the images of the sample."""
        shown, size, device = self._size, teacher.backbone.image_size, self._accelerator.device
        (first,) = self._load.features([next(self._shares())])
        batches = zip(self._shares(), cycle(sample.batches(self._settings.batch_size)), strict=False)
        loaded = prefetch(
            lambda pair: (pair[0], sample.views(pair[1][: len(pair[0].records)], {shown, size})),
            batches,
            self._settings.workers,
        )
        for number, (share, views) in enumerate(loaded):
            # Copies of what inference mode gives may take part in a step.
            features = {b: x.clone() for b, x in teacher.trial(views[size]).items()}
            positions = first[0].positions
            if positions is not None:
                # Which patches are compared makes no difference to the time.
                positions = positions[:1].expand(len(share.records), -1).to(device)
                features = {b: take_patches(x, teacher.backbone.prefix, positions) for b, x in features.items()}
            weights = torch.from_numpy(share.weights).to(device)
            labels = self._load.labels[torch.from_numpy(share.records)].to(device).long()
            pixels = {shown: moved(views[shown], device)}
            yield self._step(Batch(pixels, [Decoded(features, positions)], weights, labels), number)

    def _step(self, batch: Batch, number: int) -> int:
        # Some steps of a run are cheaper (distill.token_share): these are spread evenly over all of it.
        place = int(number * _GOLDEN % 1 * self._settings.epochs * self._per_epoch)
        self._run.update(replace(batch, step=place), self._per_epoch, self._accelerator)
        return len(batch.weights)

    def _lists(self) -> Iterator[list[BatchIndices]]:
        return batch_index_lists(len(self._cache), self._load.record_bytes, self._settings, 0, 1, 0, _ENDLESS)

    def _shares(self) -> Iterator[BatchIndices]:
        return chain.from_iterable(self._lists())

    def _batches(self) -> Generator[Batch, None, None]:
        return self._load(self._lists(), self._settings.workers, None, self._ahead)
