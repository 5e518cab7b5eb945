"""Names of models, as users write them; nothing here waits for torch or timm."""

import re
from pathlib import Path

LOCAL = "local-dir:"
# Names with a slash by which Hugging Face and OpenAI know models; timm has most of these under names of its own.
_MAKERS = "apple|facebook|google|laion|microsoft|nvidia|openai|timm"
_HUBS = re.compile(rf"(?:{_MAKERS})/[^/]+$|(?i:clip )?ViT-\w+/\d+\b[^/]*$")


def local_folder(name: str) -> Path | None:
    """Return the folder that a `local-dir:` name stands for; None for other names."""
    return Path(name.removeprefix(LOCAL)).expanduser() if name.startswith(LOCAL) else None


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path: names of timm have no slash, and others a prefix such as hf-hub:."""
    return ":" not in name and ("/" in name or name.startswith((".", "~"))) and not _HUBS.match(name)
