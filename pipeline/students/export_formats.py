"""Write students in the formats of `singer export`.

A format is one function and one line in FORMATS. The function writes the student, reads it back, and tells users how to
read it.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.config import ExportConfig
from pipeline.models import student_exits
from pipeline.models.backbone import INTERPOLATION, Backbone, save_backbone, timm_config
from pipeline.models.loading import load_model
from pipeline.models.names import HF, LOCAL, OWN
from pipeline.storage.json_files import write_json
from pipeline.storage.tensors import separate
from singer.backbones import block_outputs, depth
from singer.errors import UserError
from singer.sizes import Size

PREPROCESS = "preprocess.json"
ONNX = "model.onnx"
TORCH_EXPORT = "model.pt2"
# The traced batch has another size than the compared ones, so that a batch axis that is not dynamic is noticed.
_TRACED, _COMPARED = 2, (3, 1)
# So many characters of an error of torch are shown; it goes on with advice on torch's own functions.
_SAID = 200
# The first axis of the input may have any length.
_SHAPES = ({0: torch.export.Dim("batch", min=1)},)


@dataclass(frozen=True)
class Student:
    """What is exported.

    module: normalised images (B, 3, height, width) -> output; output: "pooled" (B, d) or "tokens" (B, N, d).
    """

    backbone: Backbone
    module: nn.Module
    output: str

    @property
    def preprocess(self) -> dict[str, Any]:
        """Return how to make the input from an RGB image: crop, resize, divide by 255, normalise, give as CHW."""
        return {
            "size": self.backbone.image_size,
            "crop": "center-square" if isinstance(self.backbone.image_size, int) else "center",
            "interpolation": INTERPOLATION,
            "mean": self.backbone.mean,
            "std": self.backbone.std,
        }

    @property
    def pixels(self) -> str:
        """Return Python code that makes the model's input from an image, without singer."""
        # Pillow's sizes are (width, height).
        size = '(p["size"], p["size"])' if isinstance(self.backbone.image_size, int) else 'tuple(p["size"][::-1])'
        return f"""with open("{PREPROCESS}") as file:
    p = json.load(file)
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
image = ImageOps.fit(image, {size}, Image.Resampling[p["interpolation"].upper()])
pixels = (np.asarray(image) / 255 - p["mean"]) / p["std"]
images = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # a batch of any size"""

    def images(self, count: int) -> Tensor:
        """Return random images (count, 3, height, width), which are always the same for a count."""
        shape = (count, 3, *Size.of(self.backbone.image_size))
        return torch.randn(shape, generator=torch.Generator().manual_seed(count))


class LastBlock(nn.Module):
    """A module that returns the raw tokens (B, N, d) of a model's last block.

    Training compares these tokens with targets, and probes read them by default.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.last = depth(model) - 1

    def forward(self, images: Tensor) -> Tensor:
        """Compute the tokens (B, N, d) of normalised images (B, 3, H, W)."""
        return block_outputs(self.model, images, [self.last])[self.last]


@dataclass(frozen=True)
class Written:
    """A written student.

    load: the student's function, read back from the written files; snippet: Python code that reads the files, for the
    model card; packages: the packages, besides torch and timm, that need the right version.
    """

    load: Callable[[Tensor], Tensor]
    snippet: str
    packages: tuple[str, ...] = ()


def write_timm(student: Student, folder: Path) -> Written:
    """Write timm's local-dir layout, which the run directory has, too."""
    _require_whole_model(student, "timm")
    if student.backbone.architecture.startswith((HF, OWN)):
        raise UserError("--to timm is for models of timm; take onnx or torch-export for this student")
    save_backbone(student.backbone, student.backbone.model.state_dict(), folder)
    return _read_timm(student, folder)


def write_hf(student: Student, folder: Path) -> Written:
    """Write a repository for the Hugging Face Hub; timm (`hf-hub:`) and the TimmWrapper of transformers read it.

    A student of transformers is written as transformers itself does.
    """
    _require_whole_model(student, "hf")
    if student.backbone.architecture == student_exits.NAME:
        raise UserError("--to hf is not for students with student.exit; take timm, onnx or torch-export")
    if student.backbone.architecture.startswith(OWN):
        raise UserError("--to hf is for models of timm and transformers; take onnx or torch-export for this student")
    if student.backbone.architecture.startswith(HF):
        return _write_transformers(student, folder)
    config = timm_config(student.backbone)
    # TimmWrapper passes num_classes itself and fails if it is also in model_args. timm takes it from pretrained_cfg.
    config["model_args"] = {k: v for k, v in config["model_args"].items() if k != "num_classes"}
    write_json(folder / "config.json", config)
    state = separate(student.backbone.model.state_dict())
    # Some versions of transformers refuse a safetensors file that does not say which framework wrote it.
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return _read_timm(student, folder)


def _write_transformers(student: Student, folder: Path) -> Written:
    """Write what from_pretrained reads: config.json, model.safetensors and preprocessor_config.json."""
    backbone, size = student.backbone, Size.of(student.backbone.image_size)._asdict()
    backbone.model.backbone.save_pretrained(folder)
    processor = {"do_resize": True, "size": size, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
    processor |= {"do_normalize": True, "image_mean": backbone.mean, "image_std": backbone.std}
    target = "size"
    if size["height"] == size["width"]:
        # It cuts the largest centred square, as singer does; transformers has none that does so for other shapes.
        target = "crop_size"
        processor |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size["height"]}}
        processor |= {"do_center_crop": True, "crop_size": size}
    write_json(folder / "preprocessor_config.json", processor)
    kind = type(backbone.model.backbone).__name__
    snippet = f"""import json

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import {kind}

with open("preprocessor_config.json") as file:
    p = json.load(file)
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
image = ImageOps.fit(image, (p["{target}"]["width"], p["{target}"]["height"]), p["resample"])
pixels = (np.asarray(image) / 255 - p["image_mean"]) / p["image_std"]
images = torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()
model = {kind}.from_pretrained(".").eval()  # "." is the path of this folder
with torch.inference_mode():
    # Tokens after the final norm. A forward hook on the last block gives them as they were trained, before it.
    tokens = model(images).last_hidden_state"""
    return Written(load_model(f"{HF}{folder}").model, snippet, ("transformers",))


def write_onnx(student: Student, folder: Path) -> Written:
    """Write model.onnx, with a dynamic batch axis and the preprocessing in its metadata.

    Raises UserError if packages of the extra `export` are missing.
    """
    packages = ("onnx", "onnxruntime", "onnxscript")
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(packages)}")
    import onnxruntime

    with warnings.catch_warnings():
        # torch gives this warning about its own code while it copies the traced program.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        program = torch.onnx.export(
            trace(student),
            dynamo=True,
            dynamic_shapes=_SHAPES,  # for the name of the axis
            input_names=["images"],
            output_names=[student.output],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["preprocess"] = json.dumps(student.preprocess)
    program.save(folder / ONNX)
    write_json(folder / PREPROCESS, student.preprocess)
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])

    def load(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    snippet = f"""import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{student.pixels}
session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])
({student.output},) = session.run(None, {{"images": images}})"""
    return Written(load, snippet, packages)


def write_torch_export(student: Student, folder: Path) -> Written:
    """Write model.pt2 by torch.export, with a dynamic batch axis and with preprocess.json in it."""
    program = trace(student)
    # The example inputs would be stored, too, as the only pickle in the file.
    program.example_inputs = None
    torch.export.save(program, folder / TORCH_EXPORT, extra_files={PREPROCESS: json.dumps(student.preprocess)})
    write_json(folder / PREPROCESS, student.preprocess)
    with warnings.catch_warnings():
        # torch.export reads weights into a buffer that it never writes to.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        module = torch.export.load(folder / TORCH_EXPORT).module()
    snippet = f"""import json

import numpy as np
import torch
from PIL import Image, ImageOps

{student.pixels}
model = torch.export.load("{TORCH_EXPORT}").module()
with torch.inference_mode():
    {student.output} = model(torch.from_numpy(images))"""
    return Written(module, snippet)


def trace(student: Student) -> ExportedProgram:
    """Trace the student, and remove the stack traces, which name source files of this machine.

    Raises UserError if torch cannot trace its code for batches of any size.
    """
    # Some models keep constants that they compute in their first pass (TinyViT), which must not be a traced one.
    with torch.inference_mode():
        student.module(student.images(1))
    try:
        program = torch.export.export(student.module, (student.images(_TRACED),), dynamic_shapes=_SHAPES, strict=False)
    except Exception as error:  # torch raises errors of many types
        why = " ".join(str(error).split())[:_SAID]
        raise UserError(
            f"torch cannot trace {student.backbone.architecture} for batches of any size: {why}; "
            "in code of your own, write x.shape[0] in the place of len(x)"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


FORMATS: dict[str, Callable[[Student, Path], Written]] = {
    "timm": write_timm,
    "hf": write_hf,
    "onnx": write_onnx,
    "torch-export": write_torch_export,
}


@torch.inference_mode()
def compare(student: Student, load: Callable[[Tensor], Tensor], settings: ExportConfig) -> float:
    """Return the largest difference between the outputs of the student and of the export that was read back.

    Raises UserError if the difference is larger than settings.tolerance, relative to the largest output if that is
    above 1.
    """
    largest = 0.0
    for count in _COMPARED:
        images = student.images(count)
        expected = student.module(images)
        difference = float((load(images) - expected).abs().max())
        # With `not <=` instead of `>`, NaN fails, too.
        if not difference <= settings.tolerance * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"the export differs from the student by {difference:.2g}, beyond export.tolerance "
                f"{settings.tolerance:g}; nothing was written"
            )
        largest = max(largest, difference)
    return largest


def _require_whole_model(student: Student, to: str) -> None:
    if student.output != "pooled":
        raise UserError(
            f"--output {student.output} is for onnx and torch-export: --to {to} gives the whole model, "
            "and its model card shows how to get tokens"
        )


def _read_timm(student: Student, folder: Path) -> Written:
    backbone = student.backbone
    tokens = "patches, prefix" if backbone.prefix else "patches"
    more = ", return_prefix_tokens=True" if backbone.prefix else ""
    layout = "NLC" if backbone.gives_tokens else "NCHW"
    # The package singer-vit knows students with a wider exit, and timm alone does not.
    more_imports = (
        f"\nimport {student_exits.__name__}  # pip install singer-vit\n"
        if backbone.architecture == student_exits.NAME
        else ""
    )
    snippet = f"""import timm
import torch
from PIL import Image, ImageOps
{more_imports}
model = timm.create_model("{LOCAL}.", pretrained=True).eval()  # "." is the path of this folder
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
images = transform(image).unsqueeze(0)
with torch.inference_mode():
    pooled = model(images)
    # Tokens of the last block as they are, before the final norm:
    last = {{"indices": 1, "norm": False, "output_fmt": "{layout}", "intermediates_only": True}}
    {tokens} = model.forward_intermediates(images, **last{more})[0]"""
    return Written(timm.create_model(f"{LOCAL}{folder}", pretrained=True).eval(), snippet)
