"""Load the teacher: a model with its weights, frozen, in the configured type of numbers."""

from pipeline.config import TeacherConfig
from pipeline.models.backbone import Backbone
from pipeline.models.loading import create_model, frozen
from pipeline.models.own import Own, describe_own
from pipeline.teachers.placement import narrow
from singer.errors import UserError


def load_teacher(config: TeacherConfig, module: Own | None = None) -> Backbone:
    """Load the teacher with its weights, in eval mode, at config.image_size (position embedding interpolated).

    It is on the CPU, in config.dtype; `placement.place_model` moves it. module: a module of the user's own with its
    description, in place of config.name. Raises UserError for settings that would change nothing in it.
    """
    if module is not None:
        for key in ("weights", "averaged", "dtype"):
            if getattr(config, key) != TeacherConfig.model_fields[key].default:
                raise UserError(f"teacher.{key} changes nothing in a module that is given as the teacher; leave it out")
        own = describe_own(module, config.image_size, config.name)
        own.model.eval()  # its parameters stay as they are: the caller may train it afterwards
        return own
    teacher = create_model(config.name, config.image_size, {}, config.weights, True, "teacher.name", config.averaged)
    narrow(teacher.model, config.dtype)
    return frozen(teacher)
