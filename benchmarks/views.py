"""How many stored views a student needs: V views of each image against the same number of steps, on training images.

    python benchmarks/views.py --teacher FILE --data FOLDER --out runs/views [--views 1 2 4 8] [--passes 16 48]
        [--set KEY=VALUE ...]

The student of the recipe tinyimagenet-ti-to-w96 sees every image --passes times: in so many epochs of the centre view
("centre"), or in passes / V epochs of V random resized crops. The crops come from one cache, to which views are
appended. Only training shards are used: all but the last train the student and its probes, the last tests them. FILE
and FOLDER are those of benchmarks/results.py. Rows are printed as they come. If the command is repeated, it continues
where it stopped.
"""

import argparse
import json
from pathlib import Path

from equal_time import RECIPE, Chain
from results import PROBES, mode

from pipeline.cache.reader import Cache
from pipeline.config import load_config
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine
from pipeline.storage.json_files import write_json
from pipeline.training.run_directory import RUN

CROPS = ["views.kind=random-resized-crop", "views.scale=[0.3,1]", "views.flip=0.5"]


def cached(chain: Chain, views: int | None, shards: list[str]) -> Path:
    """Return a cache with so many crops of each image, after making what it lacks; None: of the centre view."""
    folder = chain.out / ("cache-centre" if views is None else "cache-crops")
    sets = [] if views is None else [*CROPS, f"views.count={views}"]
    config, how = chain.config(*sets), mode(folder)
    if (folder / "manifest.json").exists():
        index = Cache(folder).index
        if views is None or len(index.image) >= views * len(index.images.keys):
            return folder
        how = "append"
    cache_teacher(config, shards, folder, how)
    return folder


def row(chain: Chain, views: int | None, passes: int, seed: int, shards: list[str]) -> list[float]:
    """Train a student and probe it; return linear CLS, mean patch, k-NN CLS and mean patch (top-1, %)."""
    kind = "centre" if views is None else str(views)
    name = f"{kind}-{passes}-{seed}"
    file, run, refiner = chain.out / f"{name}.json", chain.out / name, chain.out / f"refiner-{kind}"
    if not file.exists():
        cache = cached(chain, views, shards[:-1])
        config = chain.config(f"distill.epochs={passes // (views or 1)}", f"distill.seed={seed}")
        refine(config, cache, refiner, mode(refiner))
        if not (run / RUN).exists():
            distill(config, cache, run, refiner, mode=mode(run))
        task = "classification"
        found = evaluate_tasks(load_config(RECIPE, PROBES), run, shards[:-1], shards[-1:], [task])[task]
        kinds = [(probe, tokens) for probe in ("linear", "knn") for tokens in ("cls", "mean_patch")]
        write_json(file, [getattr(found, probe)[tokens]["top1"] for probe, tokens in kinds])
    figures: list[float] = json.loads(file.read_text())
    return figures


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4, 8], help="none: the centre view alone")
    parser.add_argument("--passes", type=int, nargs="+", default=[16, 48], help="times that a student sees an image")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shards", type=int, default=5, help="how many of the training shards, two at least")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe, as in singer")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chain = Chain(options.teacher, options.data, options.out, options.shards, options.set)
    shards = chain.images("tinyimagenet50-train")
    print("| views | passes | seed | linear, CLS | linear, mean patch | k-NN, CLS | k-NN, mean patch |")
    print("|---|---|---|---|---|---|---|", flush=True)
    # In the order of the views, since appending changes the cache.
    for views in [None, *sorted(options.views)]:
        for passes in options.passes:
            for seed in options.seeds:
                figures = " | ".join(f"{value:.1f}" for value in row(chain, views, passes, seed, shards))
                print(f"| {views or 'centre'} | {passes} | {seed} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
