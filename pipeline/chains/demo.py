"""The whole chain, offline, on images that scikit-learn bundles: shards, cache, refiner, two students, a report.

Run it with `singer demo --out demo-out`. Both students have the same size and seed; one learns from raw features
(FitNet), the other from refined ones. The teacher is bundled; data/demo_teacher/README.md says how it was made and
that its artifacts are planted.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

from pipeline.chains.digits import SPLITS, digit_images
from pipeline.chains.learn import PAGE, PLANNED, SHARDS, Learning, Stage, command
from pipeline.chains.steps import chain
from pipeline.config import Config, dump_config, resource
from pipeline.evaluation.classification import Accuracies
from pipeline.models.names import LOCAL
from pipeline.outputs.folder import Mode, check_output
from pipeline.stages.prepare import prepare
from pipeline.storage import write_atomic

STAGE = "demo"
TEACHER = "data/demo_teacher"
NOTE = (
    "Two students of the same size and seed: fitnet learned from raw features (FitNet), singer from refined ones "
    "(SiNGER). The teacher's artifact tokens are planted (see data/demo_teacher/README.md): a term of its training "
    "loss made them, because none appeared by itself in short runs. In large ViTs they do appear. There is one seed: "
    "this is a demonstration and no benchmark."
)
# {folder: whether the student learns from refined features}, and the names of the models in the result.
STUDENTS = {"fitnet": False, "singer": True}
NAMES = {"fitnet": "FitNet", "singer": "SiNGER", "teacher": "teacher"}
_STAGES = 10
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
    check_output(out, mode, STAGE, config)
    with chain(STAGE, config, out, mode, _STAGES) as steps:
        config = config.changed(teacher={"name": f"{LOCAL}{resource(TEACHER)}", "weights": None})
        if steps.main:
            write_atomic(out / PLANNED, dump_config(config).encode())
        for split in SPLITS:
            _packed(config, out, split).follow(steps)
        train, test = ([glob.escape(str(out / SHARDS / split)) + "/*.tar"] for split in SPLITS)
        learning = Learning(config, out, train, train, test, STUDENTS, "singer demo", NOTE)
        results = {stage.name: stage.follow(steps) for stage in learning.stages(steps)}
    linear = {name: results[f"probe {model}"] for model, name in NAMES.items()}
    return DemoResult(out / PAGE, linear, results["report"])


def _packed(config: Config, out: Path, split: str) -> Stage:
    """Return the stage that draws the digits of a split and packs them into shards."""
    images, shards = out / "images" / split, out / SHARDS / split

    def pack() -> None:
        write_images(split, images)
        prepare(config, images, shards)

    again = command("prepare", images, "--config", out / PLANNED, "--out", shards, "--overwrite")
    return Stage(f"{split} {SHARDS}", f"drawing digits and packing them: {split}", again, pack, together=False)


def write_images(split: str, folder: Path) -> None:
    """Write the demo's images of a split as a folder of PNG files with one sub-folder a class."""
    for key, image, label in digit_images(split, COPIES[split]):
        file = folder / str(label) / f"{key}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, compress_level=1)
