"""Several students on one pass over a cache against the sum of their computing alone, and against a pass for each.

    python benchmarks/fan_out.py --cache CACHE [--adapters ADAPTERS] [--students 4] [--steps 10] [--rounds 5]

Medians of interleaved rounds, milliseconds a step of all students. "Computing alone": one batch again and again.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.cache.reader import Cache
from pipeline.config import load_config
from pipeline.distiller import Distiller, Head, Lesson, Shown, Targets
from pipeline.models import new_student
from pipeline.prefetch import prefetch
from pipeline.readplan import EpochOrder, share
from pipeline.refine import load_refiner
from pipeline.shards import ImageFile, relocate
from pipeline.train import Batch, BatchLoader
from pipeline.views import normalise
from singer.backbones import depth
from singer.matching import match_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--recipe", default="tinyimagenet-ti-to-w96")
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    config, cache = load_config(options.recipe), Cache(options.cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, workers = config.distill.batch_size, config.distill.workers
    students, models, optimisers = [], [], []
    for seed in range(options.students):
        torch.manual_seed(seed)
        student = new_student(config.student, cache.manifest.teacher.image_size)
        refiner = load_refiner(options.adapters, cache) if options.adapters else None
        matching = match_blocks(cache.blocks, cache.manifest.teacher.depth, depth(student.model))
        targets = Targets(cache, refiner, student, device)
        model = Distiller(student, [Head(student, matching, targets, config.distill.objectives)]).to(device)
        students.append(student)
        models.append(model)
        optimisers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
    load = BatchLoader([cache], ImageFile(relocate(cache.index.images, None)), [students[0].image_size])
    order = EpochOrder(len(cache), 0, 0)
    plan = [share(order, step % (len(cache) // batch), batch, 0, 1) for step in range(options.steps)]

    def lesson(loaded: Batch) -> Lesson:
        student = students[0]
        images = normalise(loaded.pixels[student.image_size], student.mean, student.std, device)
        shown = [Shown(cache.decode(encoded, device)) for encoded in loaded.encoded]
        return Lesson(images, shown, loaded.weights.to(device), loaded.labels.to(device))

    def update(number: int, given: Lesson) -> None:
        losses = models[number](given)
        optimisers[number].zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimisers[number].step()

    at_hand = lesson(load(plan[0]))

    def computing_alone() -> None:
        for _ in plan:
            for number in range(options.students):
                update(number, at_hand)

    def one_pass() -> None:
        for loaded in prefetch(load, plan, workers):
            given = lesson(loaded)
            for number in range(options.students):
                update(number, given)

    def a_pass_each() -> None:
        for number in range(options.students):
            for loaded in prefetch(load, plan, workers):
                update(number, lesson(loaded))

    kinds: list[Callable[[], None]] = [computing_alone, one_pass, a_pass_each]
    seconds: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    for round_ in range(options.rounds + 1):
        for kind in kinds:
            start = time.perf_counter()
            kind()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first warms up
                seconds[kind.__name__].append((time.perf_counter() - start) / options.steps)
    base = seconds["computing_alone"]
    print(f"{options.students} students\n\n| | ms a step | of computing alone |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"| {name.replace('_', ' ')} | {1000 * statistics.median(values):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
