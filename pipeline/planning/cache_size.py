"""The size of a cache for each way to store the features, from the features of a few records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, few_records
from pipeline.cache.codecs import CODECS, naming_block
from pipeline.cache.format import CALIBRATION, COMPLETE, FEATURES, FIDELITY, JOURNAL, POSITIONS, TAIL
from pipeline.cache.quantization import quantization_errors
from pipeline.cache.zarr_shards import pack_zarr_shard
from pipeline.config import Config
from pipeline.models.backbone import Backbone
from pipeline.outputs.provenance import PROVENANCE
from pipeline.outputs.resuming import CACHE_MANIFEST, CONFIG
from singer.backbones import depth
from singer.errors import UserError
from singer.tokens import take_patches

# The share of the free disk that a cache may fill; the rest is for other files.
_USABLE = 0.95
_END_OF_SHARD = 4
# The files of a cache that do not grow with its records; all others do.
_FIXED = (TAIL, CALIBRATION, FIDELITY, CACHE_MANIFEST, COMPLETE, "zarr.json", CONFIG, PROVENANCE)
_INDEX_ENTRY = 16


@dataclass(frozen=True)
class PlanOption:
    """A way to store the features.

    error: the relative quantization error of clean patch tokens, at the worst block; bytes_per_image: of the features
    of all blocks and views; bytes: of the whole cache; fits: whether it fits on the free disk; max_views, max_blocks:
    how many views of these blocks, and how many blocks of these views, would fit. The last three are None if the disk
    is not known.
    """

    codec: str
    token_share: float
    error: float
    bytes_per_image: int
    bytes: int
    fits: bool | None
    max_views: int | None
    max_blocks: int | None


class SizeEstimate:
    """The size of the cache for each way to store the features.

    images: the number in the data set; features, calibration: of some records, by block; sizes: {file: bytes} of a
    small cache with `records` records, for everything but features; free: bytes of the disk, or None if not known.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        images: int,
        features: Mapping[int, Tensor],
        calibration: Mapping[int, Calibration],
        sizes: Mapping[str, int],
        records: int,
        free: int | None,
    ) -> None:
        self.config, self.backbone, self.images, self.free = config, backbone, images, free
        self._features, self._calibration = features, calibration
        self.tail_bytes = sizes.get(TAIL, 0)
        fixed = {n: size for n, size in sizes.items() if n.rpartition("/")[2] in _FIXED or n.startswith(f"{JOURNAL}/")}
        growing = {name: size for name, size in sizes.items() if name not in fixed}
        other = sum(size for name, size in growing.items() if not name.startswith((f"{FEATURES}/", f"{POSITIONS}/")))
        self._fixed, self._other = sum(fixed.values()), other / records

    def options(self, codec: str, shares: Sequence[float]) -> list[PlanOption]:
        """Return one option for every share of tokens.

        The result is empty if the features exceed the codec's range; for the configured codec, UserError is raised.
        """
        try:
            error = 0.0
            for block, x in self._features.items():
                with naming_block(block):
                    measured = quantization_errors(CODECS[codec], x, self._calibration[block])
                error = max(error, measured["clean"]["relative_error"])
            return [self.option(codec, share, error) for share in shares]
        except UserError:
            if codec == self.config.cache.codec:
                raise
            return []

    def option(self, codec: str, share: float, error: float) -> PlanOption:
        """Return the option of a codec that stores this share of the patch tokens; error: see PlanOption."""
        views, blocks = self.config.views.count, len(self._features)
        patches = next(iter(self._features.values())).shape[1] - self.backbone.prefix
        stored = max(1, round(share * patches))
        features = sum(self.block_bytes(codec, block, stored) for block in self._features)
        beside = self._other + (2 * stored + _INDEX_ENTRY if stored < patches else 0)

        def total(views: float, count: float) -> float:
            return self.images * views * (features * count / blocks + beside) + self._fixed

        whole, an_image = round(total(views, blocks)), round(views * features)
        if self.free is None:
            return PlanOption(codec, share, error, an_image, whole, None, None, None)
        room = _USABLE * self.free
        a_view = total(1, blocks) - self._fixed
        a_block = total(views, 1) - total(views, 0)
        return PlanOption(
            codec=codec,
            token_share=share,
            error=error,
            bytes_per_image=an_image,
            bytes=whole,
            fits=whole <= room,
            max_views=max(0, int((room - self._fixed) / a_view)),
            max_blocks=max(0, min(depth(self.backbone.model), int((room - total(views, 0)) / a_block))),
        )

    def block_bytes(self, codec: str, block: int, stored: int) -> float:
        """Return the stored bytes of one record's features at a block, if `stored` of its patches are kept."""
        x, prefix = self._features[block], self.backbone.prefix
        patches = x.shape[1] - prefix
        if stored < patches:
            generator = torch.Generator().manual_seed(0)
            drawn = [torch.randperm(patches, generator=generator)[:stored].sort().values for _ in range(len(x))]
            x = take_patches(x, prefix, torch.stack(drawn).to(x.device))
        size = 0.0
        for few in few_records(x):
            for values in CODECS[codec].encode(few, self._calibration[block]).values():
                pieces = pack_zarr_shard(values.to("cpu"), len(few))
                size += sum(map(len, pieces)) - _END_OF_SHARD
        return size / len(x)
