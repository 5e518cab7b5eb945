"""What tests of training do to runs, and read from them."""

from pathlib import Path

import pytest
import torch

import pipeline.training.batch as stage
from pipeline.data.sampler import BatchIndices
from pipeline.training.run_log import read_log

CPU = torch.device("cpu")
WEIGHTS = "student/model.safetensors"


def epochs_fall(run: Path, epochs: int) -> bool:
    """The mean loss of the last epoch is below that of the first: single batches differ from each other."""
    losses = [line["loss"] for line in read_log(run / "log.jsonl")]
    assert len(losses) == 7 * epochs
    return sum(losses[-7:]) < sum(losses[:7])


def die_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the next run after it has read so many batches."""
    calls, pixels = 0, stage.BatchLoader.pixels

    def dying(self: stage.BatchLoader, part: BatchIndices) -> object:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise KeyboardInterrupt
        return pixels(self, part)

    monkeypatch.setattr(stage.BatchLoader, "pixels", dying)
