"""Files that travel with the package: recipes and the demo's teacher."""

import os
from pathlib import Path


def resource(name: str) -> Path:
    """configs/ or data/... : inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.exists() else here.parent / name


def memory_bytes() -> int:
    """Of this machine, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
