"""Students with batch normalisation: over processes, and where a batch ends in one record."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RESNET, world_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.cache.stored import Decoded
from pipeline.config import StudentConfig
from pipeline.data.sampler import EpochOrder, batch_indices, smallest_part
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.training.batch import Batch
from pipeline.training.batch_norm import synchronise
from singer.errors import UserError


def processes(count: int, device: str) -> Any:
    return SimpleNamespace(num_processes=count, device=torch.device(device), is_main_process=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_synchronised_layers_are_the_same_model(name: str) -> None:
    """Activations that timm's layers hold are kept, and so are names of weights and the tensors themselves."""
    model = new_student(StudentConfig(name=name), 64).model.eval()
    images, before = torch.randn(2, 3, 64, 64), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(images)
        synchronise(model, processes(2, "cuda"))
        torch.testing.assert_close(model(images), expected)
    assert all(model.get_parameter(n) is p for n, p in before.items())
    kinds = {type(m) for m in model.modules() if isinstance(m, _BatchNorm)}
    assert kinds and all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)


def test_what_cannot_be_synchronised_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = new_student(StudentConfig(name="test_resnet"), 32).model
    kinds = [type(m) for m in copy.deepcopy(model).modules()]
    synchronise(model, processes(1, "cuda"))
    synchronise(new_student(StudentConfig(name="test_convnext"), 32).model, processes(2, "cpu"))
    assert capsys.readouterr().err == ""
    synchronise(model, processes(2, "cpu"))
    told = capsys.readouterr().err
    assert told.startswith("note: on the cpu each process normalises its own part of a batch") and told.count("\n") == 1
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("records", range(1, 14))
@pytest.mark.parametrize("batch", [1, 4, 5, 20])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_smallest_part(records: int, batch: int, world: int) -> None:
    """Against all shares of an epoch, split as lessons are."""
    order = EpochOrder(records, 0, 0)
    for parts in (1, 2, 3):
        sizes = set()
        for step in range(-(-records // batch)):
            for rank in range(world):
                n = len(batch_indices(order, step, batch, rank, world).records)
                whole = Batch({}, [Decoded({})], torch.zeros(n), torch.zeros(n))
                sizes |= {len(part.weights) for part in whole.split(parts)}
        assert smallest_part(records, batch, world, parts) == min(sizes)


@pytest.mark.parametrize("sets", [["distill.batch_size=33"], ["distill.accumulate=16"]])
def test_one_record_at_the_end_of_an_epoch(world: Path, tmp_path: Path, sets: list[str]) -> None:
    """Refused before anything is written, where maps have one position, and only there."""
    message = "leave a part of one record, and batch normalisation in test_resnet cannot be trained on one; change"
    with pytest.raises(UserError, match=message):
        distill(world_config(world, *RESNET, *sets), world / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name, more in (
        ("large", [*RESNET, "student.image_size=64", "distill.epochs=1"]),
        ("vit", ["distill.epochs=1"]),
    ):
        distill(world_config(world, *more, *sets), world / "cache", tmp_path / name)
