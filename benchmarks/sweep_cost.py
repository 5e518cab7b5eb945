"""A sweep from one cache against as many runs that run the teacher in every step: the whole of both, and the formula.

    python benchmarks/sweep_cost.py --teacher FILE --shards PATTERN [--recipe tinyimagenet-ti-to-w96] [--students 20]
        [--epochs 2] [--together 4] [--online 2] [--folder FOLDER]

FILE: the teacher's weights. The sweep is everything that a user waits for: `cache-teacher`, `refine`, and the students,
`together` at a time on one pass. An online run is the same student on the same views and batches, with the teacher in
every step; `online` of them are timed and their mean is taken `students` times. Times lie in one process, one after
the other; the online runs are spread over the sweep, so that a slow minute meets both.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache_teacher import cache_teacher
from pipeline.config import Config, load_config
from pipeline.distill import Job, fan_out
from pipeline.distiller import Distiller, Head, Lesson, Shown, Targets
from pipeline.models import load_teacher, new_student
from pipeline.prefetch import prefetch
from pipeline.readplan import EpochOrder, Share, share, steps_per_epoch
from pipeline.refine import load_refiner, refine
from pipeline.shards import ImageFile, relocate
from pipeline.views import normalise
from singer.backbones import block_outputs, depth
from singer.matching import match_blocks


def online_run(config: Config, cache: Cache, adapters: Path) -> None:
    """Train one student with the teacher in every step; the cache only tells which views there are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, described = config.distill, cache.manifest.teacher
    teacher = load_teacher(config.teacher)
    teacher.model.to(device)
    student = new_student(config.student, described.image_size)
    targets = Targets(cache, load_refiner(adapters, cache), student, device)
    matching = match_blocks(cache.blocks, described.depth, depth(student.model))
    model = Distiller(student, [Head(student, matching, targets, settings.objectives)]).to(device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr)
    files = ImageFile(relocate(cache.index.images, None))
    labels = torch.full((settings.batch_size,), -1, device=device)

    def load_images(part: Share) -> tuple[Tensor, Tensor]:
        return cache.pixels(part.records, student.image_size, files), torch.from_numpy(part.weights)

    for epoch in range(settings.epochs):
        order = EpochOrder(len(cache), settings.seed, epoch)
        plan = [
            share(order, n, settings.batch_size, 0, 1) for n in range(steps_per_epoch(len(cache), settings.batch_size))
        ]
        for pixels, weights in prefetch(load_images, plan, settings.workers):
            with torch.no_grad():
                images = normalise(pixels, teacher.mean, teacher.std, device)
                features = {b: x.float() for b, x in block_outputs(teacher.model, images, cache.blocks).items()}
            images = normalise(pixels, student.mean, student.std, device)
            losses = model(Lesson(images, [Shown(features)], weights.to(device), labels[: len(weights)]))
            optimiser.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--recipe", default="tinyimagenet-ti-to-w96")
    parser.add_argument("--students", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--online", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where cache and runs lie for the time; default: the system's")
    options = parser.parse_args()
    sets = [f"teacher.weights={options.teacher}", f"distill.epochs={options.epochs}", "distill.trackers=[]"]
    config = load_config(options.recipe, sets)

    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        caching = seconds(lambda: cache_teacher(config, options.shards, root / "cache"))
        refining = seconds(lambda: refine(config, root / "cache", root / "adapters"))
        cache = Cache(root / "cache")
        passes = [
            range(n, min(n + options.together, options.students)) for n in range(0, options.students, options.together)
        ]
        # An online run after every so many passes.
        turns = {round((n + 0.5) * len(passes) / options.online) for n in range(options.online)}
        training, online = 0.0, []
        for number, members in enumerate(passes):
            if number in turns:
                online.append(seconds(lambda: online_run(config, cache, root / "adapters")))
            # They differ in how fast they learn, as in any sweep; the order of the data is one.
            jobs = [
                Job(
                    load_config(options.recipe, [*sets, f"distill.lr={1e-3 * (1 + n / 20)}"]),
                    root / f"run-{n}",
                    root / "adapters",
                )
                for n in members
            ]
            training += seconds(lambda jobs=jobs: fan_out(jobs, root / "cache"))  # type: ignore[misc]
        records = len(cache)

    one = sum(online) / len(online)
    sweep = caching + refining + training
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    counts = f"{options.students} students, {options.together} at once"
    print(f"\n{device}; {records} views, {options.epochs} epochs, {counts}\n")
    print("| | seconds | in online runs |\n|---|---|---|")
    for name, value in {
        "cache-teacher": caching, "refine": refining, "students from the cache": training, "the whole sweep": sweep,
        f"an online run (mean of {len(online)})": one, f"{options.students} online runs": options.students * one,
    }.items():  # fmt: skip
        print(f"| {name} | {value:.1f} | {value / one:.2f} |")
    print(f"\n{options.students} online runs / the sweep: {options.students * one / sweep:.2f}")
    print("limit for many epochs: 1 + t_teacher / t_student")


if __name__ == "__main__":
    main()
