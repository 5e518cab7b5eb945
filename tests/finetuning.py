"""What tests of fine-tuning share."""

from pathlib import Path

from conftest import seeded

from pipeline.config import Config

WEIGHTS = "student/model.safetensors"
SETS = [
    "finetune.epochs=4",
    "finetune.batch_size=20",
    "finetune.workers=1",
    "finetune.trackers=[]",
    "evaluate.strengths=[1.0]",
    f"finetune.seed={seeded(0)}",
]


def taught(folder: Path) -> list[str]:
    """The settings of a training with all augmentation, and with the teacher that the run learned from."""
    (folder / "map.json").write_text("[3, 1, 0, 4]")  # it has 5 classes, and the images have 4
    teacher = ["finetune.kd=soft", "finetune.kd_temperature=2", f"finetune.class_map={folder / 'map.json'}"]
    return ["finetune.randaugment=[2,9]", "finetune.erasing=0.25", *teacher]


def changed(config: Config, **keys: object) -> Config:
    """A configuration with other keys of finetune."""
    return config.changed(finetune=keys)
