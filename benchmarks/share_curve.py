"""What a part of the images is worth: quality against share and against stored bytes, at equal steps.

    python benchmarks/share_curve.py --teacher FILE --data FOLDER --out runs/share [--share 0.05 0.1 0.25 0.5]
        [--by random el2n-hard el2n-easy prototypes-hard prototypes-easy loss-hard loss-easy] [--epochs 16]
        [--set KEY=VALUE ...]

The student of the recipe tinyimagenet-ti-to-w96 takes the steps of --epochs epochs of all images, so that it sees fewer
images more often. A way of --by is distill.share_by and, after a dash, distill.share_keep. GB are what the features of
the share take, with the codec of --set; a choice by scores also needs the last block of all others. A choice by loss
takes that of the student of the smallest random share, which has seen few of the images. The refiner is fitted to all
images. Only training shards are used: all but the last train the student and its probes, the last tests
them. FILE and FOLDER are those of benchmarks/results.py. Rows are printed as they come. If the command is repeated, it
continues where it stopped.
"""

import json

from setting import JUDGED, TRAIN, Chain, cell, line, mode

from pipeline.cache.reader import Cache
from pipeline.config import DistillConfig
from pipeline.data.sampler import steps_per_epoch
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.refine import refine

WAYS = ["random", "el2n-hard", "el2n-easy", "prototypes-hard", "prototypes-easy", "loss-hard", "loss-easy"]


def share_sets(share: float, way: str, records: int, whole: DistillConfig) -> list[str]:
    """Return the keys of a run that takes the steps of `whole`, that of all records, with as long a warm-up."""
    by, _, keep = way.partition("-")
    chosen = [] if share == 1 else [f"distill.share={share}", f"distill.share_by={by}"]
    kept = [f"distill.share_keep={keep}"] if keep else []
    # The last batch of an epoch is smaller, so a small share has more steps in an epoch than its part of all.
    all_steps, own_steps = (steps_per_epoch(max(1, round(n)), whole.batch_size) for n in (records, share * records))
    longer = all_steps / own_steps
    epochs, warmup = round(whole.epochs * longer), whole.warmup_epochs * longer
    return [*chosen, *kept, f"distill.epochs={epochs}", f"distill.warmup_epochs={warmup}"]


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = Chain.parser(__doc__)
    parser.add_argument("--share", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5])
    parser.add_argument("--by", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--epochs", type=int, default=16, help="of all images; a share takes as many steps")
    options = parser.parse_args()
    if any(way.startswith("loss") for way in options.by) and options.by[0] != "random":
        parser.error("a choice by loss needs the students of --by random, which comes first")
    chain = Chain.of(options)
    shards, folder, refiner = chain.images(TRAIN), options.out / "cache", options.out / "refiner"
    cache_teacher(chain.config(), shards[:-1], folder, mode(folder))
    refine(chain.config(), folder, refiner, mode(refiner))
    cache, whole = Cache(folder), chain.config(f"distill.epochs={options.epochs}").distill
    print(line(["share", "by", "GB", "steps", *(f"{probe}, {tokens}" for probe, tokens in JUDGED), "seeds"]))
    print(line(["---"] * (5 + len(JUDGED))), flush=True)
    for share, way in [(1.0, ""), *((share, way) for share in sorted(options.share) for way in options.by)]:
        sets = share_sets(share, way, len(cache), whole)
        names = {seed: f"run-{share:g}-{way or 'all'}-{options.epochs}-{seed}" for seed in options.seeds}
        configs = {}
        for seed, name in names.items():
            scorer = options.out / f"run-{min(options.share):g}-random-{options.epochs}-{seed}"
            by_loss = [f"distill.share_run={scorer}"] if way.startswith("loss") else []
            configs[name] = chain.config(*sets, *by_loss, f"distill.seed={seed}")
        found = [chain.judged(name, config, folder, refiner) for name, config in configs.items()]
        steps = json.loads((options.out / names[options.seeds[0]] / RUN_RESULT).read_text())["steps"]
        size = f"{share * len(cache) * cache.record_bytes / 1e9:.3g}"
        cells = [cell(values) for values in map(list, zip(*found, strict=True))]
        print(line([f"{share:g}", way or "all", size, str(steps), *cells, str(len(found))]), flush=True)


if __name__ == "__main__":
    main()
