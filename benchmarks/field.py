"""The table of the field: every method of configs/sweeps/field*.yaml, at equal time, with the same search of its rate.

    python benchmarks/field.py --teacher FILE --data FOLDER --out runs/field [--seeds 0 1 2] [--methods NAME ...]
        [--epochs 8] [--shards 5] [--rates 1e-3 2e-3 4e-3] [--write docs/results.md] [--table]

FILE and FOLDER are those of benchmarks/results.py. Every method gets the processor time of `--epochs` epochs of the
method mse, in epochs of its own cost. Each learning rate of the sweep is tried with the first seed, and judged on the
last training shard; the best is trained with the other seeds. Test images are opened for the chosen runs only. The
second teacher of field-teachers is the first at 192 px, and `random-teacher` is one with random weights, the control.

Work goes method by method, and a row is printed when it is done. All figures are kept in a file of JSON lines
(--figures; with the same --epochs and --shards only). If the command is repeated, also on another machine, it skips
what the file has; in the same folder it also continues a run that was killed. --table only prints what there is.
"""

import json
import statistics
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from equal_time import processor_seconds
from kept_figures import Figures
from results import COLUMNS, changes, depth_shards, write_between
from safetensors.torch import save_file
from setting import DEVICE, PROBES, TRAIN, cell, chain_parser, line, mode, optimiser_of, shards_of, value_at

from pipeline.cache.reader import Cache
from pipeline.config import Config, load_config
from pipeline.data import ImageFile, relocate
from pipeline.data.sampler import BatchIndices
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine
from pipeline.sweeps.file import SweepFile, find_sweep
from pipeline.training.batch import BatchLoader
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.to_device import on_device

# {sweep: the caches of its methods}, {cache: its differences from the recipe}.
SWEEPS = {"field": ("one",), "field-teachers": ("one", "large")}
LARGE = ["teacher.image_size=192"]
BASE = "mse"
TASKS = {
    "classification": (TRAIN, "tinyimagenet50-val"),
    "segmentation": ("camvid-train", "camvid-test"),
}
# Of what a probe returns, this is stored.
FIGURES = ("linear", "knn", "miou", "regression")


@dataclass(frozen=True)
class Method:
    """A method: its keys and values, whether its targets are refined, its caches."""

    sets: tuple[str, ...]
    refined: bool
    caches: tuple[str, ...]


def read(sweep: str) -> SweepFile:
    """Return the content of a bundled sweep."""
    return SweepFile.model_validate(yaml.safe_load(find_sweep(sweep).read_text()))


def methods() -> dict[str, Method]:
    """Return the runs of all sweeps, and the control."""
    found: dict[str, Method] = {}
    for sweep, caches in SWEEPS.items():
        tree = read(sweep)
        assert (tree.base, tree.grid) == (read("field").base, read("field").grid), "all methods have one recipe"
        for entry in tree.runs:
            assert entry.name is not None
            found[entry.name] = Method(*changes(entry), caches)
    return found | {"random-teacher": Method((), True, ("random",))}


METHODS = methods()
RATES: tuple[float, ...] = tuple(read("field").grid["distill.lr"])


@dataclass(frozen=True)
class Field:
    """The chain from caches to figures; the fields are the options of the command line."""

    teacher: Path
    data: Path
    out: Path
    epochs: int
    shards: int
    kept: Figures
    rates: tuple[float, ...] = RATES

    def images(self, name: str) -> list[str]:
        """Return the shards of a data set; of the training images, as many as were asked for."""
        return shards_of(self.data, name, self.shards)

    def config(self, method: Method, *sets: str) -> Config:
        """Return the recipe with the method's differences and others."""
        first = [f"teacher.weights={self.teacher}", "distill.trackers=[]"]
        return load_config(read("field").base, [*first, *method.sets, *sets])

    @lru_cache  # noqa: B019 - there is one chain
    def cache(self, name: str) -> Path:
        """Return the folder of a cache, after making it, or the rest of it."""
        folder, weights = self.out / f"cache-{name}", self.teacher
        if name == "random":
            weights = self.out / "random.safetensors"
            if not weights.exists():
                torch.manual_seed(0)
                save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
        config = self.config(METHODS[BASE], f"teacher.weights={weights}", *(LARGE if name == "large" else []))
        cache_teacher(config, self.images(TRAIN), folder, mode(folder))
        return folder

    @lru_cache  # noqa: B019 - there is one chain
    def inputs(self, method: Method) -> tuple[list[Path], list[Path] | None]:
        """Return the method's caches and refiners, after making them; methods with equal keys share a refiner."""
        caches = [self.cache(name) for name in method.caches]
        if not method.refined:
            return caches, None
        config = self.config(method)
        kind = f"{config.refine.cleaner}-{config.refine.normaliser}"
        refiners = [self.out / f"refiner-{name}-{kind}" for name in method.caches]
        for cache, refiner in zip(caches, refiners, strict=True):
            refine(config, cache, refiner, mode(refiner))
        return caches, refiners

    @cached_property
    def base(self) -> "Steps":
        """Return the steps of the method that the others are compared with."""
        return Steps(self.config(METHODS[BASE]), *self.inputs(METHODS[BASE]))

    def cost(self, name: str) -> dict[str, float]:
        """Return {"ratio": of the processor time of an image to that of mse, "ms": of a step, "bytes", "records"}."""
        return self.kept.get(f"cost-{name}", lambda: self.measured_cost(METHODS[name]))

    def measured_cost(self, method: Method) -> dict[str, float]:
        """Measure `cost`."""
        steps = Steps(self.config(method), *self.inputs(method))
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(6):
            for kind, measured in zip((steps, self.base), times, strict=True):
                seconds = processor_seconds(kind.run)
                if turn:  # the first round warms up
                    measured.append(seconds / kind.images)
        own, base = (statistics.median(measured) for measured in times)
        size = {"ms": 1000 * own * steps.size, "bytes": steps.bytes, "records": len(steps.records)}
        return {"ratio": own / base, **size}

    def trained(self, name: str, rate: float, seed: int) -> Path:
        """Return the folder of a run, after training it, or the rest of it."""
        method, cost = METHODS[name], self.cost(name)
        share = cost["records"] / self.cost(BASE)["records"]
        epochs = max(1, round(self.epochs / (cost["ratio"] * share)))
        run = self.out / f"run-{key_of(name, rate, seed)}"
        if not (run / RUN_RESULT).exists():
            caches, refiners = self.inputs(method)
            sets = [f"distill.lr={rate}", f"distill.epochs={epochs}", f"distill.seed={seed}"]
            distill(self.config(method, *sets), caches, run, refiners, mode=mode(run))
        return run

    def probed(
        self, run: tuple[str, float, int], name: str, task: str, train: list[str], test: list[str]
    ) -> dict[str, Any]:
        """Return the figures by a task of a method, rate and seed; name: by which they are kept."""
        return self.kept.get(f"{key_of(*run)}-{name}", lambda: evaluated(self.trained(*run), task, train, test))

    def rate(self, name: str) -> float:
        """Return the learning rate that is best on the last training shard, with seed 0."""
        if len(self.rates) == 1:
            return self.rates[0]
        *most, last = self.images(TRAIN)
        scores = {}
        for rate in self.rates:
            found = self.probed((name, rate, 0), "dev", "classification", most, [last])
            scores[rate] = found["linear"]["mean_patch"]["top1"]
        return max(scores, key=lambda rate: scores[rate])

    def figures(self, run: tuple[str, float, int]) -> dict[str, Any]:
        """Return {task: figures} of a method, rate and seed on the test images."""
        found = {task: self.probed(run, task, task, *map(self.images, sets)) for task, sets in TASKS.items()}
        train, test = depth_shards(self.data, self.out)
        return found | {"depth": self.probed(run, "depth", "depth", [str(train)], [str(test)])}

    def row(self, name: str, seeds: list[int]) -> list[str]:
        """Return the cells of a method."""
        rate, cost = self.rate(name), self.cost(name)
        figures = [self.figures((name, rate, seed)) for seed in seeds]
        cells = [name]
        for task, *path in COLUMNS.values():
            cells.append(cell([value_at(f[task], path) for f in figures], 2 if task == "depth" else 1))
        steps = figures[0]["depth"]["steps"]
        return [*cells, f"{rate:g}", f"{steps}", f"{cost['ms']:.0f}", f"{cost['bytes'] / 1000:.0f}", str(len(seeds))]

    def done(self, name: str, seeds: list[int]) -> list[int]:
        """Return the seeds of which all figures exist, without making any."""
        if len(self.rates) > 1 and not self.kept.known.keys() >= {f"{key_of(name, r, 0)}-dev" for r in self.rates}:
            return []
        rate = self.rate(name)
        needed = {s: {f"{key_of(name, rate, s)}-{task}" for task in (*TASKS, "depth")} for s in seeds}
        return [seed for seed, keys in needed.items() if self.kept.known.keys() >= keys]

    def table(self, seeds: list[int]) -> str:
        """Return the table of the methods that are done, the best first by the mean patch."""
        head = ["method", *COLUMNS, "rate", "steps", "ms a step", "kB a record", "seeds"]
        rows = [self.row(name, done) for name in METHODS if (done := self.done(name, seeds))]
        rows.sort(key=lambda cells: -float(cells[2].split()[0]))
        return "\n".join(map(line, [head, ["---"] * len(head), *rows]))


class Steps:
    """Steps of a training on a few batches, with the reading of images and features, whose time is measured."""

    def __init__(self, config: Config, caches: list[Path], refiners: list[Path] | None, batches: int = 4) -> None:
        self.teachers = open_teachers(config.distill, caches, refiners)
        self.new = NewStudent(StudentSpec(config, Path("unused"), refiners), self.teachers, Accelerator(cpu=True))
        self.records = np.arange(len(self.teachers[0].cache)) if self.new.records is None else self.new.records
        self.size = min(config.distill.batch_size, len(self.records))
        self.images = batches * self.size
        # Only the blocks that are compared would have to be stored.
        pairs = zip(self.teachers, self.new.distiller.branches, strict=True)
        views = 1 if self.new.others is None else self.new.others.views
        self.bytes = views * sum(Cache(s.cache.place, blocks=[*b.links]).record_bytes for s, b in pairs)
        self.optimiser = optimiser_of(self.new.distiller, config)
        opened = [teacher.cache for teacher in self.teachers]
        files = ImageFile(relocate(opened[0].index.images, None))
        self.load = BatchLoader(opened, files, [self.new.student.image_size], others=self.new.others)

    def run(self) -> None:
        """Do the steps."""
        weights, indices = np.full(self.size, 1 / self.size, np.float32), []
        for start in range(0, self.images, self.size):
            records = np.take(self.records, np.arange(start, start + self.size), mode="wrap")
            indices.append([BatchIndices(records, weights)])
        for batch in on_device(self.load(indices, 1), DEVICE):
            losses, _ = self.new.distiller(batch)
            self.optimiser.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            self.optimiser.step()


def evaluated(run: Path, task: str, train: list[str], test: list[str]) -> dict[str, Any]:
    """Return the figures of a finished run by a task, and its steps."""
    found = evaluate_tasks(load_config(read("field").base, PROBES), run, train, test, [task])[task]
    steps = json.loads((run / RUN_RESULT).read_text())["steps"]
    return {key: value for key, value in vars(found).items() if key in FIGURES} | {"steps": steps}


def key_of(name: str, rate: float, seed: int) -> str:
    """Return the name of a run among folders and figures."""
    return f"{name}-{rate:g}-{seed}"


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = chain_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=8, help="of the method mse; the others get as much time")
    parser.add_argument("--shards", type=int, default=5, help="how many of the training shards, two at least")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates that are tried")
    parser.add_argument("--figures", type=Path, help="file of all figures; default: figures.jsonl in --out")
    parser.add_argument("--table", action="store_true", help="print the table of what is done, and do nothing")
    parser.add_argument("--write", type=Path, help="a document in which the table goes between the marks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"epochs": options.epochs, "shards": options.shards}
    kept = Figures(options.figures or options.out / "figures.jsonl", setting)
    chain = Field(
        options.teacher, options.data, options.out, options.epochs, options.shards, kept, tuple(options.rates)
    )
    if not options.table:
        for count in range(1, len(options.seeds) + 1):
            for name in options.methods:
                print(line(chain.row(name, options.seeds[:count])), flush=True)
    print(chain.table(options.seeds))
    if options.write:
        write_between(options.write, chain.table(options.seeds), "field")


if __name__ == "__main__":
    main()
