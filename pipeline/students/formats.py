"""Formats of exported students.

A format is one function that writes the student, reads it back and says how others do, and one line in FORMATS.
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
from pipeline.storage.outputs import write_json
from pipeline.teachers.backbone import INTERPOLATION, Backbone, save_backbone, timm_config
from pipeline.teachers.models import LOCAL
from singer.backbones import block_outputs, depth
from singer.errors import UserError

PREPROCESS = "preprocess.json"
ONNX = "model.onnx"
TORCH_EXPORT = "model.pt2"
# Another size than those compared, so that a batch axis that is not dynamic shows.
_TRACED, _COMPARED = 2, (3, 1)
# The first axis of the input may have any length.
_SHAPES = ({0: torch.export.Dim("batch", min=1)},)
# From an image to the input, without singer.
_PIXELS = f"""with open("{PREPROCESS}") as file:
    p = json.load(file)
image = Image.open("image.png").convert("RGB")
image = ImageOps.fit(image, (p["size"], p["size"]), Image.Resampling[p["interpolation"].upper()])
pixels = (np.asarray(image) / 255 - p["mean"]) / p["std"]
images = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # a batch of any size"""


@dataclass(frozen=True)
class Student:
    """What is exported. module: normalised images (B, 3, size, size) -> "pooled" (B, d) or "tokens" (B, N, d)."""

    vit: Backbone
    module: nn.Module
    output: str

    @property
    def preprocess(self) -> dict[str, Any]:
        """From an RGB image to the input: largest centred square, resized, / 255, minus mean, over std, as CHW."""
        return {
            "size": self.vit.image_size,
            "crop": "center-square",
            "interpolation": INTERPOLATION,
            "mean": self.vit.mean,
            "std": self.vit.std,
        }

    def images(self, count: int) -> Tensor:
        """Always the same random input (count, 3, size, size)."""
        shape = (count, 3, self.vit.image_size, self.vit.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(count))


class LastBlock(nn.Module):
    """Raw tokens (B, N, d) of the last block: what the targets of training are and what probes read by default."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.last = depth(model) - 1

    def forward(self, images: Tensor) -> Tensor:
        return block_outputs(self.model, images, [self.last])[self.last]


@dataclass(frozen=True)
class Written:
    """load: the student's function, as read back from what was written; snippet: Python that does so, for the card.

    packages: those beside torch and timm whose versions matter.
    """

    load: Callable[[Tensor], Tensor]
    snippet: str
    packages: tuple[str, ...] = ()


def write_timm(student: Student, folder: Path) -> Written:
    """timm's local-dir layout, as the run itself has it."""
    _require_whole_model(student, "timm")
    save_backbone(student.vit, student.vit.model.state_dict(), folder)
    return _read_timm(student, folder)


def write_hf(student: Student, folder: Path) -> Written:
    """A repository of the Hugging Face Hub that timm (`hf-hub:`) and the TimmWrapper of transformers read."""
    _require_whole_model(student, "hf")
    config = timm_config(student.vit)
    # TimmWrapper gives num_classes itself and fails if it is here too; timm takes it from pretrained_cfg.
    config["model_args"] = {k: v for k, v in config["model_args"].items() if k != "num_classes"}
    write_json(folder / "config.json", config)
    state = {k: v.contiguous() for k, v in student.vit.model.state_dict().items()}
    # Versions of transformers refuse safetensors that do not say which framework wrote them.
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return _read_timm(student, folder)


def write_onnx(student: Student, folder: Path) -> Written:
    """model.onnx with a dynamic batch axis and the preprocessing among its metadata.

    Raises UserError if the packages of the extra are missing.
    """
    packages = ("onnx", "onnxruntime", "onnxscript")
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(packages)}")
    import onnxruntime

    with warnings.catch_warnings():
        # Of torch on itself, while it copies the traced program.
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

{_PIXELS}
session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])
({student.output},) = session.run(None, {{"images": images}})"""
    return Written(load, snippet, packages)


def write_torch_export(student: Student, folder: Path) -> Written:
    """model.pt2 of torch.export with a dynamic batch axis and preprocess.json within."""
    program = trace(student)
    # Otherwise stored too, as the only pickle in the file.
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

{_PIXELS}
model = torch.export.load("{TORCH_EXPORT}").module()
with torch.inference_mode():
    {student.output} = model(torch.from_numpy(images))"""
    return Written(module, snippet)


def trace(student: Student) -> ExportedProgram:
    """The student's graph, without the traces that name source files of this machine."""
    program = torch.export.export(student.module, (student.images(_TRACED),), dynamic_shapes=_SHAPES, strict=False)
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
    """The largest difference between the student's outputs and those of what was read back.

    Raises UserError if it is beyond settings.tolerance.
    """
    largest = 0.0
    for count in _COMPARED:
        images = student.images(count)
        expected = student.module(images)
        difference = float((load(images) - expected).abs().max())
        # Written so that NaN fails too.
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
    vit = student.vit
    tokens = "patches, prefix" if vit.prefix else "patches"
    more = ", return_prefix_tokens=True" if vit.prefix else ""
    layout = "NLC" if vit.is_vit else "NCHW"
    snippet = f"""import timm
import torch
from PIL import Image

model = timm.create_model("{LOCAL}.", pretrained=True).eval()  # the place of this folder
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
images = transform(Image.open("image.png").convert("RGB")).unsqueeze(0)
with torch.inference_mode():
    pooled = model(images)
    # Tokens of the last block as they are, before the final norm:
    last = {{"indices": 1, "norm": False, "output_fmt": "{layout}", "intermediates_only": True}}
    {tokens} = model.forward_intermediates(images, **last{more})[0]"""
    return Written(timm.create_model(f"{LOCAL}{folder}", pretrained=True).eval(), snippet)
