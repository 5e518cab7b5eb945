"""A sweep from one cache, compared with as many runs with the teacher in every step: total times, and the formula.

    python benchmarks/sweep_cost.py --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--set KEY=VALUE ...]
        [--teacher FILE] [--students 20] [--epochs 2] [--together 4] [--online 2]

The sweep is everything that a user waits for: `cache-teacher`, `refine`, and the students, `together` at a time on one
pass. An online run is the same student on the same views and batches, with the teacher in every step; `online` of them
are timed, and their mean is multiplied by `students`. Everything runs in one process, one after the other; the online
runs are spread over the sweep, so that a slow minute affects both.
"""

import argparse
from pathlib import Path

from setting import DEVICE_NAME, Student, Teacher, read_config, run_in_scratch, seconds
from torch import Tensor, from_numpy

from pipeline.cache.reader import Cache
from pipeline.config import Config
from pipeline.data import ImageFile, relocate
from pipeline.data.sampler import BatchIndices, EpochOrder, batch_indices, steps_per_epoch
from pipeline.runtime.prefetch import prefetch
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import fan_out
from pipeline.stages.refine import refine
from pipeline.training.distilling.runs import StudentSpec


def online_run(config: Config, cache: Cache, adapters: Path) -> None:
    """Train one student with the teacher in every step; the cache only gives the views."""
    settings = config.distill
    teach, student = Teacher(config, cache), Student(config, cache, adapters)
    files = ImageFile(relocate(cache.index.images, None))

    def load_images(part: BatchIndices) -> tuple[Tensor, Tensor]:
        return cache.pixels(part.records, student.backbone.image_size, files), from_numpy(part.weights)

    for epoch in range(settings.epochs):
        order = EpochOrder(len(cache), settings.seed, epoch)
        steps = range(steps_per_epoch(len(cache), settings.batch_size))
        plan = [batch_indices(order, step, settings.batch_size, 0, 1) for step in steps]
        for pixels, weights in prefetch(load_images, plan, settings.workers):
            student.update(pixels, teach(pixels), weights)


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Time the sweep and the online runs in `scratch`, and print the table."""
    config = read_config(options, scratch, f"distill.epochs={options.epochs}")
    adapters = scratch / "adapters"
    caching = seconds(lambda: cache_teacher(config, options.shards, scratch / "cache"))
    refining = seconds(lambda: refine(config, scratch / "cache", adapters))
    cache = Cache(scratch / "cache")
    everyone = range(options.students)
    passes = [everyone[n : n + options.together] for n in range(0, options.students, options.together)]
    # The passes before which an online run is timed.
    turns = {round((n + 0.5) * len(passes) / options.online) for n in range(options.online)}
    training, online = 0.0, []
    for number, members in enumerate(passes):
        if number in turns:
            online.append(seconds(lambda: online_run(config, cache, adapters)))
        specs = []
        for member in members:
            # The students differ in their learning rate, as in any sweep; the order of the data is the same.
            own = config.changed(distill={"lr": 1e-3 * (1 + member / 20)})
            specs.append(StudentSpec(own, scratch / f"run-{member}", adapters))
        training += seconds(lambda specs=specs: fan_out(specs, scratch / "cache"))  # type: ignore[misc]

    one = sum(online) / len(online)
    sweep = caching + refining + training
    counts = f"{options.students} students, {options.together} at once"
    print(f"\n{DEVICE_NAME}; {config.teacher.name}; {len(cache)} views, {options.epochs} epochs, {counts}\n")
    print("| | seconds | in online runs |\n|---|---|---|")
    for name, value in {
        "cache-teacher": caching, "refine": refining, "students from the cache": training, "the whole sweep": sweep,
        f"an online run (mean of {len(online)})": one, f"{options.students} online runs": options.students * one,
    }.items():  # fmt: skip
        print(f"| {name} | {value:.1f} | {value / one:.2f} |")
    print(f"\n{options.students} online runs / the sweep: {options.students * one / sweep:.2f}")
    # T and S are the times of the teacher's and a student's epoch, for n students and E epochs.
    print("with teacher's and student's epochs T and S: n E (T + S) / (T + n E S)")


if __name__ == "__main__":
    run_in_scratch(__doc__, {"--students": 20, "--epochs": 2, "--together": 4, "--online": 2}, compare)
