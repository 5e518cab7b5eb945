"""What a refiner of a block may be computed from: the cache and nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from singer.artifacts import BlockScale, clean_mask, expected_patches, patch_norms
from singer.errors import UserError
from singer.suffix import NO_SUFFIX, TeacherSuffix


@dataclass(frozen=True)
class FitContext:
    """A sample of a block's features, their scale, and the frozen suffix of the teacher that reads them.

    teacher_suffix: None if the teacher has none. tokens: (n, N, d) float32, prefix tokens first. grid: (rows, columns)
    of the patches; None where only some patches of each image are stored. seed: seed of all that is drawn.
    """

    teacher_suffix: TeacherSuffix | None
    block: int
    tokens: Tensor
    scale: BlockScale
    prefix: int
    grid: tuple[int, int] | None
    seed: int = 0

    @property
    def suffix(self) -> TeacherSuffix:
        """Return the teacher's suffix. Raises UserError if it has none."""
        if self.teacher_suffix is None:
            raise UserError(NO_SUFFIX)
        return self.teacher_suffix

    @property
    def patches(self) -> Tensor:
        """Return the patch tokens (n, patches, d)."""
        return self.tokens[:, self.prefix :]

    @property
    def clean(self) -> Tensor:
        """Return True (n, patches) where a token is not an artifact."""
        return clean_mask(patch_norms(self.tokens, self.prefix), self.scale.threshold)

    def generator(self) -> torch.Generator:
        """Make a generator on the CPU, so that every device draws the same numbers."""
        return torch.Generator().manual_seed(self.seed)

    def artifact_energy(self) -> Tensor:
        """Compute A = E over artifact tokens of (x - x̃)(x - x̃)ᵀ, (d, d) float64; zero if there are none.

        x̃ is the mean of the clean neighbours, or of all clean tokens of the image where the grid is not whole. In an
        image without a clean token, it is the token scaled down to the threshold.
        """
        patches = self.patches
        clean = self.clean
        expected = expected_patches(patches, clean, self.scale.threshold, self.grid)
        excess = (patches - expected)[~clean].double()
        return excess.T @ excess / max(1, len(excess))
