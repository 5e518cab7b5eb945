"""A copy of the teacher that has registers and learns to do without artifacts, beside the teacher itself.

    python benchmarks/clean_copy.py --teacher FILE --data FOLDER --out runs/clean-copy [--epochs 6]

The recipe dinov2-b-registers on the teacher of benchmarks/results.py, FILE, with images of FOLDER's first two training
shards: one copy learns averages over shifted and mirrored copies of the images (PH-Reg), one learns what the gated
adapter makes of them. Rows have the artifacts of the last block on images of the fifth training shard, probes that are
learnt on the two shards and tested on the fifth, and CamVid. If the command is repeated, it continues where it stopped.
"""

from pathlib import Path

from setting import JUDGED, PROBES, chain_parser, line, mode, value_at

from pipeline.config import load_config
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_model
from pipeline.models.names import CONFIG
from pipeline.outputs.resuming import RUN_RESULT, STUDENT_FOLDER
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine

RECIPE, NAME, SIZE, LAST = "dinov2-b-registers", "vit_tiny_patch16_224", 128, 11


def row(model: Path, out: Path, train: list[str], test: list[str], camvid: tuple[list[str], list[str]]) -> list[str]:
    """Return the figures of a model, a folder of timm: artifacts (%), largest norm over the median, probes (%)."""
    sets = [f"teacher.name=local-dir:{model}", f"teacher.image_size={SIZE}", f"cache.blocks=[{LAST}]"]
    config, cache, refiner = load_config(sets=sets), out / "cache", out / "refiner"
    cache_teacher(config, test, cache, mode(cache))
    norms = refine(config, cache, refiner, mode(refiner)).blocks[LAST]["before"]
    probes = load_config(sets=PROBES)
    found = vars(evaluate_tasks(probes, f"local-dir:{model}", train, test, ["classification"])["classification"])
    learnt, tested = camvid
    dense = vars(evaluate_tasks(probes, f"local-dir:{model}", learnt, tested, ["segmentation"])["segmentation"])
    artifacts, ratio = (value_at(norms, [name]) for name in ("artifact_percent", "max_over_median"))
    figures = [ratio, *(value_at(found, [*path, "top1"]) for path in JUDGED), dense["miou"]]
    return [f"{artifacts:.2f}", *(f"{figure:.1f}" for figure in figures)]


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = chain_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    out, teacher = options.out, options.out / "teacher"
    shards = sorted(map(str, options.data.glob("tinyimagenet50-train-*.tar")))
    train, test = shards[:2], shards[-1:]
    learnt, tested = (sorted(map(str, options.data.glob(f"camvid-{split}-*.tar"))) for split in ("train", "test"))
    if not (teacher / CONFIG).exists():
        loaded = load_model(NAME, options.teacher, SIZE)
        save_backbone(loaded, loaded.model.state_dict(), teacher)
    config = load_config(RECIPE, [
        *(f"{section}.name={NAME}" for section in ("teacher", "student")),
        *(f"{section}.image_size={SIZE}" for section in ("teacher", "student")),
        *(f"{section}.precision=auto" for section in ("cache", "distill")),
        f"teacher.weights={options.teacher}", f"distill.epochs={options.epochs}",
        f"distill.batch_size={options.batch_size}", "distill.trackers=[]",
    ])  # fmt: skip
    cache_teacher(config, train, out / "cache", mode(out / "cache"))
    refine(config, out / "cache", out / "refiner", mode(out / "refiner"))
    probes = [f"{probe}, {tokens}" for probe, tokens in JUDGED]
    print(line(["model", "artifacts, %", "largest / median norm", *probes, "CamVid mIoU"]))
    print(line(["---"] * (4 + len(probes))), flush=True)
    for name, refiner in (("teacher", None), ("averages", None), ("cleaned", out / "refiner")):
        model, run = teacher, out / name
        if name != "teacher":
            model = run / STUDENT_FOLDER
            if not (run / RUN_RESULT).exists():
                distill(config, out / "cache", run, refiner, mode=mode(run))
        print(line([name, *row(model.resolve(), out / f"look-{name}", train, test, (learnt, tested))]), flush=True)


if __name__ == "__main__":
    main()
