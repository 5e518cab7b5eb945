"""Training from the cache, compared with the teacher in every step: same student, same views, same batch.

    python benchmarks/cached_vs_online.py --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--set KEY=VALUE ...]
        [--teacher FILE] [--steps 20] [--rounds 5]

It prints the time of a step of each kind, medians over interleaved rounds, and the speed-up as a share of its limit
1 + t_teacher / t_student. Targets are refined in each step, as the recipe says.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from setting import DEVICE_NAME, Student, Teacher, add_options, decoded, make_cache, read_config, seconds
from torch import Tensor

from pipeline.data import ImageFile, relocate
from pipeline.data.sampler import BatchIndices, EpochOrder, batch_indices
from pipeline.runtime.prefetch import prefetch
from pipeline.stages.refine import refine
from pipeline.training.batch import BatchLoader


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Make a cache and a refiner in `scratch`, time all kinds of steps and print the table."""
    config = read_config(options, scratch)
    cache = make_cache(config, options, scratch)
    refine(config, scratch / "cache", scratch / "adapters")
    teach, student = Teacher(config, cache), Student(config, cache, scratch / "adapters")
    size, batch, workers = student.backbone.image_size, config.distill.batch_size, config.distill.workers
    order = EpochOrder(len(cache), 0, 0)
    files = ImageFile(relocate(cache.index.images, None))
    load = BatchLoader([cache], files, [size])
    plan = [batch_indices(order, step % max(1, len(cache) // batch), batch, 0, 1) for step in range(options.steps)]

    def load_images(part: BatchIndices) -> Tensor:
        return cache.pixels(part.records, size, files)

    (fixed,) = load([plan[:1]], 1)
    fixed_pixels, fixed_features = fixed.pixels[size], decoded(cache, fixed)

    def teacher_alone() -> None:
        for _ in plan:
            teach(fixed_pixels)

    def student_alone() -> None:
        for _ in plan:
            student.update(fixed_pixels, fixed_features)

    def decoding_alone() -> None:
        for _ in plan:
            decoded(cache, fixed)

    def student_with_images() -> None:
        for pixels in prefetch(load_images, plan, workers):
            student.update(pixels, fixed_features)

    def online() -> None:
        for pixels in prefetch(load_images, plan, workers):
            student.update(pixels, teach(pixels))

    def cached() -> None:
        for loaded in load([[part] for part in plan], workers):
            student.update(loaded.pixels[size], decoded(cache, loaded))

    kinds: list[Callable[[], None]] = [
        teacher_alone, student_alone, decoding_alone, student_with_images, online, cached,
    ]  # fmt: skip
    for kind in kinds:
        kind()  # this warms up
    times: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            times[kind.__name__].append(seconds(kind) / len(plan))
    median = {name: statistics.median(values) for name, values in times.items()}
    limit = 1 + median["teacher_alone"] / median["student_alone"]
    speedup = median["online"] / median["cached"]
    print(f"{DEVICE_NAME}; batch {batch}; codec {cache.manifest.codec}; medians of {options.rounds} rounds")
    for name, value in median.items():
        print(f"{name}: {1000 * value:.1f} ms a step")
    print(f"online / cached: {speedup:.2f}; limit 1 + teacher / student: {limit:.2f}; reached {speedup / limit:.2f}")
    print(f"decoding / the student's step: {median['decoding_alone'] / median['student_alone']:.3f}")
    share_of_images = median["cached"] / median["student_with_images"]
    print(f"cached / the same student on the same images, without reading targets: {share_of_images:.3f}")


if __name__ == "__main__":
    main()
