"""The whole chain, offline, on images that scikit-learn bundles: shards, cache, refiner, two students, a report.

Run it with `singer demo --out demo-out`. Both students have the same size and seed; one learns from raw features
(FitNet), the other from refined ones. The teacher is bundled; data/demo_teacher/README.md says how it was made and
that its artifacts are planted.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

from pipeline.chains.digits import SPLITS, digit_images
from pipeline.config import Config, resource
from pipeline.evaluation.classification import Accuracies
from pipeline.runtime.progress import say
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine
from pipeline.stages.report import report
from pipeline.storage.outputs import Mode, check_output, claimed_output
from pipeline.teachers.models import LOCAL

TEACHER = "data/demo_teacher"
NOTE = (
    "Two students of the same size and seed: fitnet learned from raw features (FitNet), singer from refined ones "
    "(SiNGER). The teacher's artifact tokens are planted (see data/demo_teacher/README.md): a term of its training "
    "loss made them, because none appeared by itself in short runs. In large ViTs they do appear. There is one seed: "
    "this is a demonstration and no benchmark."
)
# Two drawings of each of the 1,297 training digits, and one of each of the 500 test digits.
COPIES = {"train": 2, "test": 1}


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    report: the page to open; linear: {model: accuracies (%)}; mean_max_over_median: as in ReportResult.
    """

    report: Path
    linear: dict[str, Accuracies]
    mean_max_over_median: dict[str, float]


def demo(config: Config, out: Path, mode: Mode = "new") -> DemoResult:
    """Run the chain in the folder `out`, or raise UserError if it may not be written."""
    check_output(out, mode, "demo", config)
    with claimed_output(out, mode, "demo", config, config.distill.seed):
        return _demo(config, out)


def _demo(config: Config, out: Path) -> DemoResult:
    teacher = resource(TEACHER)
    config = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"name": f"{LOCAL}{teacher}", "weights": None})}
    )

    say("1/6 drawing digits and packing them into WebDataset shards")
    shards = {}
    for split in SPLITS:
        write_images(split, out / "images" / split)
        prepare(config, out / "images" / split, out / "shards" / split)
        shards[split] = glob.escape(str(out / "shards" / split)) + "/*.tar"

    say("2/6 caching the teacher's features")
    cached = cache_teacher(config, shards["train"], out / "cache")
    say("3/6 refining: fitting a refiner to the cache")
    refined = refine(config, cached.cache, out / "refiner")
    say("4/6 distilling a student from raw features (FitNet)")
    fitnet = distill(config, cached.cache, out / "fitnet")
    say("5/6 distilling the same student from refined features (SiNGER)")
    singer = distill(config, cached.cache, out / "singer", refiner=refined.refiner)
    say("6/6 probing the frozen students and the teacher on digits that none of them has seen")
    students = {"FitNet": fitnet, "SiNGER": singer}
    probes = {name: evaluate(config, run.run, shards["train"], shards["test"]) for name, run in students.items()}
    probes["teacher"] = evaluate(config, teacher, shards["train"], shards["test"], out=out / "teacher")
    page = report(
        [run.run for run in students.values()],
        out / "report.html",
        cache=cached.cache,
        teacher_probes=out / "teacher",
        title="singer demo",
        note=NOTE,
    )
    return DemoResult(page.out, {name: probe.linear for name, probe in probes.items()}, page.mean_max_over_median)


def write_images(split: str, folder: Path) -> None:
    """Write the demo's images of a split as a folder of PNG files with one sub-folder a class."""
    for key, image, label in digit_images(split, COPIES[split]):
        file = folder / str(label) / f"{key}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, compress_level=1)
