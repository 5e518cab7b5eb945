"""The versions of the packages that a command uses, and its machine."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# Where the distribution has another name than the package: `singer` of the package index is a stranger's.
_DISTRIBUTIONS = {"singer": "singer-vit"}
_PACKAGES = ("singer", "torch", "timm", "zarr", "obstore", "webdataset", "accelerate", "numpy", "pillow")


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return {name: version} of Python and the packages; the version of one that is absent is "not installed"."""
    return {"python": platform.python_version()} | {p: _version(p) for p in packages}


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> str:
    """Describe the platform, the CPU cores that this process may use, the memory and the GPUs, in one line."""
    # Imported late: `singer --version` needs no torch.
    import torch

    gpus = [
        torch.cuda.get_device_properties(number)
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    listed = ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus) or "no GPU"
    cores, memory = len(os.sched_getaffinity(0)), memory_bytes() / 1e9
    return f"{platform.platform()}, {cores} CPU cores, {memory:.0f} GB of memory, {listed}"


# Where a container's limit is, in the two versions of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Return the bytes of memory, used or not, that this machine has, or this container may use."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, _LIMITS):
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):  # there is no such file, or no limit ("max")
            continue
    return min(found)
