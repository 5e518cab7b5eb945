"""Images of many tokens: no stage makes anything that grows with their square; attention does not either, if fused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import config_with, draw_images, make_vit
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.backbone import save_backbone
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine

SIZE, PATCH = 256, 4
TOKENS = (SIZE // PATCH) ** 2


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation returns, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                # An expanded tensor takes no memory.
                real = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
                self.numbers = max(self.numbers, real)
        return result


def test_memory_does_not_grow_with_the_square_of_the_tokens(tmp_path: Path) -> None:
    """4,096 tokens, as of 1,024 pixels in patches of 16. The objective gram compares all tokens, and is not tried."""
    draw_images(tmp_path / "images", 1, 2)
    prepare(config_with(), tmp_path / "images", tmp_path / "shards")
    teacher = make_vit(embed_dim=8, depth=2, num_heads=1, patch_size=PATCH, img_size=SIZE)
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    config = config_with(
        f"teacher.name=local-dir:{tmp_path / 'teacher'}", f"teacher.image_size={SIZE}", "cache.blocks=[0,1]",
        "cache.codec=int8", "refine.cleaner=neighbour", "student.dim=8", "student.depth=2", "student.heads=1",
        f"student.patch_size={PATCH}", "distill.epochs=1", "distill.batch_size=2",
    )  # fmt: skip
    with Largest() as largest:
        cache_teacher(config, str(tmp_path / "shards" / "*.tar"), tmp_path / "cache")
        refine(config, tmp_path / "cache", tmp_path / "refiner")
        run = distill(config, tmp_path / "cache", tmp_path / "run", tmp_path / "refiner")
    assert np.isfinite(run.loss) and largest.numbers < TOKENS**2 / 8
