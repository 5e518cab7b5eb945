"""Training from the cache, compared with the teacher in every step: same student, same views, same batch.

    python benchmarks/cached_vs_online.py --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--set KEY=VALUE ...]
        [--teacher FILE] [--steps 20] [--rounds 5]

It prints the time of a step of each kind, medians over interleaved rounds, and the speed-up as a share of its limit
1 + t_teacher / t_student. Targets are refined in each step, as the recipe says.
"""

import argparse
import statistics
from pathlib import Path

from setting import DEVICE_NAME, Student, Teacher, decoded, first_batches, interleaved, make_inputs, run_in_scratch
from torch import Tensor

from pipeline.data import ImageFile, relocate
from pipeline.data.sampler import BatchIndices
from pipeline.runtime.prefetch import prefetch
from pipeline.training.batch import BatchLoader


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Make a cache and a refiner in `scratch`, time all kinds of steps and print the table."""
    config, cache, adapters = make_inputs(options, scratch)
    teach, student = Teacher(config, cache), Student(config, cache, adapters)
    size, batch, workers = student.backbone.image_size, config.distill.batch_size, config.distill.workers
    files = ImageFile(relocate(cache.index.images, None))
    load = BatchLoader([cache], files, [size])
    plan = first_batches(cache, batch, options.steps)

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

    kinds = [teacher_alone, student_alone, decoding_alone, student_with_images, online, cached]
    times = interleaved(kinds, options.rounds, len(plan))
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
    run_in_scratch(__doc__, {"--steps": 20, "--rounds": 5}, compare)
