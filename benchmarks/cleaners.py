"""Cleaners on teachers with planted artifacts: students of the demo's recipe, by cleaner and seed.

    python data/demo_teacher/train.py --out runs/third --registers 4 --directions 4 --places 0 7 56 63 3 60
        --ratio 8 --seed 3
    python benchmarks/cleaners.py --teachers data/demo_teacher runs/third --out runs/cleaners [--seeds 0 1 2]
        [--cleaners gated-adapter neighbour clip none]

Each teacher is cached once, and each refiner is fitted once to its cache. Students are trained on the digits of the
demo with other seeds, and probed on its test digits. Rows are printed as they come. If the command is repeated, it
continues where it stopped.
"""

import argparse
from pathlib import Path

from setting import JUDGED, cell, judged, line, mode

from pipeline.chains.demo import write_images
from pipeline.chains.digits import SPLITS
from pipeline.config import load_config
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine


def shards(out: Path) -> list[list[str]]:
    """Return the shards of the demo's digits for training and for testing, after making them."""
    for split in SPLITS:
        if not (out / split).exists():
            write_images(split, out / "images" / split)
            prepare(load_config("demo"), out / "images" / split, out / split)
    return [sorted(map(str, (out / split).glob("*.tar"))) for split in SPLITS]


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=Path, nargs="+", required=True, help="folders of timm models")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cleaners", nargs="+", default=["gated-adapter", "neighbour", "clip", "none"])
    options = parser.parse_args()
    images = shards(options.out)
    print(line(["teacher", "cleaner", *(f"{probe}, {tokens}" for probe, tokens in JUDGED), "seeds"]))
    print(line(["---"] * (3 + len(JUDGED))), flush=True)
    for teacher in options.teachers:
        out = options.out / teacher.name
        base = [f"teacher.name=local-dir:{teacher.resolve()}", "distill.trackers=[]"]
        cache_teacher(load_config("demo", base), images[0], out / "cache", mode(out / "cache"))
        for cleaner in options.cleaners:
            own = [*base, f"refine.cleaner={cleaner}"]
            refiner = out / f"refiner-{cleaner}"
            refine(load_config("demo", own), out / "cache", refiner, mode(refiner))
            rows = []
            for seed in options.seeds:
                config, run = load_config("demo", [*own, f"distill.seed={seed}"]), out / f"{cleaner}-{seed}"
                rows.append(judged(config, config, run, out / "cache", refiner, *images))
            cells = [cell(list(values)) for values in zip(*rows, strict=True)]
            print(line([teacher.name, cleaner, *cells, str(len(options.seeds))]), flush=True)


if __name__ == "__main__":
    main()
