"""The speed of a student's steps, from the cache or with the teacher in every step."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from pipeline.cache.stored import Decoded
from pipeline.data.sampler import BatchIndices, batch_index_lists, prefetch_depth
from pipeline.planning.costs import Rate, not_measured
from pipeline.planning.disk import forget_files
from pipeline.planning.pilot import Pilot
from pipeline.planning.rates import rate_of
from pipeline.planning.sample import Sample, Teacher
from pipeline.runtime.buffers import moved
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.prefetch import prefetch
from pipeline.stages.refine import refine
from pipeline.storage import is_remote
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.cached_teachers import open_images, open_teachers
from pipeline.training.runs import NewStudent, StudentSpec
from pipeline.training.to_device import on_device
from singer.errors import UserError
from singer.tokens import take_patches

TRAINING = ("reading", "student images", "student", "cached", "online")
# Multiples of the golden ratio, without their whole parts, are spread evenly however many there are.
_GOLDEN = 0.6180339887


def train_on(
    pilot: Pilot, sample: Sample, teacher: Teacher, seconds: float, on_disk: bool
) -> tuple[dict[str, Rate], str]:
    """Train the configured student on the pilot's cache and, with the teacher in every step, on its images.

    Return the rates, as in Speeds, and the targets. on_disk: whether the pilot is on the future cache's disk, so that
    its reading can be measured; seconds: the time of each measurement.
    """
    own = {"trackers": (), "local_copy": None, "local_copy_gb": None, "teacher": None, "share_by": "random"}
    config = pilot.config
    config = config.model_copy(
        update={
            "distill": config.distill.model_copy(update=own),
            "student": config.student.model_copy(update={"pretrained": False, "init": "random"}),
            # One step is enough, because adapters are as fast before training as after it.
            "refine": config.refine.model_copy(
                update={"steps": 1, "local_copy": None, "local_copy_gb": None, "teacher": None}
            ),
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
        return dict.fromkeys(TRAINING, not_measured(str(error))), "none"
    student_run = new.student_run("new", accelerator)
    student_run.model.plain.train()
    cache, device, shown = sources[0].cache, accelerator.device, new.student.image_size
    per_epoch = -(-len(cache) // settings.batch_size)

    with open_images(cache) as files:
        load = BatchLoader([cache], files, [shown], others=new.others)
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
                    # Once a pass, because records that were read in the last pass would come from memory.
                    forget_files(Path(pilot.place))
                    done = 0
                yield count
                done += count

        def decode() -> Generator[int, None, None]:
            for share, _ in prefetch(load.pixels, shares(), settings.workers):
                yield len(share.records)

        def step(batch: Batch, number: int) -> int:
            # Some steps of a run are cheaper (distill.token_share): these are spread evenly over all of it.
            place = int(number * _GOLDEN % 1 * settings.epochs * per_epoch)
            student_run.update(replace(batch, step=place), per_epoch, accelerator)
            return len(batch.weights)

        def student() -> Generator[int, None, None]:
            batch = next(load(lists(), settings.workers, None, ahead)).map(partial(moved, device=device))
            decoded = new.distiller.decoded(batch)
            for number in range(10**9):
                yield step(decoded, number)

        def cached() -> Generator[int, None, None]:
            loaded = load(lists(), settings.workers, None, ahead)
            for number, batch in enumerate(on_device(loaded, device)):
                yield step(batch, number)

        def online() -> Generator[int, None, None]:
            size, (first,) = teacher.backbone.image_size, load.features([next(shares())])
            batches = zip(shares(), cycle(sample.batches(settings.batch_size)), strict=False)
            loaded = prefetch(
                lambda pair: (pair[0], sample.views(pair[1][: len(pair[0].records)], {shown, size})),
                batches,
                settings.workers,
            )
            for number, (share, views) in enumerate(loaded):
                features, positions = teacher(views[size]), first[0].positions
                if positions is not None:
                    # Which patches are compared makes no difference to the time.
                    positions = positions[:1].expand(len(share.records), -1).to(device)
                    features = {b: take_patches(x, teacher.backbone.prefix, positions) for b, x in features.items()}
                weights = torch.from_numpy(share.weights).to(device)
                labels = load.labels[torch.from_numpy(share.records)].to(device).long()
                pixels = {shown: moved(views[shown], device)}
                yield step(Batch(pixels, [Decoded(features, positions)], weights, labels), number)

        reading = not_measured("no --out")
        if on_disk:
            reading = rate_of(read(), seconds)
        steps = {"student images": decode, "student": student, "cached": cached, "online": online}
        return {"reading": reading, **{n: rate_of(make(), seconds, device) for n, make in steps.items()}}, targets
