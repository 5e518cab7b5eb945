"""What benchmarks share: options, a teacher, a cache, a student, its steps, its figures, rows of tables."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.cache.reader import Cache
from pipeline.cache.stored import Decoded, Encoded
from pipeline.config import Config, load_config
from pipeline.data.sampler import BatchIndices, EpochOrder, batch_indices
from pipeline.data.views import normalise
from pipeline.outputs.folder import Mode
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.runtime.buffers import moved
from pipeline.runtime.devices import with_precision
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine
from pipeline.storage.json_files import write_json
from pipeline.students.new import new_student
from pipeline.teachers.teacher import load_teacher
from pipeline.training.batch import Batch
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.optimisers import new_optimiser
from pipeline.training.refining.stored_refiners import load_refiner
from singer.backbones import block_outputs, depth
from singer.matching import match_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
RECIPE = "tinyimagenet-ti-to-w96"
TRAIN = "tinyimagenet50-train"
# How students are probed. The last class of CamVid is void.
PROBES = ["evaluate.tokens=block", "evaluate.seg_classes=11", "evaluate.seg_ignore=11"]
# The figures by which students are compared.
JUDGED = [(probe, tokens) for probe in ("linear", "knn") for tokens in ("cls", "mean_patch")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that these benchmarks share."""
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe, as in singer")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--teacher", type=Path, help="its weights; default: random weights, which are as fast")
    parser.add_argument("--folder", type=Path, help="folder for temporary caches and runs; default: the system's")


def run_in_scratch(
    description: str | None, numbers: Mapping[str, int], run: Callable[[argparse.Namespace, Path], None]
) -> None:
    """Parse the options and run a benchmark in a temporary folder. numbers: its own options, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    for option, default in numbers.items():
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(options, Path(folder))


def chain_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks on the chain with a real teacher share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="its weights")
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of caches, runs and figures")
    return parser


def mode(path: Path) -> Mode:
    """Return the mode resume for a folder that exists, and new for others."""
    return "resume" if path.exists() else "new"


def shards_of(data: Path, name: str, most: int) -> list[str]:
    """Return the shards of a data set in a folder; of the training images, at most so many."""
    found = sorted(map(str, data.glob(f"{name}-*.tar")))
    return found[:most] if name == TRAIN else found


def judged(
    config: Config, probes: Config, run: Path, cache: Path, refiner: Path, train: list[str], test: list[str]
) -> list[float]:
    """Train a student and probe it, unless that is done; return JUDGED (top-1, %)."""
    file, task = run.parent / f"{run.name}.json", "classification"
    if not file.exists():
        if not (run / RUN_RESULT).exists():
            distill(config, cache, run, refiner, mode=mode(run))
        found = vars(evaluate_tasks(probes, run, train, test, [task])[task])
        write_json(file, [value_at(found, [*path, "top1"]) for path in JUDGED])
    figures: list[float] = json.loads(file.read_text())
    return figures


@dataclass(frozen=True)
class Chain:
    """The chain of the recipe tinyimagenet-ti-to-w96; the fields are options of the command line."""

    teacher: Path
    data: Path
    out: Path
    shards: int
    sets: list[str]

    @staticmethod
    def parser(description: str | None) -> argparse.ArgumentParser:
        """Return a parser with the options of the fields, and --seeds."""
        parser = chain_parser(description)
        parser.add_argument("--seeds", type=int, nargs="+", default=[0])
        parser.add_argument("--shards", type=int, default=5, help="how many of the training shards, two at least")
        parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe, as in singer")
        return parser

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Return the chain of some options, after making its folder."""
        options.out.mkdir(parents=True, exist_ok=True)
        return cls(options.teacher, options.data, options.out, options.shards, options.set)

    def config(self, *sets: str) -> Config:
        """Return the recipe with changes."""
        first = [f"teacher.weights={self.teacher}", "distill.trackers=[]"]
        return load_config(RECIPE, [*first, *self.sets, *sets])

    def images(self, name: str) -> list[str]:
        """Return the shards of a data set."""
        return shards_of(self.data, name, self.shards)

    def judged(self, name: str, config: Config, cache: Path, refiner: Path) -> list[float]:
        """Train a student, unless that is done; return JUDGED on the last training shard, learnt from the others."""
        *most, last = self.images(TRAIN)
        probes = load_config(RECIPE, PROBES)
        return judged(config, probes, self.out / name, cache, refiner, most, [last])


def line(cells: Iterable[str]) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(cells) + " |"


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean of several seeds, with its standard deviation if there are two or more; nothing for none."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else ""


def value_at(tree: Any, path: Sequence[str]) -> float:
    """Return the number at a path of keys."""
    for key in path:
        tree = tree[key]
    return float(tree)


def read_config(options: argparse.Namespace, scratch: Path, *sets: str) -> Config:
    """Return the recipe with the teacher's weights, which are made in `scratch` if none are given."""
    config = load_config(options.recipe, options.set)
    weights = options.teacher
    if weights is None:
        name, weights = config.teacher.name, scratch / "teacher.safetensors"
        # The name without its tag is a model without pretrained weights.
        model = timm.create_model(name.partition(".")[0])
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, weights)
    sets = (*sets, f"teacher.weights={weights}", "distill.trackers=[]")
    return with_precision(load_config(options.recipe, [*options.set, *sets]))


def make_inputs(options: argparse.Namespace, scratch: Path) -> tuple[Config, Cache, Path]:
    """Return the recipe, a cache of the shards and the folder of its refiner, after making both in `scratch`."""
    config, adapters = read_config(options, scratch), scratch / "adapters"
    cache_teacher(config, options.shards, scratch / "cache")
    refine(config, scratch / "cache", adapters)
    return config, Cache(scratch / "cache"), adapters


def first_batches(cache: Cache, size: int, steps: int) -> list[BatchIndices]:
    """Return the batches of so many steps, which begin the same epoch again if it is over."""
    order = EpochOrder(len(cache), 0, 0)
    return [batch_indices(order, step % max(1, len(cache) // size), size, 0, 1) for step in range(steps)]


def seconds(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes, with the work that it leaves to the device."""
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(kinds: Sequence[Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return {name of a function: seconds of a step in each round}; a call of each does `steps` steps.

    The first call of each warms up, and is not counted.
    """
    for kind in kinds:
        kind()
    times: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            times[kind.__name__].append(seconds(kind) / steps)
    return times


def decoded(cache: Cache, batch: Batch) -> dict[int, Tensor]:
    """Return {block: features (n, N, d)} of a batch of one cache, on the device."""
    (stored,) = batch.features
    assert isinstance(stored, Encoded)
    return cache.decode(stored, DEVICE)


class Teacher:
    """The teacher in every step: a function from pixels to features of the cached blocks."""

    def __init__(self, config: Config, cache: Cache) -> None:
        self.backbone, self.blocks = load_teacher(config.teacher), cache.blocks
        self.autocast = partial(torch.autocast, DEVICE.type, torch.bfloat16, config.cache.precision == "bf16")
        self.backbone.model.to(DEVICE)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[int, Tensor]:
        """Return {block: features (n, N, d)} of pixels (n, side, side, 3) uint8."""
        images = normalise(moved(pixels, DEVICE), self.backbone.mean, self.backbone.std)
        with self.autocast():
            outputs = block_outputs(self.backbone.model, images, self.blocks)
        return {b: x.float() for b, x in outputs.items()}


def optimiser_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimiser of the recipe for a student and what is trained with it, at a low constant rate."""
    optimiser = new_optimiser(model, config.distill, DEVICE)
    for group in optimiser.param_groups:
        group["lr"] = 1e-5
    return optimiser


class Student:
    """A student of the recipe, with its optimiser but without a schedule."""

    def __init__(self, config: Config, cache: Cache, adapters: Path | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.autocast = partial(torch.autocast, DEVICE.type, torch.bfloat16, config.distill.precision == "bf16")
        described = cache.manifest.teacher
        self.backbone = new_student(config.student, described.image_size)
        refiner = load_refiner(adapters, cache) if adapters is not None else None
        self.targets = Targets(cache, refiner, self.backbone, DEVICE)
        matching = match_blocks(cache.blocks, described.depth, depth(self.backbone.model))
        head = TeacherBranch(
            self.backbone, matching, self.targets, Teaching(config.distill.objectives, config.distill.projector)
        )
        self.model = Distiller(self.backbone, [head]).to(DEVICE)
        self.optimiser = optimiser_of(self.model, config)

    def update(self, pixels: Tensor, features: dict[int, Tensor], weights: Tensor | None = None) -> None:
        """Do one step.

        pixels: (n, side, side, 3) uint8; features: {block: (n, N, d)}; weights: (n,), or None for equal weights.
        """
        count = len(pixels)
        given = torch.full((count,), 1 / count) if weights is None else weights
        seen, labels = {self.backbone.image_size: moved(pixels, DEVICE)}, torch.full((count,), -1, device=DEVICE)
        batch = Batch(seen, [Decoded(features)], given.to(DEVICE), labels)
        with self.autocast():
            losses, _ = self.model(batch)
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimiser.step()
