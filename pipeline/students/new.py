"""Build new students: models of timm, transformers or one's own, or plain Vision Transformers with given dimensions."""

import inspect
from typing import Any

from pipeline.config import StudentConfig
from pipeline.models import student_exits
from pipeline.models.backbone import Backbone
from pipeline.models.fetching import first_line
from pipeline.models.loading import check_known, create_model
from pipeline.models.names import HF, is_function
from pipeline.models.outlines import outline_of
from pipeline.models.own import Own, describe_own
from singer.errors import UserError
from singer.sizes import ImageSize, Size

# A student named `vit` is built from this architecture; the given dimensions replace all of its own.
PLAIN_VIT = "vit_tiny_patch16_224"
# Keys of the configuration by which a student is built; a module that is given is built already.
_BUILT_BY = (
    "dim", "depth", "heads", "mlp_ratio", "patch_size", "registers", "pretrained", "exit", "exit_width", "drop_path",
)  # fmt: skip


def new_student(
    config: StudentConfig,
    image_size: ImageSize,
    module: Own | None = None,
    width: int | None = None,
    class_token: bool = True,
) -> Backbone:
    """Build a student without a head, for training. image_size: in pixels, used if the configuration gives none.

    module: a module of the user's own with its description; it is the student, at its own image size by default. width:
    that of a wider exit if the configuration gives none, in channels. class_token: whether the teacher has one; if not,
    a student named `vit` has none either, and its output is the mean of its patches. Raises UserError if the
    configuration does not describe a model that gives feature maps, or would build another student than the module.
    """
    if module is not None:
        for key in _BUILT_BY:
            if getattr(config, key) != StudentConfig.model_fields[key].default:
                raise UserError(f"student.{key} changes nothing in a module that is given as the student; leave it out")
        return _trainable(describe_own(module, config.image_size, config.name), config)
    dims = {
        "embed_dim": config.dim, "depth": config.depth, "num_heads": config.heads, "mlp_ratio": config.mlp_ratio,
    }  # fmt: skip
    given: dict[str, Any] = {k: v for k, v in dims.items() if v is not None}
    if config.name == "vit":
        missing = [k for k in ("dim", "depth", "heads") if getattr(config, k) is None]
        if missing:
            raise UserError(f"student.name vit needs student.{missing[0]} too (or name a timm model)")
        if given["embed_dim"] % given["num_heads"]:
            raise UserError(f"student.dim {config.dim} is not a multiple of student.heads {config.heads}")
        if config.pretrained:
            raise UserError("student.pretrained needs the student.name of a timm model")
        if not class_token:
            given |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    elif given:
        check_known(config.name, f"student.name: timm has no model {config.name!r}")
        keys = "student.dim, depth, heads and mlp_ratio"
        raise UserError(f"{keys} are for student.name vit; leave them out for {config.name}")
    args: dict[str, Any] = {**given, "patch_size": config.patch_size, "num_classes": 0}
    if config.registers is not None:
        args[registers_argument(config.name)] = config.registers
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    name = PLAIN_VIT if config.name == "vit" else config.name
    if config.exit != "plain":
        args |= _exit(config, name, width)
        name = student_exits.NAME
    # A function of the user's own says for which size it is; all else is built for the teacher's.
    size = config.image_size or (None if is_function(name) else image_size)
    student = create_model(name, size, args, None, pretrained=config.pretrained, what="student.name")
    try:
        student.layout  # noqa: B018 - this runs the model once; if it fails here, it cannot be trained
    except Exception as error:  # each architecture raises errors of its own types
        pixels = f"{Size.of(student.image_size)} pixels"
        raise UserError(f"student.name {config.name} gives no feature maps at {pixels}: {first_line(error)}") from None
    return _trainable(student, config)


def _exit(config: StudentConfig, base: str, width: int | None) -> dict[str, Any]:
    """Return what builds a wider exit of a model of timm. Raises UserError for other models."""
    if is_function(base) or base.startswith(HF):
        raise UserError(f"student.exit {config.exit} is for Vision Transformers of timm, and not for {base}")
    check_known(base, f"student.name: timm has no model {base!r}")
    if config.exit_width is None and width is None:
        raise UserError(f"student.exit {config.exit} needs student.exit_width here")
    return {"base": base, "exit": config.exit, "exit_width": config.exit_width or width}


def registers_argument(name: str) -> str:
    """Return the argument by which a model of timm takes a number of register tokens. Raises UserError for others."""
    base = PLAIN_VIT if name == "vit" else name
    if not is_function(base) and not base.startswith(HF):
        check_known(base, f"student.name: timm has no model {base!r}")
        try:
            outline = outline_of(base, {})
        except Exception:  # errors of many types, which the build of the model explains
            return "reg_tokens"
        known = inspect.signature(type(outline).__init__).parameters
        for argument in ("reg_tokens", "num_reg_tokens"):
            if argument in known:
                return argument
    raise UserError(f"student.registers is for Vision Transformers of timm, and not for {name}; leave it out")


def _trainable(student: Backbone, config: StudentConfig) -> Backbone:
    """Return a student that can be trained: a module of the user's own may come frozen, or in half precision.

    Raises UserError if it cannot recompute its activations, which student.checkpointing wants, or was made in
    torch.inference_mode.
    """
    if any(parameter.is_inference() for parameter in student.model.parameters()):
        raise UserError(f"student {config.name} was made in torch.inference_mode and has no gradients; make it outside")
    student.model.float()
    if not any(parameter.requires_grad for parameter in student.model.parameters()):
        student.model.requires_grad_(True)
    if config.checkpointing:
        try:
            student.model.set_grad_checkpointing(True)
        except AssertionError:  # this is how timm refuses
            raise UserError(f"student.checkpointing: {config.name} cannot do it; set it to false") from None
    student.model.train()
    return student
