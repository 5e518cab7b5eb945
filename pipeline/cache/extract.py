"""Compute the teacher's features: views of records -> features of its blocks."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.manifest import TeacherManifest
from pipeline.cache.view_reader import ViewReader, copies_of
from pipeline.config import Config
from pipeline.data.views import channel_moments, standardise
from pipeline.models.backbone import Backbone, weight_hash
from pipeline.runtime.buffers import empty, moved
from pipeline.runtime.compiling import Compilable
from pipeline.runtime.devices import autocast, resolved
from pipeline.runtime.prefetch import prefetch
from pipeline.teachers.placement import place_model
from singer.backbones import block_outputs, depth, resolve_blocks
from singer.errors import UserError
from singer.sizes import Size
from singer.suffix import find_suffix

# Codecs are calibrated on so many records.
CALIBRATION_RECORDS = 256


class Extractor:
    """A teacher that computes features of blocks, and its description for the manifest.

    The teacher is moved to the device, or to where config.teacher.offload says, and computes in cache.precision.
    """

    def __init__(self, config: Config, backbone: Backbone, device: torch.device) -> None:
        self.config, self.backbone, self.device = config, backbone, device
        self.teacher = TeacherManifest(
            name=config.teacher.name,
            architecture=backbone.architecture,
            model_args=backbone.model_args,
            weights=weight_hash(backbone.model.state_dict()),
            depth=depth(backbone.model),
            width=backbone.width,
            prefix_tokens=backbone.prefix,
            class_token=backbone.has_cls,
            grid=backbone.grid,
            image_size=backbone.image_size,
            mean=backbone.mean,
            std=backbone.std,
            precision=resolved(config.cache.precision),
            dtype=config.teacher.dtype,
            shapes=tuple(backbone.layout) if len(set(backbone.layout)) > 1 else None,
            copies=config.teacher.copies,
        )
        self.copying = self.teacher.copying
        place_model(backbone.model, self.device, config.teacher.offload)
        self._moments = channel_moments(backbone.mean, backbone.std, self.device)
        self._model = self._compilable()

    def configured(self, config: Config) -> "Extractor":
        """Return the same teacher, where it is, with other settings of the cache."""
        other = copy(self)
        other.config = config
        if config.cache.compile != self.config.cache.compile:
            other._model = other._compilable()
        return other

    def _compilable(self) -> Compilable[Callable[..., dict[int, Tensor]]]:
        plain = partial(block_outputs, self.backbone.model)
        able = self.device.type == "cuda" and self.config.teacher.offload == "none"
        return Compilable(plain, self.config.cache.compile, able, "cache.compile")

    @property
    def blocks(self) -> list[int]:
        """Return the teacher's blocks that are cached (cache.blocks), by number."""
        return resolve_blocks(self.config.cache.blocks, self.teacher.depth)

    def suffix_state(self, first_block: int) -> dict[str, Tensor] | None:
        """Return the state of the teacher's suffix from first_block on; None if it has none."""
        model, size = self.backbone.model, self.teacher.image_size
        return find_suffix(model, self.backbone.architecture, self.backbone.model_args, first_block, size)

    @torch.inference_mode()
    def features(self, pixels: Tensor, blocks: Sequence[int], copies: Tensor | None = None) -> dict[int, Tensor]:
        """Compute {block: features (n, N, d) float32} of pixels (n, height, width, 3) uint8.

        copies: (n, count, 3), those of data.views.draw_copies; needed if, and only if, the teacher has copies.
        """

        def outputs(images: Tensor) -> dict[int, Tensor]:
            images = images.to(self.backbone.dtype)
            if len(images) > 1:
                # One graph for every number of views: the last batch of a Zarr shard is smaller than the others.
                torch._dynamo.mark_dynamic(images, 0)
            with autocast(self.device, self.config.cache.precision):
                found = self._model.run(lambda model: model(images, tuple(blocks)))
            return {block: x.to(self.device, torch.float32) for block, x in found.items()}

        images = standardise(moved(pixels, self.device), self._moments)
        if self.copying is None:
            return outputs(images)
        assert copies is not None
        grids = {block: self.teacher.grid_of(block) for block in blocks}
        return self.copying.average(outputs, images, copies, self.teacher.prefix_tokens, grids)

    def trial(self, pixels: Tensor) -> dict[int, Tensor]:
        """Compute {block: features (n, N, d) float32} of the cached blocks of views (n, height, width, 3) uint8.

        This is for measurements: if the teacher has copies, they are drawn without the keys of the images.
        """
        numbers, copying = range(len(pixels)), self.copying
        copies = None if copying is None else copies_of(0, [("", number) for number in numbers], copying)
        return self.features(pixels, self.blocks, copies)

    def empty_batch(self, views: int) -> dict[int, Tensor]:
        """Compute the features of so many black views, of the blocks that are cached, to see how long it takes."""
        return self.trial(empty((views, *Size.of(self.teacher.image_size), 3), "uint8").zero_())

    def sample(self, read: ViewReader, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Return {block: features} of a fixed sample that is spread over all records, on the CPU.

        Broken images are left out. Raises UserError if all of them are broken.
        """
        if not blocks:
            return {}
        settings, count = self.config.cache, min(CALIBRATION_RECORDS, len(read))
        records = np.linspace(0, len(read) - 1, count).round().astype(np.int64)
        batches = np.array_split(records, -(-count // settings.views_at_once))
        outputs: list[dict[int, Tensor]] = []
        broken: dict[int, str] = {}
        for batch, views in zip(batches, prefetch(read, batches, settings.workers), strict=True):
            broken |= views.unreadable
            good = views.found["width"] > 0
            if good.any():
                pixels = views.pixels[torch.from_numpy(good)]
                copies = None if views.copies is None else views.copies[torch.from_numpy(good)]
                outputs.append({b: x.cpu() for b, x in self.features(pixels, blocks, copies).items()})
                check_finite(outputs[-1], batch[good], read.key)
        if not outputs:
            first, why = next(iter(broken.items()))
            key = read.images.keys[first]
            raise UserError(f"none of {count} sampled images can be decoded; the first is {key!r}: {why}")
        return {b: torch.cat([o[b] for o in outputs]) for b in blocks}


def check_finite(features: dict[int, Tensor], records: np.ndarray, key: Callable[[int], str]) -> None:
    """Raise UserError naming the image of the first record with a NaN or Inf. key: record -> the key of its image."""
    for block, x in features.items():
        if torch.isfinite(x.sum()):  # this is thirty times as fast as a check of every number
            continue
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            name = key(int(records[int(bad.nonzero()[0])]))
            raise UserError(
                f"block {block} gives NaN or Inf for image {name!r}; run the teacher with cache.precision no and "
                "teacher.dtype float32"
            )
