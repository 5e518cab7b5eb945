"""How many stored views a student needs: V views of each image against the same number of steps, on training images.

    python benchmarks/views.py --teacher FILE --data FOLDER --out runs/views [--views 1 2 4 8] [--passes 16 48]
        [--set KEY=VALUE ...]

The student of the recipe tinyimagenet-ti-to-w96 sees every image --passes times: in so many epochs of the centre view
("centre"), or in passes / V epochs of V random resized crops. The crops come from one cache, to which views are
appended. Only training shards are used: all but the last train the student and its probes, the last tests them. FILE
and FOLDER are those of benchmarks/results.py. Rows are printed as they come. If the command is repeated, it continues
where it stopped.
"""

from pathlib import Path

from setting import TRAIN, Chain, mode

from pipeline.cache.reader import Cache
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.refine import refine

CROPS = ["views.kind=random-resized-crop", "views.scale=[0.3,1]", "views.flip=0.5"]


def folder_of(chain: Chain, views: int | None) -> Path:
    """Return the folder of the cache of the centre view (None), or of crops."""
    return chain.out / ("cache-centre" if views is None else "cache-crops")


def fill(chain: Chain, views: int | None, shards: list[str]) -> None:
    """Make what a cache with so many crops of each image lacks."""
    folder = folder_of(chain, views)
    sets = [] if views is None else [*CROPS, f"views.count={views}"]
    config, how = chain.config(*sets), mode(folder)
    if (folder / "manifest.json").exists():
        index = Cache(folder).index
        if views is None or len(index.image) >= views * len(index.images.keys):
            return
        how = "append"
    cache_teacher(config, shards, folder, how)


def row(chain: Chain, views: int | None, passes: int, seed: int, shards: list[str]) -> list[float]:
    """Train a student and probe it; return linear CLS, mean patch, k-NN CLS and mean patch (top-1, %)."""
    kind = "centre" if views is None else str(views)
    name = f"{kind}-{passes}-{seed}"
    cache, refiner = folder_of(chain, views), chain.out / f"refiner-{kind}"
    warmup = chain.config().distill.warmup_epochs / (views or 1)
    epochs = [f"distill.epochs={passes // (views or 1)}", f"distill.warmup_epochs={warmup}"]
    config = chain.config(*epochs, f"distill.seed={seed}")
    if not (chain.out / f"{name}.json").exists():
        fill(chain, views, shards[:-1])
        refine(config, cache, refiner, mode(refiner))
    return chain.judged(name, config, cache, refiner)


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = Chain.parser(__doc__)
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4, 8], help="none: the centre view alone")
    parser.add_argument("--passes", type=int, nargs="+", default=[16, 48], help="times that a student sees an image")
    options = parser.parse_args()
    chain = Chain.of(options)
    shards = chain.images(TRAIN)
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
