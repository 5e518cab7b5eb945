"""The steps of students: alone, from the cache and with the teacher in every step, as training does them."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from parts import Bench, Figure
from setting import Teacher

from pipeline.cache.stored import Decoded
from pipeline.config import Config, DistillConfig
from pipeline.data.sampler import batch_index_lists, prefetch_depth
from pipeline.runtime.buffers import moved
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.progress import Meter
from pipeline.stages.refine import refine
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.distilling.cached_teachers import open_images, open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.learner import Learner
from pipeline.training.optimisers import new_optimiser
from pipeline.training.to_device import StartedSteps, on_device

_STUDENTS = {"vit_small_patch16_224": 256, "vit_tiny_patch16_224": 256, "resnet50": 256}


def steps(bench: Bench) -> Iterator[Figure]:
    """Yield the figures of each student, and those of four students on one pass."""
    refiner = bench.folder / "refiner"
    start = perf_counter()
    refine(bench.config(), bench.cache, refiner)
    yield Figure("refine", perf_counter() - start, "s")
    tiny = ["student.name=vit", "student.dim=12", "student.depth=3", "student.heads=2", "student.patch_size=8"]
    students = {"vit": (8, tiny)} if bench.small else {n: (b, [f"student.name={n}"]) for n, b in _STUDENTS.items()}
    for name, (batch, sets) in students.items():
        config = bench.config(*sets, f"distill.batch_size={batch}")
        yield from one(bench, name, config, refiner, 1)
        if name in ("vit", "vit_tiny_patch16_224"):
            yield from one(bench, f"4 x {name}", config, refiner, 4)


def one(bench: Bench, name: str, config: Config, refiner: Path, count: int) -> Iterator[Figure]:
    """Time the steps of `count` equal students that share a pass."""
    torch._dynamo.reset()  # the graphs of other students
    settings = config.distill
    sources = open_teachers(settings, bench.cache, refiner)
    cache, accelerator = sources[0].cache, make_accelerator(settings.precision)
    runs = []
    for number in range(count):
        out = bench.folder / f"run-{name}-{number}"
        out.mkdir(parents=True, exist_ok=True)
        new = NewStudent(StudentSpec(config, out, refiner), sources, accelerator)
        runs.append(new.student_run("new", accelerator))
        runs[-1].model.plain.train()
    students = [run.student for run in runs]
    numbers = iter(range(10**9))

    def update(batch: Batch) -> None:
        batch = replace(batch, step=next(numbers))
        if len(runs) > 1:
            batch = runs[0].learner.decoded(batch)
        for run in runs:
            run.update(batch, 1000, accelerator)

    with open_images(cache) as files:
        load = BatchLoader([cache], files, [s.image_size for s in students])
        lists = batch_index_lists(len(cache), load.record_bytes, settings, 0, 1, 0, 10**6)
        ahead = prefetch_depth(settings, len(cache), load.record_bytes, 1)
        started = StartedSteps()
        meter = Meter("steps", 1, "images", True, 0, started.busy)
        with closing(load(lists, settings.workers, meter, ahead)) as batches:
            first = next(batches).map(partial(moved, device=bench.device))
            decoded = runs[0].learner.decoded(first)
            size = len(decoded.weights)

            def alone() -> None:
                for run in runs:
                    run.update(replace(decoded, step=next(numbers)), 1000, accelerator)

            start = perf_counter()
            alone()
            bench.wait()
            yield Figure(f"{name}: first step, compilation included", perf_counter() - start, "s")
            student = bench.rate(alone, size)
            yield Figure(f"{name}: student alone, targets in memory", student, "images/s")
            update(first)
            same = bench.rate(partial(update, first), size)
            yield Figure(f"{name}: with decoding", same, "images/s")
            yield Figure(f"{name}: decoding, share of the step", 100 * (1 - same / student), "%")
            queue = on_device(batches, bench.device, started)
            measure = islice(queue, 6 if bench.small else 24)
            for batch in islice(measure, 4):
                update(batch)
            bench.wait()
            meter.waited, done, start = 0.0, 0, perf_counter()
            for batch in measure:
                update(batch)
                done += len(batch.weights)
            bench.wait()
            took = perf_counter() - start
            yield Figure(f"{name}: from the cache, images decoded", done / took, "images/s")
            yield Figure(f"{name}: data wait", 100 * meter.waited / took, "%")
            if count == 1:
                yield from optimisers(bench, name, runs[0].learner, settings)
                update_one = partial(runs[0].update, accelerator=accelerator, per_epoch=1000)
                teach = Teacher(config, cache)
                yield from online(bench, name, teach, decoded, student, update_one)
    yield from bench.memory()


def optimisers(bench: Bench, name: str, learner: Learner, settings: DistillConfig) -> Iterator[Figure]:
    """Time the steps of both optimisers alone, on gradients that exist."""
    for parameter in learner.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-3)
    for kind in ("muon", "adamw"):
        optimiser = new_optimiser(learner, settings.model_copy(update={"optimizer": kind}), bench.device)
        yield Figure(f"{name}: {kind} alone, a step", 1000 / bench.rate(optimiser.step, 1), "ms")
    learner.zero_grad()


def online(
    bench: Bench,
    name: str,
    teach: Teacher,
    given: Batch,
    student: float,
    update: Callable[..., None],
) -> Iterator[Figure]:
    """Time the teacher alone, and in every step. student: the rate of the student alone; given: its batch."""
    pixels, size = given.pixels[teach.backbone.image_size], len(given.weights)
    teacher = bench.rate(partial(teach, pixels), size)
    yield Figure(f"{name}: its teacher alone, not compiled", teacher, "images/s")
    yield Figure(f"{name}: limit of the speed-up, 1 + teacher / student", 1 + student / teacher, "")
    numbers = iter(range(10**9))

    def step() -> None:
        update(replace(given, features=[Decoded(teach(pixels))], step=next(numbers)))

    yield Figure(f"{name}: with the teacher in every step", bench.rate(step, size), "images/s")
