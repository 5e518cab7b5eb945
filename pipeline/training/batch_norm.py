"""Set up batch normalisation in students: over all processes where the device can do it, never over a single value."""

import copy

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import TrainingConfig
from pipeline.data.sampler import smallest_part
from pipeline.models.backbone import Backbone
from pipeline.runtime.progress import say
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.sizes import Size


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has layers of batch normalisation."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def synchronise(model: nn.Module, accelerator: Accelerator) -> None:
    """Make batch normalisation take its statistics over all processes; print a note where it cannot."""
    if accelerator.num_processes == 1 or not has_batch_norm(model):
        return
    if accelerator.device.type == "cuda":
        # torch's own conversion would drop the activation that timm's layers hold.
        convert_sync_batchnorm(model)
    elif accelerator.is_main_process:
        say(
            f"note: on the {accelerator.device.type} each process normalises its own part of a batch, and the running "
            "statistics of batch normalisation are those of the first process"
        )


def check_parts(student: Backbone, last_block: int | None, settings: TrainingConfig, records: int, world: int) -> None:
    """Raise UserError if a part of some batch has only one record, and the blocks cannot be trained on one.

    last_block: the last that is trained; None: the whole model; world: the number of processes.
    """
    if smallest_part(records, settings.batch_size, world, settings.accumulate) > 1 or not has_batch_norm(student.model):
        return
    if any(isinstance(module, nn.SyncBatchNorm) for module in student.model.modules()):
        return  # the statistics are over the parts of all processes, and each process has one
    trial = copy.deepcopy(student.model).train()
    image = torch.zeros(1, 3, *Size.of(student.image_size)).to(next(trial.parameters()))
    try:
        trial(image) if last_block is None else block_outputs(trial, image, [last_block])
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # this is in torch's message
            raise
        raise UserError(
            f"{records} records in batches of {settings.batch_size}, on {world} processes in {settings.accumulate} "
            f"parts each, leave a part of one record, and batch normalisation in {student.architecture} cannot be "
            f"trained on one; change {settings.section}.batch_size or {settings.section}.accumulate"
        ) from None
