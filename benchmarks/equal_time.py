"""What a student is worth for the time: this recipe beside the authors' joint training, at equal processor time.

    python benchmarks/equal_time.py --teacher FILE --data FOLDER --out runs/equal-time [--budgets 0.25 1 4] [--seeds 0]
        [--set KEY=VALUE ...]

T is what 8 epochs of the authors' joint training take with the teacher in every step. In shares of T (--budgets), the
recipe tinyimagenet-ti-to-w96 gets as many epochs as are left when caching and refining are paid for. Joint training
with half of the patches gets as many as T has for its cheaper steps. FILE and FOLDER
are those of benchmarks/results.py. Time is processor time of this process with all its threads, so that other work on
the machine hardly matters; costs of a step are medians over interleaved rounds. The joint row is trained from the
cache, which gives it the same features as the teacher in every step.

Rows are printed as they come. If the command is repeated, it continues where it stopped. --shards N takes the first N
training shards only, to try it out.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from setting import DEVICE, PROBES, RECIPE, TRAIN, Chain, Teacher, mode, optimiser_of

from pipeline.cache.reader import Cache
from pipeline.cache.stored import Decoded
from pipeline.config import Config, load_config
from pipeline.data import ImageFile, relocate
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.runtime.buffers import moved
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine
from pipeline.storage.json_files import write_json
from pipeline.training.batch import Batch
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec

JOINT = [
    "distill.joint=true", "refine.variant=official", "refine.rank=16", "student.init=random", "distill.lr=1e-3",
    "distill.epochs=8", "distill.warmup_epochs=0.5", "distill.token_share=1", "distill.optimizer=adamw",
    "distill.projector=linear", "distill.layer_decay=1",
]  # fmt: skip
# Keys of our levers that need no cache; by those of SHARE, the student sees half of the patches in most steps.
LEVERS = ["student.init", *(f"distill.{key}" for key in ("projector", "optimizer", "lr", "layer_decay"))]
SHARE = ["distill.token_share", "distill.whole_share"]
# {row: keys that it has from the recipe}: as the authors train, and with our levers.
JOINTS = {
    "joint": [],
    "joint with our start, head, optimiser and rate": LEVERS,
    "joint with these and half of the patches": LEVERS + SHARE,
}
TASKS = {"classification": "tinyimagenet50-val", "segmentation": "camvid-test"}
FIGURES = ("linear", "knn", "miou")


def processor_seconds(run: Callable[[], object]) -> float:
    """Return the processor time of a call, in seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


class EqualTime(Chain):
    """Both sides of the comparison."""

    def timed(self, name: str, run: Callable[[], object]) -> float:
        """Do a part of the chain once, and return its processor time, also when the command is repeated."""
        file = self.out / f"{name}.seconds.json"
        if not file.exists():
            write_json(file, {"seconds": processor_seconds(run)})
        return float(json.loads(file.read_text())["seconds"])

    def costs(self, batches: int = 4, rounds: int = 5) -> dict[str, float]:
        """Return the processor time of an image in each kind of step, in seconds."""
        file = self.out / "costs.json"
        if not file.exists():
            write_json(file, self.measure(batches, rounds))
        found: dict[str, float] = json.loads(file.read_text())
        return found

    def measure(self, batches: int, rounds: int) -> dict[str, float]:
        """Measure `costs`: interleaved rounds of a few batches, with the reading of images and of features."""
        config, cache = self.config(), Cache(self.out / "cache")
        teach, size = Teacher(config, cache), config.distill.batch_size
        ours, joint = self.student(config, self.out / "refiner"), self.student(self.config(*JOINT), None)
        fewer = self.student(self.config(*JOINT, *_kept(config, SHARE)), None)
        images = ImageFile(relocate(cache.index.images, None))

        def step(new: NewStudent, optimiser: torch.optim.Optimizer, online: bool, share: float) -> None:
            if new.distiller.dropout is not None:
                new.distiller.dropout.share = share
            for number in range(batches):
                records = list(range(number * size % (len(cache) - size), number * size % (len(cache) - size) + size))
                pixels = cache.pixels(records, new.student.image_size, images)
                if online:
                    larger = new.student.image_size != cache.manifest.teacher.image_size
                    seen = cache.pixels(records, cache.manifest.teacher.image_size, images) if larger else pixels
                    features = teach(seen)
                else:
                    features = cache.features(records, DEVICE)
                weights, labels = torch.full((size,), 1 / size).to(DEVICE), torch.full((size,), -1).to(DEVICE)
                losses, _ = new.distiller(
                    Batch({new.student.image_size: moved(pixels, DEVICE)}, [Decoded(features)], weights, labels)
                )
                optimiser.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                optimiser.step()

        kinds: dict[str, tuple[NewStudent, bool, float]] = {
            "online joint": (joint, True, 1.0),
            "online joint, share": (fewer, True, ours.distiller.share),
            "ours, whole": (ours, False, 1.0),
            "ours, share": (ours, False, ours.distiller.share),
        }
        optimisers = {
            id(ours): optimiser_of(ours.distiller, config),
            **{id(new): optimiser_of(new.distiller, self.config(*JOINT)) for new in (joint, fewer)},
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(rounds + 1):
            for name, (new, online, share) in kinds.items():
                run = lambda n=new, o=online, s=share: step(n, optimisers[id(n)], o, s)  # noqa: E731
                seconds = processor_seconds(run)
                if turn:  # the first round warms up
                    times[name].append(seconds / (batches * size))
        return {name: statistics.median(values) for name, values in times.items()}

    def student(self, config: Config, refiner: Path | None) -> NewStudent:
        """Build a student with all that it is trained with."""
        sources = open_teachers(config.distill, self.out / "cache", refiner)
        return NewStudent(StudentSpec(config, self.out / "unused", refiner), sources, Accelerator(cpu=True))

    def row(self, name: str, config: Config, refiner: Path | None) -> list[float]:
        """Train a student and probe it; return linear CLS, mean patch, k-NN CLS (top-1, %) and CamVid mIoU (%)."""
        run = self.out / name
        if not (run / RUN_RESULT).exists():
            distill(config, self.out / "cache", run, refiner, mode=mode(run))
        figures: dict[str, Any] = {}
        for task, test in TASKS.items():
            file = self.out / f"{name}-{task}.json"
            if not file.exists():
                train = test.replace("-val", "-train").replace("-test", "-train")
                probed = load_config(RECIPE, PROBES)
                found = evaluate_tasks(probed, run, self.images(train), self.images(test), [task], None, None)[task]
                write_json(file, {name: value for name, value in vars(found).items() if name in FIGURES})
            figures[task] = json.loads(file.read_text())
        probes = figures["classification"]
        linear, knn = (probes[kind] for kind in ("linear", "knn"))
        firsts = [linear["cls"]["top1"], linear["mean_patch"]["top1"], knn["cls"]["top1"]]
        return [*firsts, figures["segmentation"]["miou"]]


def _kept(config: Config, keys: list[str]) -> list[str]:
    """Return keys of the configuration with their values, as --set takes them."""
    return [f"{key}={getattr(getattr(config, section), name)}" for key in keys for section, name in [key.split(".")]]


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = Chain.parser(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 1.0, 4.0], help="in shares of T")
    parser.add_argument("--joint", nargs="*", choices=list(JOINTS), default=list(JOINTS), help="rows of joint training")
    options = parser.parse_args()
    chain = EqualTime.of(options)
    config, refiner = chain.config(), options.out / "refiner"
    caching = chain.timed("caching", lambda: cache_teacher(
        config, chain.images(TRAIN), options.out / "cache", mode(options.out / "cache")
    ))  # fmt: skip
    refining = chain.timed("refining", lambda: refine(config, options.out / "cache", refiner, mode(refiner)))
    records, cost = len(Cache(options.out / "cache")), chain.costs()
    views = config.views.count
    budget = 8 * (records / views) * cost["online joint"]
    whole = config.distill.whole_share
    epoch = records * (whole * cost["ours, whole"] + (1 - whole) * cost["ours, share"])
    print(f"processor seconds: T {budget:.0f}, caching {caching:.0f}, refining {refining:.0f}, an epoch {epoch:.1f}")
    for name, seconds in cost.items():
        print(f"{name}: {1000 * seconds:.2f} ms an image")
    print("| student | share of T | epochs | linear, CLS | linear, mean patch | k-NN, CLS | CamVid mIoU |")
    print("|---|---|---|---|---|---|---|", flush=True)

    def say(name: str, share: float, epochs: int, figures: list[float]) -> None:
        print(f"| {name} | {share:.2f} | {epochs} | " + " | ".join(f"{x:.1f}" for x in figures) + " |", flush=True)

    for seed in options.seeds:
        for share in sorted(options.budgets):
            epochs = int((share * budget - caching - refining) / epoch)
            if epochs < 1:
                print(f"| ours, seed {seed} | {share:.2f} | 0: caching and refining take longer | | | | |", flush=True)
                continue
            ours = chain.config(f"distill.epochs={epochs}", f"distill.seed={seed}")
            say(f"ours, seed {seed}", share, epochs, chain.row(f"ours-{share:g}-{seed}", ours, refiner))
        for name in options.joint:
            joint = chain.config(*JOINT, *_kept(config, JOINTS[name]), f"distill.seed={seed}")
            if SHARE[0] in JOINTS[name]:
                step = whole * cost["online joint"] + (1 - whole) * cost["online joint, share"]
                joint = joint.changed(distill={"epochs": int(8 * cost["online joint"] / step)})
            row = chain.row(f"{name.replace(' ', '-')}-{seed}", joint, None)
            say(f"{name}, seed {seed}", 1.0, joint.distill.epochs, row)


if __name__ == "__main__":
    main()
