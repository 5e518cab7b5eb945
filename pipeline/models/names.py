"""Names of models, as users write them; nothing here waits for torch or timm."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from singer.names import HF, OWN

__all__ = ["CONFIG", "HF", "LOCAL", "OWN", "is_function", "is_transformers", "local_folder", "looks_like_path"]

LOCAL = "local-dir:"
CONFIG = "config.json"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# Names with a slash by which Hugging Face and OpenAI know models; timm has most of these under names of its own.
_MAKERS = "apple|facebook|google|laion|microsoft|nvidia|openai|timm"
_HUBS = re.compile(rf"(?:{_MAKERS})/[^/]+$|(?i:clip )?ViT-\w+/\d+\b[^/]*$")


def local_folder(name: str) -> Path | None:
    """Return the folder that a `local-dir:` name stands for; None for other names."""
    return Path(name.removeprefix(LOCAL)).expanduser() if name.startswith(LOCAL) else None


def is_function(name: str) -> bool:
    """Return whether a name is a function of the user's own, package.module:function."""
    return _FUNCTION.fullmatch(name) is not None and not name.startswith((HF, OWN))


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a model of transformers, by its content."""
    return "model_type" in config and "architecture" not in config


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path: names of timm have no slash, and others a prefix such as hf-hub:."""
    return ":" not in name and ("/" in name or name.startswith((".", "~"))) and not _HUBS.match(name)
