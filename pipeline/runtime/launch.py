"""Start this very command again on several GPUs, under Accelerate's launcher."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from singer.errors import UserError

_OPTION = "--gpus"


def on_gpus(script: Path, count: int) -> None:
    """Replace this process by the launcher of `count` processes that run `script` with the same arguments.

    Return if one process is enough, or if a launcher has started this one. Raises UserError if there are fewer GPUs.
    """
    if "RANK" in os.environ:
        return
    import torch

    found = torch.cuda.device_count()
    if found < count:
        raise UserError(f"{_OPTION} {count}: this machine has {found or 'no'} GPU(s); give fewer, or leave it out")
    if count > 1:
        launch = launcher(script, count, sys.argv[1:])
        os.execv(launch[0], launch)


def launcher(script: Path, count: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs a script on so many GPUs of this machine, whatever Accelerate's own settings are."""
    # The port 0 is any free one. singer sets the precision itself.
    settings = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(count), "--main_process_port", "0"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *settings, *plain, str(script), *arguments]
