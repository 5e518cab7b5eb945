"""Training from the cache against running the teacher in every step: same student, same views, same batch.

    python benchmarks/cached_vs_online.py --cache CACHE --teacher FILE [--adapters ADAPTERS] [--steps 20]

CACHE: made with the recipe; FILE: the teacher's weights. Prints the time of a step of each kind, medians over
interleaved rounds, and the speed-up as a share of its limit 1 + t_teacher / t_student.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.config import TeacherConfig, load_config
from pipeline.distiller import Distiller, Head, Lesson, Shown, Targets
from pipeline.models import load_teacher, new_student
from pipeline.prefetch import prefetch
from pipeline.readplan import EpochOrder, Share, share
from pipeline.refine import load_refiner
from pipeline.shards import ImageFile, relocate
from pipeline.train import BatchLoader
from pipeline.views import normalise
from singer.backbones import block_outputs, depth
from singer.matching import match_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="tinyimagenet-ti-to-w96")
    options = parser.parse_args()

    config = load_config(options.recipe)
    cache = Cache(options.cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = cache.manifest.teacher
    teacher_config = TeacherConfig(
        name=described.architecture, weights=options.teacher, image_size=described.image_size
    )
    teacher = load_teacher(teacher_config)
    teacher.model.to(device)
    student = new_student(config.student, described.image_size)
    targets = Targets(cache, load_refiner(options.adapters, cache) if options.adapters else None, student, device)
    matching = match_blocks(cache.blocks, described.depth, depth(student.model))
    model = Distiller(student, [Head(student, matching, targets, config.distill.objectives)]).to(device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = config.distill.batch_size
    order = EpochOrder(len(cache), 0, 0)
    files = ImageFile(relocate(cache.index.images, None))
    load = BatchLoader([cache], files, [student.image_size])
    plan = [share(order, step % (len(cache) // batch), batch, 0, 1) for step in range(options.steps)]

    weights, no_labels = torch.full((batch,), 1 / batch, device=device), torch.full((batch,), -1, device=device)

    def update(pixels: Tensor, features: dict[int, Tensor]) -> None:
        images = normalise(pixels, student.mean, student.std, device)
        losses = model(Lesson(images, [Shown(features)], weights, no_labels))
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()

    @torch.no_grad()
    def teach(pixels: Tensor) -> dict[int, Tensor]:
        images = normalise(pixels, teacher.mean, teacher.std, device)
        return {b: x.float() for b, x in block_outputs(teacher.model, images, cache.blocks).items()}

    def load_images(part: Share) -> Tensor:
        return cache.pixels(part.records, student.image_size, files)

    fixed = load(plan[0])
    fixed_pixels, fixed_features = fixed.pixels[student.image_size], targets.features(fixed.encoded[0])

    def teacher_alone() -> None:
        for _ in plan:
            teach(fixed_pixels)

    def student_alone() -> None:
        for _ in plan:
            update(fixed_pixels, fixed_features)

    def decoding_alone() -> None:
        for _ in plan:
            cache.decode(fixed.encoded[0], device)

    def student_with_images() -> None:
        for pixels in prefetch(load_images, plan, config.distill.workers):
            update(pixels, fixed_features)

    def online() -> None:
        for pixels in prefetch(load_images, plan, config.distill.workers):
            update(pixels, teach(pixels))

    def cached() -> None:
        for loaded in prefetch(load, plan, config.distill.workers):
            update(loaded.pixels[student.image_size], targets.features(loaded.encoded[0]))

    kinds: list[Callable[[], None]] = [
        teacher_alone,
        student_alone,
        decoding_alone,
        student_with_images,
        online,
        cached,
    ]
    times: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    for round_ in range(options.rounds + 1):
        for kind in kinds:
            start = time.perf_counter()
            kind()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first warms up
                times[kind.__name__].append((time.perf_counter() - start) / len(plan))
    median = {name: statistics.median(values) for name, values in times.items()}
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    limit = 1 + median["teacher_alone"] / median["student_alone"]
    speedup = median["online"] / median["cached"]
    print(f"{device_name}; batch {batch}; codec {cache.manifest.codec}; medians of {options.rounds} rounds")
    for name, value in median.items():
        print(f"{name}: {1000 * value:.1f} ms a step")
    print(f"online / cached: {speedup:.2f}; limit 1 + teacher / student: {limit:.2f}; reached {speedup / limit:.2f}")
    print(f"decoding / the student's step: {median['decoding_alone'] / median['student_alone']:.3f}")
    share_of_images = median["cached"] / median["student_with_images"]
    print(f"cached / the same student on the same images, no targets read: {share_of_images:.3f}")


if __name__ == "__main__":
    main()
