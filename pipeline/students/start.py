"""Give a new student the weights that it starts from: those of its teacher, of another model, or of a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from pipeline.config import StudentConfig, TeacherConfig
from pipeline.models import student_exits
from pipeline.models.backbone import Backbone, weight_hash
from pipeline.models.huggingface import WEIGHTS
from pipeline.models.loading import create_model, load_saved
from pipeline.models.names import CONFIG
from pipeline.models.weights import describe_size, read_weights
from pipeline.outputs.resuming import STUDENT_FOLDER
from pipeline.runtime.progress import say
from pipeline.storage.json_files import read_json
from pipeline.students.new import registers_argument
from pipeline.teachers.teacher import load_teacher
from singer.backbones import depth
from singer.errors import UserError
from singer.selection import misfit, select_weights
from singer.sizes import Size
from singer.suffix import outline

# Arguments of a student in which a file may differ from it: its head, input, registers and exit. Depth and patch size
# are read from the file.
_OF_THE_FILE = {"num_classes", "img_size", "reg_tokens", "num_reg_tokens", "base", "exit", "exit_width"}
_RANDOM = "or start from random weights: --set student.init=random"


@dataclass(frozen=True)
class TeacherWeights:
    """Where the weights of a cached teacher are.

    config: how it was loaded when it was cached; architecture, model_args: what timm builds it from; digest: the hash
    of its weights (models.backbone.weight_hash).
    """

    config: TeacherConfig
    architecture: str
    model_args: dict[str, Any]
    digest: str

    def load(self, key: str, otherwise: str) -> Backbone:
        """Load the teacher. Raises UserError if its weights are not there any more, or are others.

        key: what needs it; otherwise: what to do without it.
        """
        config, remedy = self.config, f"give its weights with --weights FILE, {otherwise}"
        try:
            if config.weights is None:
                source = load_teacher(config)
            else:
                args, size = self.model_args, config.image_size
                source = create_model(self.architecture, size, args, config.weights, True, "model", config.averaged)
        except UserError as error:
            raise UserError(f"{key}: the teacher was not loaded ({error}); {remedy}") from error
        if weight_hash(source.model.state_dict()) != self.digest:
            where = config.weights or config.name
            raise UserError(f"{key}: {where} does not have the weights that were cached; {remedy}")
        return source


def start_student(student: Backbone, config: StudentConfig, teacher: TeacherWeights, fits_only: bool = False) -> None:
    """Load the weights that student.init names into a new student.

    fits_only: only find out whether they fit; those of a cached teacher are then not loaded. Raises UserError if the
    weights do not exist, do not fit, or are not those of the cached teacher; with init "auto", those that do not fit
    are only an error if they would stay as they are (student.lora).
    """
    if config.init == "random" or (config.init == "auto" and config.pretrained):
        return
    if config.pretrained:
        raise UserError(f"student.init {config.init} and student.pretrained name two starts; leave one of them out")
    otherwise = _RANDOM if config.lora is None else f"{_RANDOM} --set student.lora=null"
    if config.starts_from is None:
        said = f"{teacher.architecture}, the teacher"
        reason = _misfit(teacher, student)
        if reason is not None and config.init == "auto" and config.lora is None:
            if not fits_only:
                say(f"note: the student does not start from weights of {said}: {reason}")
            return
        if reason is None and fits_only:
            return
        source = teacher.load("student.init", otherwise) if reason is None else None
    else:
        said, source = config.init, None
        reason = misfit(student.model, student.model)  # whatever the weights are
        if reason is None:
            try:
                source = _other(config.starts_from, student, otherwise)
            except UserError as error:
                raise UserError(f"student.init: {error}") from error
            reason = misfit(source.model, student.model)
    if source is None or reason is not None:
        raise UserError(f"student.init {config.init}: {said} does not fit the student: {reason}; {otherwise}")
    if fits_only:
        return
    state = select_weights(source.model, student.model, config.init_blocks)
    student.model.load_state_dict(_normalised_as(student, source, state))
    say(f"the student starts from weights of {said}")


def starts_as_blocks(student: Backbone, config: StudentConfig, teacher: TeacherWeights) -> bool:
    """Return whether a student starts as some of the teacher's blocks, and these keep all their channels."""
    elsewhere = config.starts_from is not None or config.init == "random" or config.pretrained
    if elsewhere or not timm.is_model(teacher.architecture):
        return False
    whole = outline(teacher.architecture, teacher.model_args)
    if misfit(whole, student.model) is not None:
        return False
    have, want = (model.blocks[0].state_dict() for model in (whole, student.model))
    same = all(name in have and have[name].shape == tensor.shape for name, tensor in want.items())
    return same and depth(student.model) < depth(whole)


def _misfit(teacher: TeacherWeights, student: Backbone) -> str | None:
    """Say why the student cannot start from the teacher's weights, before they are loaded; None if it can."""
    if not timm.is_model(teacher.architecture):
        return "it is not a model of timm"
    return misfit(outline(teacher.architecture, teacher.model_args), student.model)


def _other(path: Path, student: Backbone, otherwise: str) -> Backbone:
    """Load a run, a timm model folder, or a file. otherwise: what to do without it.

    Raises UserError if a file that is not in a model folder has weights of another width: it does not say how many
    heads they are divided in.
    """
    if (folder := _model_folder(path)) is not None:
        return load_saved(folder)
    architecture = student.model_args.get("base", student.architecture)
    state = read_weights(path, set(student.model.state_dict()))
    args = {name: value for name, value in student.model_args.items() if name not in _OF_THE_FILE}
    size, registers, image_size = describe_size(state), state.get("reg_token"), student.image_size
    if size is not None:
        width, args["depth"], patch = size
        args["patch_size"] = patch
        # On the student's grid, so that positions are interpolated once.
        image_size = Size(*(patch * side for side in student.layout[-1][1])).written
        if width != student.body_width:
            wrong = f"{path}: it has {width} channels and the student {student.body_width}"
            if width > student.body_width:
                wrong += ", and a file does not say in how many heads; name the folder of its run or model, which does"
            raise UserError(f"{wrong}; {otherwise}")
    if registers is not None or "reg_token" in student.model.state_dict():
        args[registers_argument(architecture)] = 0 if registers is None else registers.shape[1]
    if exit := student_exits.exit_of(state):
        args |= {"base": architecture, **exit}
        architecture = student_exits.NAME
    return create_model(architecture, image_size, args, path, True, "model")


def _model_folder(path: Path) -> Path | None:
    """Return the folder that says what a model is: of a run, itself, or the one that a file is in; None for others."""
    if path.is_dir():
        return path / STUDENT_FOLDER if (path / STUDENT_FOLDER).is_dir() else path
    folder = path.parent
    beside = path.name == WEIGHTS and (folder / CONFIG).is_file()
    return folder if beside and "architecture" in read_json(folder, CONFIG, "model folder") else None


def _normalised_as(student: Backbone, source: Backbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change the patch embedding so that it takes images with the student's mean and std instead of the source's."""
    weight, bias = "patch_embed.proj.weight", "patch_embed.proj.bias"
    if (student.mean, student.std) == (source.mean, source.std) or bias not in state or state[weight].dim() != 4:
        return state
    means, stds, old_means, old_stds = (torch.tensor(x) for x in (student.mean, student.std, source.mean, source.std))
    shift = ((means - old_means) / old_stds).view(1, -1, 1, 1)
    scale = (stds / old_stds).view(1, -1, 1, 1)
    shifted = state[bias] + (state[weight] * shift).sum((1, 2, 3))
    return {**state, weight: state[weight] * scale, bias: shifted}
