"""Students of the families that small models are made of: each trains a step, and each export gives its outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import seeded, world_config

from pipeline.models.backbone import save_backbone
from pipeline.models.loading import create_model, load_saved
from pipeline.stages.distill import distill
from pipeline.stages.export import export
from pipeline.storage.tensors import read_tensors, write_tensors
from pipeline.students.export_formats import FORMATS

_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8}
_FOUR = (1, 1, 1, 1)
_DIMS = (8, 16, 24, 32)
# student: what shrinks it
STUDENTS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_siglip_224": _VIT,
    "vit_small_patch16_dinov3": _VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": _FOUR, "num_heads": (1, 2, 2, 2), "window_size": 2},
    "convnext_atto": {"depths": _FOUR, "dims": _DIMS},
    "mobilenetv4_conv_small_050": {},
    "fastvit_t8": {"layers": _FOUR, "embed_dims": (8, 16, 32, 64)},
    "efficientvit_b0": {},
    "tiny_vit_5m_224": {"embed_dims": _DIMS, "depths": _FOUR, "num_heads": _FOUR},
    "repvit_m1": {"embed_dim": _DIMS, "depth": _FOUR},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_trains_a_step_and_is_exported(name: str, world: Path, tmp_path: Path) -> None:
    """`export` itself compares what it wrote with the student, and writes nothing that differs."""
    torch.manual_seed(seeded(0))
    student = create_model(name, 64, STUDENTS[name], None, False, "model")
    save_backbone(student, student.model.state_dict(), tmp_path / "new")
    sets = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    sets += [f"student.name=local-dir:{tmp_path / 'new'}", "student.image_size=64", "distill.epochs=1"]
    config = world_config(world, *sets, "distill.batch_size=100")
    run = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert run.steps == 1 and np.isfinite(run.loss)
    trained = load_saved(tmp_path / "run" / "student").model
    before = student.model.state_dict()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in trained.state_dict().items())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seeded(1)))
    for to in FORMATS:
        assert export(config, tmp_path / "run", tmp_path / to, to).max_difference < 1e-4
        if to in ("timm", "hf"):
            again = timm.create_model(f"local-dir:{tmp_path / to}", pretrained=True).eval()
            with torch.inference_mode():
                torch.testing.assert_close(again(images), trained(images))


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    """Tied weights, and a view of another tensor: safetensors itself refuses both."""
    weight = torch.randn(4, 3)
    state = {"encoder": weight, "decoder": weight, "row": weight[1], "turned": weight.T}
    write_tensors(tmp_path / "w", state)
    again = read_tensors(tmp_path / "w")
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())
