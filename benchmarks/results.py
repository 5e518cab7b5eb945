"""The table of methods in docs/results.md: every (refiner, objective, seed) of a list, from one cache, with all probes.

    python benchmarks/results.py --teacher FILE --data FOLDER --out runs/results [--seeds 0 1 2] [--methods NAME ...]
        [--write docs/results.md] [--dev]

FILE holds the augreg weights of vit_tiny_patch16_224; FOLDER holds tinyimagenet50-{train,val}-*.tar,
camvid-{train,test}-*.tar and rgbd-sample-*.tar. The last third of the latter's frames tests the depth probe; they are
so few that this is only a smoke test. If the command is repeated, it skips what is done and continues where it stopped;
several may run at once with different methods. --dev is for choosing methods: probes are tested on the last training
shard, a fifth of the images, and the val and test shards are not opened. A new method is a line in
configs/sweeps/tinyimagenet-methods.yaml, an ablation in tinyimagenet-ablations.yaml. Missing figures are left blank.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from setting import PROBES, cell, chain_parser, line, mode, value_at
from webdataset import TarWriter, WebDataset

from pipeline.config import load_config
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.refine import refine
from pipeline.sweeps.file import REFINER, RunEntry, SweepFile, find_sweep

# {column: (task, path in its result ...)}
COLUMNS = {
    "linear, CLS": ("classification", "linear", "cls", "top1"),
    "linear, mean patch": ("classification", "linear", "mean_patch", "top1"),
    "k-NN, CLS": ("classification", "knn", "cls", "top1"),
    "CamVid mIoU": ("segmentation", "miou"),
    "depth RMSE, m": ("depth", "regression", "rmse"),
}


@dataclass(frozen=True)
class Method:
    """A method: its differences from the recipe.

    refined: whether a refiner is fitted first; main: whether it is trained with every seed, or only with the first.
    """

    sets: tuple[str, ...]
    refined: bool
    main: bool


def changes(entry: RunEntry) -> tuple[tuple[str, ...], bool]:
    """Return the keys and values that a run of a sweep changes, and whether its targets are refined."""
    sets = tuple(f"{key}={json.dumps(value)}" for key, value in entry.set.items() if key != REFINER)
    return sets, entry.set.get(REFINER) != "none" and not entry.set.get("distill.joint")


def methods(sweep: str, main: bool) -> dict[str, Method]:
    """Return the runs of a bundled sweep, without its seeds."""
    entries = SweepFile.model_validate(yaml.safe_load(find_sweep(sweep).read_text())).runs
    found = {}
    for entry in entries:
        assert entry.name is not None
        found[entry.name] = Method(*changes(entry), main)
    return found


RECIPE = SweepFile.model_validate(yaml.safe_load(find_sweep("tinyimagenet-methods").read_text())).base
METHODS = methods("tinyimagenet-methods", True) | methods("tinyimagenet-ablations", False)


def depth_shards(data: Path, out: Path) -> tuple[Path, Path]:
    """Split the frames with depth into a shard to train on and one to test on, and return their paths."""
    made = out / "depth-train.tar", out / "depth-test.tar"
    if not all(path.exists() for path in made):
        samples = list(WebDataset(sorted(map(str, data.glob("rgbd-sample-*.tar"))), shardshuffle=False))
        cut = len(samples) * 2 // 3
        for path, part in zip(made, (samples[:cut], samples[cut:]), strict=True):
            whole = path.with_suffix(f".{os.getpid()}")
            with TarWriter(str(whole), encoder=False) as tar:
                for sample in part:
                    tar.write({k: v for k, v in sample.items() if k != "__url__" and k != "__local_path__"})
            whole.rename(path)
    return made


@dataclass(frozen=True)
class Results:
    """The chain from a cache to the figures; teacher, data, out: the paths of the command line."""

    teacher: Path
    data: Path
    out: Path
    dev: bool

    @property
    def cache(self) -> Path:
        """Return the folder of the cache."""
        return self.out / "cache"

    def shards(self, name: str) -> str:
        """Return the pattern of a data set's shards."""
        return str(self.data / f"{name}-*.tar")

    def make_cache(self) -> None:
        """Cache the training images, or continue their cache."""
        config = load_config(RECIPE, [f"teacher.weights={self.teacher}"])
        cache_teacher(config, self.shards("tinyimagenet50-train"), self.cache, mode(self.cache))

    def run(self, name: str, seed: int) -> Path:
        """Return the folder of a method's student."""
        return self.out / f"run-{name}-{seed}"

    def adapters(self, name: str, seed: int) -> Path:
        """Return the folder of a method's refiner."""
        return self.out / f"refiner-{name}-{seed}"

    def train(self, name: str, seed: int, depth: bool) -> None:
        """Make the refiner, the student and its probes, unless they exist already."""
        method = METHODS[name]
        config = load_config(RECIPE, [f"distill.seed={seed}", f"refine.seed={seed}", *method.sets])
        run, adapters = self.run(name, seed), None
        if not (run / RUN_RESULT).exists():
            if method.refined:
                adapters = self.adapters(name, seed)
                refine(config, self.cache, adapters, mode(adapters))
            distill(config, self.cache, run, adapters, mode=mode(run))
        self.probe(run, depth)

    def probe(self, run: Path, depth: bool) -> None:
        """Evaluate every probe that the run has no figures for yet; the probe of depth only if `depth`."""
        config, found = load_config(RECIPE, PROBES), self.figures(run)
        if "classification" not in found:
            if self.dev:
                *most, last = sorted(str(p) for p in self.data.glob("tinyimagenet50-train-*.tar"))
                evaluate(config, run, most, last)
            else:
                evaluate(config, run, self.shards("tinyimagenet50-train"), self.shards("tinyimagenet50-val"))
        if "segmentation" not in found and not self.dev:
            evaluate(config, run, self.shards("camvid-train"), self.shards("camvid-test"), "segmentation")

        if depth and "depth" not in found and not self.dev:
            train, test = depth_shards(self.data, self.out)
            evaluate(config, run, str(train), str(test), "depth")

    def figures(self, run: Path) -> dict[str, Any]:
        """Return {task: stored result}."""
        results = [json.loads(f.read_text()) for f in sorted(run.glob("evaluate-*.json"))]
        return {r.get("task", "classification"): r for r in results}

    def line(self, name: str, seeds: list[int]) -> str | None:
        """Return the method's row over the seeds that are trained and probed, or None if there are none."""
        runs = [self.run(name, seed) for seed in seeds if (self.run(name, seed) / RUN_RESULT).exists()]
        figures = [found for run in runs if "classification" in (found := self.figures(run))]
        if not figures:
            return None
        cells = [name]
        for task, *path in COLUMNS.values():
            values = [value_at(f[task], path) for f in figures if task in f]
            cells.append(cell(values, 2 if task == "depth" else 1))
        files = [f for seed in seeds if (f := self.adapters(name, seed) / "metrics.json").exists()]
        blocks = json.loads(files[0].read_text())["blocks"].values() if files else []
        cells.append(" / ".join(f"{b['after']['artifact_percent']:.2f}" for b in blocks))
        cells.append(" / ".join(f"{b['clean_drift_percent']:.1f}" for b in blocks))
        return line([*cells, str(len(figures))])

    def table(self, seeds: list[int]) -> str:
        """Return the table: main rows, then ablations."""
        head = ["targets", *COLUMNS, "artifacts left, %", "drift of clean tokens, %", "seeds"]
        rows = [row for name in METHODS if (row := self.line(name, seeds)) is not None]
        return "\n".join([line(head), line(["---"] * len(head)), *rows])


def write_between(file: Path, text: str, mark: str = "results") -> None:
    """Replace the text between the marks in a document."""
    first, last = (f"<!-- {mark}: {side} -->" for side in ("begin", "end"))
    before, start, rest = file.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise SystemExit(f"{file} has no lines {first} and {last}")
    file.write_text(f"{before}{first}\n{text}\n{last}{after}")


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = chain_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--write", type=Path, help="a document in which the table goes between the marks")
    parser.add_argument("--dev", action="store_true", help="use the training images only, to choose methods")
    options = parser.parse_args()
    chain = Results(options.teacher, options.data, options.out, options.dev)
    chain.make_cache()
    for number, seed in enumerate(options.seeds):
        for name in options.methods:
            if METHODS[name].main or not number:
                chain.train(name, seed, depth=METHODS[name].main)
    print(chain.table(options.seeds))
    if options.write:
        write_between(options.write, chain.table(options.seeds))


if __name__ == "__main__":
    main()
