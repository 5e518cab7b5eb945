"""Several students on one pass over a cache, compared with their computing alone and with a pass for each.

    python benchmarks/fan_out.py --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--set KEY=VALUE ...]
        [--teacher FILE] [--students 4] [--steps 10] [--rounds 5]

It prints medians over interleaved rounds, in milliseconds for a step of all students. "Computing alone" repeats one
batch that is in memory.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from setting import DEVICE_NAME, Student, add_options, decoded, make_cache, read_config, seconds
from torch import Tensor

from pipeline.data import ImageFile, relocate
from pipeline.data.sampler import EpochOrder, batch_indices
from pipeline.stages.refine import refine
from pipeline.training.batch import Batch, BatchLoader


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Make a cache and a refiner in `scratch`, time all kinds of passes and print the table."""
    config = read_config(options, scratch)
    cache = make_cache(config, options, scratch)
    refine(config, scratch / "cache", scratch / "adapters")
    students = [Student(config, cache, scratch / "adapters", seed) for seed in range(options.students)]
    size, batch, workers = students[0].backbone.image_size, config.distill.batch_size, config.distill.workers
    load = BatchLoader([cache], ImageFile(relocate(cache.index.images, None)), [size])
    order = EpochOrder(len(cache), 0, 0)
    plan = [batch_indices(order, step % max(1, len(cache) // batch), batch, 0, 1) for step in range(options.steps)]

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

    kinds: list[Callable[[], None]] = [computing_alone, one_pass, a_pass_each]
    for kind in kinds:
        kind()  # this warms up
    times: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            times[kind.__name__].append(seconds(kind) / options.steps)
    base = times["computing_alone"]
    print(f"{DEVICE_NAME}; {options.students} students\n\n| | ms a step | of computing alone |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"| {name.replace('_', ' ')} | {1000 * statistics.median(values):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
