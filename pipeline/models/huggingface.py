"""Load vision models of Hugging Face transformers: `hf:USER/NAME` from the hub, or `hf:FOLDER` from a folder.

Weights are read from safetensors alone, and only by classes of transformers itself.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
from torch import nn

from pipeline.models.backbone import INTERPOLATION, Backbone
from pipeline.models.fetching import first_line, why_not_fetched
from pipeline.models.names import CONFIG, HF, is_transformers
from pipeline.models.weights import read_weights
from pipeline.runtime.logs import adopt_libraries
from pipeline.runtime.progress import say
from pipeline.storage.json_files import read_json
from singer import hf
from singer.described import DescribedMaps
from singer.errors import UserError
from singer.sizes import ImageSize, Size

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Numbers of Pillow's resampling, as processor files have them.
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def create_transformers(
    name: str, image_size: ImageSize | None, weights: Path | None, pretrained: bool, what: str, averaged: bool
) -> Backbone:
    """Build a model of transformers; the arguments are those of loading.create_model.

    Raises UserError if the model, its weights or its image size cannot be used.
    """
    place, subject = name.removeprefix(HF), f"{what} {name}"
    config = _read(place, CONFIG, subject)
    if config is None or not is_transformers(config):
        other = f"; as a model of timm it is hf-hub:{place}" if config and "architecture" in config else ""
        raise UserError(f"{subject}: it has no {CONFIG} of transformers{other}")
    try:
        architecture, arguments = hf.vision_part(config)
        hf.model_class(architecture)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None
    size, mean, std = preprocessing(_processor(place, subject), hf.native_size(hf.configured(architecture, arguments)))
    try:
        if weights is None and pretrained:
            model = _load(place, architecture, arguments, subject)
        else:
            model = hf.build(architecture, arguments).backbone
        described = hf.wrap(architecture, model, image_size or size, mean, std)
    except UserError as error:
        raise error if str(error).startswith(subject) else UserError(f"{subject}: {error}") from None
    if weights is not None:
        load_weights(described.backbone, weights, name, averaged)
    return backbone_of(described, architecture, arguments)


def saved_transformers(
    folder: Path, config: Mapping[str, Any], image_size: ImageSize | None, weights: Path | None
) -> Backbone:
    """Load a model of transformers that `save_backbone` saved; weights: others than those in the folder."""
    architecture, arguments, about = config["architecture"], config["model_args"], config["pretrained_cfg"]
    model = hf.build(architecture, arguments).backbone
    size, mean, std = image_size or Size.of(about["input_size"][1:]).written, tuple(about["mean"]), tuple(about["std"])
    described = hf.wrap(architecture, model, size, mean, std)
    own = (described, folder / WEIGHTS) if weights is None else (described.backbone, weights)
    load_weights(*own, str(folder), True)
    return backbone_of(described, architecture, arguments)


def backbone_of(described: DescribedMaps, architecture: str, arguments: dict[str, Any]) -> Backbone:
    """Return a described model with what is needed to build it again."""
    about = described.description
    return Backbone(described, architecture, arguments, about.image_size, about.mean, about.std)


def load_weights(module: nn.Module, weights: Path, name: str, averaged: bool) -> None:
    """Load a file of weights into a module. Raises UserError that names the first tensor that does not fit."""
    try:
        module.load_state_dict(read_weights(weights, module.state_dict().keys(), averaged))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"weights {weights} do not fit {name}: {' '.join(lines[1:2])[:300]}") from None


def preprocessing(
    processor: Mapping[str, Any], native: ImageSize
) -> tuple[ImageSize, tuple[float, ...], tuple[float, ...]]:
    """Return (size in pixels, mean, std) of a processor file; native: the size if the file has none.

    Its numbers are for pixels of 0 to 255 times rescale_factor; those returned are for pixels of 0 to 1.
    """
    crops = processor.get("do_center_crop") and processor.get("crop_size")
    given = processor.get("crop_size" if crops else "size") or native
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    normalises = processor.get("do_normalize", True)
    mean = processor["image_mean"] if normalises else (0.0,) * 3
    std = processor["image_std"] if normalises else (1.0,) * 3
    scaled = [tuple(round(x / (255 * factor), 9) for x in numbers) for numbers in (mean, std)]
    return _size(given), scaled[0], scaled[1]


def _size(given: Any) -> ImageSize:
    """Return the size that a processor file gives in one of its forms; one side alone is that of a square."""
    match given:
        case int() | (int(), int()):
            return Size.of(given).written
        case {"height": int() as height, "width": int() as width}:
            return Size(height, width).written
        case dict() if len(sides := set(given.values())) == 1 and isinstance(side := sides.pop(), int):
            return side
    raise UserError(f"its processor file gives neither one size nor height and width: {given}")


def _processor(place: str, subject: str) -> dict[str, Any]:
    """Read the processor file. Raises UserError if there is none: nothing else tells mean and standard deviation."""
    read = (_read(place, name, subject) for name in PROCESSORS)
    whole = next((x for x in read if x is not None), None)
    found: dict[str, Any] | None = whole and whole.get("image_processor", whole)
    normalises = found is not None and found.get("do_normalize", True)
    if found is None or (normalises and not {"image_mean", "image_std"} <= set(found)):
        raise UserError(
            f"{subject}: it has no {PROCESSORS[0]} with image_mean and image_std; put that file of its page on the hub "
            "beside its config.json"
        )
    resampling = _RESAMPLING.get(found.get("resample", 3))
    if resampling not in (INTERPOLATION, None):
        say(f"note: {subject} was made for {resampling} resizing; all images are resized by {INTERPOLATION} here")
    return found


def _load(place: str, architecture: str, arguments: Mapping[str, Any], subject: str) -> nn.Module:
    """Build the model with the weights of its place."""
    folder = _weights_folder(place, subject)
    kind, config = hf.model_class(architecture), hf.configured(architecture, arguments)
    _quiet()
    without = {"add_pooling_layer": False} if hf.takes_pooler(kind) else {}
    try:
        model, about = kind.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True, dtype=torch.float32, **without,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise errors of many types
        raise UserError(f"weights of {subject} were not loaded: {first_line(error)}") from error
    missing = [name for name in sorted(about["missing_keys"]) if "mask_token" not in name]
    if missing or about["mismatched_keys"]:
        first = missing[0] if missing else sorted(about["mismatched_keys"])[0]
        raise UserError(f"weights of {subject} were not loaded: they do not have {first} as config.json wants it")
    loaded: nn.Module = model
    return loaded


def _weights_folder(place: str, subject: str) -> Path:
    """Return a folder of this machine with the weights in safetensors; they are fetched if need be."""
    found = _file(place, WEIGHTS, subject)
    if found is None:
        found = _file(place, INDEX, subject)
        if found is None:
            raise UserError(
                f"{subject}: it has no {WEIGHTS}, and other files of weights could run code; in Python, "
                f"transformers' save_pretrained(FOLDER) writes one: give {HF}FOLDER"
            )
        for shard in sorted(set(read_json(found.parent, INDEX, "index of weights")["weight_map"].values())):
            if _file(place, shard, subject) is None:
                raise UserError(f"{subject}: it has no {shard}, which {INDEX} names")
    return found.parent


def _read(place: str, name: str, subject: str) -> dict[str, Any] | None:
    """Read a JSON file of a model; None if the model does not have it."""
    path = _file(place, name, subject)
    return None if path is None else read_json(path.parent, name, "model of transformers")


def _file(place: str, name: str, subject: str) -> Path | None:
    """Return the path of a file of a model in a folder or on the hub, fetched if need be; None if it has no such file.

    Raises UserError if it cannot be fetched.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    adopt_libraries()
    try:
        return Path(hf_hub_download(place, name))
    except LocalEntryNotFoundError as error:
        raise _not_fetched(place, subject, error) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise UserError(
            f"{subject}: its owner asks for consent; log in at https://huggingface.co/{place}, accept the terms there, "
            "then run: hf auth login"
        ) from error
    except Exception as error:  # the hub's client raises errors of many types
        raise _not_fetched(place, subject, error) from error


def _not_fetched(place: str, subject: str, error: Exception) -> UserError:
    why = why_not_fetched(error) or first_line(error)
    return UserError(f"{subject} was not fetched: {why}; give the folder of a downloaded copy as {HF}FOLDER")


def _quiet() -> None:
    """Silence transformers: what matters is told by singer's own errors."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    adopt_libraries()
