"""The teacher at work: views of records -> features of its blocks."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.cache.format import Index, TeacherManifest
from pipeline.cache.pixels import views_of
from pipeline.config import Config
from pipeline.models import Backbone, weight_hash
from pipeline.shards import ImageFile
from pipeline.views import normalise
from singer.backbones import block_outputs, depth, grid_size
from singer.errors import UserError

_CALIBRATION_RECORDS = 256


class Extractor:
    """Images of records -> features of blocks, and what is stored of them."""

    def __init__(self, config: Config, vit: Backbone, accelerator: Accelerator) -> None:
        self.config, self.vit, self.accelerator = config, vit, accelerator
        self.teacher = TeacherManifest(
            name=config.teacher.name,
            architecture=vit.architecture,
            model_args=vit.model_args,
            weights=weight_hash(vit.model.state_dict()),
            depth=depth(vit.model),
            width=vit.width,
            prefix_tokens=vit.prefix,
            class_token=vit.has_cls,
            grid=grid_size(vit.model),
            image_size=vit.image_size,
            mean=vit.mean,
            std=vit.std,
            precision=config.cache.precision,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @torch.inference_mode()
    def features(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """(n, size, size, 3) uint8 -> {block: (n, N, d) float32}."""
        images = normalise(pixels, self.teacher.mean, self.teacher.std, self.device)
        with self.accelerator.autocast():
            outputs = block_outputs(self.vit.model, images, blocks)
        return {block: x.float() for block, x in outputs.items()}

    def sample(self, files: ImageFile, index: Index, blocks: Sequence[int]) -> dict[int, Tensor]:
        """{block: features} of a fixed sample that is spread over all records, on the CPU."""
        if not blocks:
            return {}
        count = min(_CALIBRATION_RECORDS, len(index))
        records = np.linspace(0, len(index) - 1, count).round().astype(np.int64)
        outputs = []
        for batch in np.array_split(records, -(-count // self.config.cache.batch_size)):
            views = views_of(files, index, batch, self.teacher.image_size)
            outputs.append({b: x.cpu() for b, x in self.features(torch.from_numpy(views), blocks).items()})
            check_finite(outputs[-1], batch, index)
        return {b: torch.cat([o[b] for o in outputs]) for b in blocks}


def check_finite(features: dict[int, Tensor], records: np.ndarray, index: Index) -> None:
    for block, x in features.items():
        if torch.isfinite(x.sum()):  # thirty times as fast as looking at every number
            continue
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            key = index.key(int(records[int(bad.nonzero()[0])]))
            raise UserError(
                f"block {block} gives NaN or Inf for image {key!r}; run the teacher with cache.precision no"
            )
