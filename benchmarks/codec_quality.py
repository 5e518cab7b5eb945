"""The effect of a codec on the student: the real chain, from caches that differ only in codec and token share.

    python benchmarks/codec_quality.py --teacher FILE --data FOLDER --out runs/codecs [--seeds 0 1 2]

FILE holds the augreg weights of vit_tiny_patch16_224; FOLDER holds tinyimagenet50-{train,val}-*.tar. For every kind of
cache, a default refiner is fitted (seed 0) and a student is trained for each seed. If the command is repeated, it
continues where it stopped. The val shards select nothing.
"""

from pathlib import Path

from results import RECIPE
from setting import JUDGED, cell, chain_parser, line, mode

from pipeline.cache.info import cache_info
from pipeline.config import load_config
from pipeline.evaluation.classification import Classification
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.refine import refine

# name: (codec, share of the patch tokens)
KINDS = {
    "float16": ("float16", 1.0),
    "int8": ("int8", 1.0),
    "int4": ("int4", 1.0),
    "int3": ("int3", 1.0),
    "int2": ("int2", 1.0),
    "int1": ("int1", 1.0),
    "int4, half the tokens": ("int4", 0.5),
    "int1, half the tokens": ("int1", 0.5),
    "float16, half the tokens": ("float16", 0.5),
    "int4-plain (no outliers)": ("int4-plain", 1.0),
}


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = chain_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    train, val = (str(options.data / f"tinyimagenet50-{split}-*.tar") for split in ("train", "val"))

    lines: dict[str, str] = {}
    for kind in options.kinds:
        codec, share = KINDS[kind]
        sets = [f"teacher.weights={options.teacher}", f"cache.codec={codec}", f"cache.token_share={share}"]
        folder = options.out / f"{codec}-{share}"
        cache, adapters = folder / "cache", folder / "adapters"
        cache_teacher(load_config(RECIPE, sets), train, cache, mode(cache))
        fitted = refine(load_config(RECIPE), cache, adapters, mode(adapters))
        results = []
        for seed in options.seeds:
            config = load_config(RECIPE, [f"distill.seed={seed}", "evaluate.tokens=block"])
            run = folder / f"run-{seed}"
            distill(config, cache, run, adapters, mode=mode(run))
            results.append(evaluate(config, run, train, val))
            lines[kind] = table_line(kind, cache, fitted.blocks, results)
            print_table(lines)


def table_line(kind: str, cache: Path, blocks: dict[int, dict[str, object]], results: list[Classification]) -> str:
    """Return the row of a kind of cache; blocks: the refiner's figures; results: the probes of each seed."""
    info = cache_info(cache).teachers[0]
    left = [figures["after"]["artifact_percent"] for figures in blocks.values()]  # type: ignore[index]
    cells = [kind, f"{info.feature_bytes / info.records / 1000:.1f}", f"{info.ratio:.2f}"]
    cells.append(" / ".join(f"{share:.2f}" for share in left))
    for probe, tokens in JUDGED:
        cells.append(cell([getattr(r, probe)[tokens]["top1"] for r in results]))
    return line([*cells, str(len(results))])


def print_table(lines: dict[str, str]) -> None:
    """Print the rows below their header."""
    head = ["cache", "kB a record", "float16 / size", "artifacts left, %"]
    head += [f"{probe}, {tokens}" for probe, tokens in JUDGED]
    print("", line([*head, "seeds"]), line(["---"] * (len(head) + 1)), *lines.values(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
