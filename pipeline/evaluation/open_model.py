"""Open the model that a command names: a run, a folder of timm, or a name of timm."""

from pathlib import Path

from pipeline.models.backbone import Backbone
from pipeline.models.loading import check_known, load_model, load_saved
from pipeline.outputs.resuming import STUDENT_FOLDER
from singer.sizes import ImageSize


def check_known_model(model: Path | str) -> None:
    """Raise UserError if a model is neither a path that exists nor a name of timm."""
    if not Path(model).exists():
        check_known(str(model), f"{model} does not exist, and timm has no model of this name")


def open_model(
    model: Path | str, weights: Path | None, image_size: ImageSize | None, function: str | None = None
) -> Backbone:
    """Load a model, frozen: of a run its student, a folder of timm or transformers, or a name as teacher.name has it.

    weights: a file for a model given by name; by default, they are fetched. function: what makes a student of the
    user's own (student.name). Raises UserError if it cannot be used.
    """
    check_known_model(model)
    if not Path(model).exists():
        return load_model(str(model), weights, image_size)
    student = Path(model) / STUDENT_FOLDER
    return load_saved(student if student.is_dir() else Path(model), image_size, function)
