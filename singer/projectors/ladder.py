"""The ladder of projectors of UNIC (arXiv 2408.05088): all blocks of the student have a part in what is compared."""

import torch
from torch import Tensor, nn

from singer.projectors.base import Projector, ProjectorSpec

# Hidden units for each channel of the student; UNIC has 768 and, on the last rung, 3,072 for 768.
_RATIO, _LAST_RATIO = 1, 4
_STD = 0.02


class Ladder(Projector):
    """The sum of an MLP (linear, GELU, linear) of every block up to the matched one; CLS and patches have their own."""

    reads_all = True

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__(spec)
        self.prefix = spec.prefix
        self.cls = self._rungs(spec) if spec.prefix else None
        self.patches = self._rungs(spec)

    def forward(self, *tokens: Tensor) -> Tensor:
        """Project the tokens of all blocks, and add them up."""
        patches = _climb(self.patches, [x[:, self.prefix :] for x in tokens])
        if self.cls is None:
            return patches
        return torch.cat([_climb(self.cls, [x[:, : self.prefix] for x in tokens]), patches], dim=1)

    @staticmethod
    def multiplications(spec: ProjectorSpec) -> int:
        """Return how many multiplications a token takes."""
        *lower, last = spec.widths
        pairs = [*((_RATIO, width) for width in lower), (_LAST_RATIO, last)]
        return sum(ratio * width * (width + spec.target) for ratio, width in pairs)

    @staticmethod
    def _rungs(spec: ProjectorSpec) -> nn.ModuleList:
        """Build one MLP for each block that is read."""
        ratios = [*[_RATIO] * (len(spec.widths) - 1), _LAST_RATIO]
        rungs = nn.ModuleList(
            nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, spec.target))
            for width, ratio in zip(spec.widths, ratios, strict=True)
        )
        for module in rungs.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)
        return rungs


def _climb(rungs: nn.ModuleList, tokens: list[Tensor]) -> Tensor:
    """Return the sum of what the MLPs give for the tokens of their blocks."""
    return torch.stack([rung(x) for rung, x in zip(rungs, tokens, strict=True)]).sum(0)
