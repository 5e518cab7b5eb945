"""The real chain with controls: one cache, several refiners, several seeds, one table.

    python benchmarks/quality.py --teacher FILE --data FOLDER --out runs/quality [--seeds 0 1]

FILE: augreg vit_tiny_patch16_224 weights; FOLDER: holds tinyimagenet50-{train,val}-*.tar. Repeating the command goes on
where it stopped. Nothing is selected on the val shards.
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline.cache_teacher import cache_teacher
from pipeline.config import load_config
from pipeline.distill import distill
from pipeline.evaluate import evaluate
from pipeline.outputs import Mode
from pipeline.probes.classification import Classification
from pipeline.refine import refine

RECIPE = "tinyimagenet-ti-to-w96"
# name: (cleaner, normaliser); None is the FitNet baseline without a refiner
REFINERS: dict[str, tuple[str, str] | None] = {
    "raw (FitNet)": None,
    "raw + standardize": ("none", "standardize"),
    "clip + standardize": ("clip", "standardize"),
    "adapter": ("adapter", "none"),
    "adapter + standardize (default)": ("adapter", "standardize"),
}


def mode(path: Path) -> Mode:
    return "resume" if path.exists() else "new"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--refiners", nargs="+", choices=REFINERS, default=list(REFINERS))
    options = parser.parse_args()
    train, val = (str(options.data / f"tinyimagenet50-{split}-*.tar") for split in ("train", "val"))

    config = load_config(RECIPE, [f"teacher.weights={options.teacher}"])
    cache = options.out / "cache"
    cache_teacher(config, train, cache, mode(cache))
    table: dict[str, list[Classification]] = {name: [] for name in options.refiners}
    for seed in options.seeds:
        for name in options.refiners:
            refiner = REFINERS[name]
            slug = "-".join(refiner) if refiner else "raw"
            sets = [f"distill.seed={seed}", f"refine.seed={seed}"]
            adapters = None
            if refiner:
                sets += [f"refine.cleaner={refiner[0]}", f"refine.normaliser={refiner[1]}"]
                adapters = options.out / f"refiner-{slug}-{seed}"
            config = load_config(RECIPE, sets)
            if adapters:
                refine(config, cache, adapters, mode(adapters))
            run = options.out / f"run-{slug}-{seed}"
            distill(config, cache, run, adapters, mode=mode(run))
            table[name].append(evaluate(config, run, train, val))
            print_table(table, options.seeds)


def print_table(table: dict[str, list[Classification]], seeds: list[int]) -> None:
    columns = [(probe, tokens) for probe in ("linear", "knn") for tokens in ("cls", "mean_patch")]
    print(f"\n| targets (seeds {', '.join(map(str, seeds))}) | " + " | ".join(f"{p}, {t}" for p, t in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, results in table.items():
        cells = []
        for probe, tokens in columns:
            values = [getattr(r, probe)[tokens]["top1"] for r in results]
            cells.append(f"{np.mean(values):.1f} ({' / '.join(f'{v:.1f}' for v in values)})" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
