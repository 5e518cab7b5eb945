"""Several students on one pass over a cache, compared with their computing alone and with a pass for each.

    python benchmarks/fan_out.py --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--set KEY=VALUE ...]
        [--teacher FILE] [--students 4] [--steps 10] [--rounds 5]

It prints medians over interleaved rounds, in milliseconds for a step of all students. "Computing alone" repeats one
batch that is in memory.
"""

import argparse
import statistics
from pathlib import Path

from setting import DEVICE_NAME, Student, decoded, first_batches, interleaved, make_inputs, run_in_scratch
from torch import Tensor

from pipeline.data import ImageFile, relocate
from pipeline.training.batch import Batch, BatchLoader


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Make a cache and a refiner in `scratch`, time all kinds of passes and print the table."""
    config, cache, adapters = make_inputs(options, scratch)
    students = [Student(config, cache, adapters, seed) for seed in range(options.students)]
    size, batch, workers = students[0].backbone.image_size, config.distill.batch_size, config.distill.workers
    load = BatchLoader([cache], ImageFile(relocate(cache.index.images, None)), [size])
    plan = first_batches(cache, batch, options.steps)

    def decode(loaded: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        return loaded.pixels[size], decoded(cache, loaded)

    (first,) = load([plan[:1]], 1)
    in_memory = decode(first)

    def computing_alone() -> None:
        for _ in plan:
            for student in students:
                student.update(*in_memory)

    def one_pass() -> None:
        for loaded in load([[part] for part in plan], workers):
            given = decode(loaded)
            for student in students:
                student.update(*given)

    def a_pass_each() -> None:
        for student in students:
            for loaded in load([[part] for part in plan], workers):
                student.update(*decode(loaded))

    times = interleaved([computing_alone, one_pass, a_pass_each], options.rounds, len(plan))
    base = times["computing_alone"]
    print(f"{DEVICE_NAME}; {options.students} students\n\n| | ms a step | of computing alone |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"| {name.replace('_', ' ')} | {1000 * statistics.median(values):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    run_in_scratch(__doc__, {"--students": 4, "--steps": 10, "--rounds": 5}, compare)
