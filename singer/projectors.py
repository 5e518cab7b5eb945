"""How a student's tokens come to the teacher's width: by a linear map at each block, or fused over blocks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from singer.matching import resize_tokens


class Linear(nn.ModuleDict):
    """A linear map for each block; widths, targets: {teacher block: channels of the student, of the teacher}."""

    def __init__(self, widths: Mapping[int, int], targets: Mapping[int, int]) -> None:
        super().__init__({str(b): nn.Linear(widths[b], targets[b]) for b in widths})

    def forward(
        self, tokens: Mapping[int, Tensor], prefix: int, grids: Mapping[int, tuple[int, int]] | None
    ) -> dict[int, Tensor]:
        """Project tokens {teacher block: (B, N, d)}."""
        return {int(b): project(tokens[int(b)]) for b, project in self.items()}


class Review(nn.Module):
    """Fuse the student's deeper blocks into shallower ones before they are compared (ReviewKD, arXiv 2104.09044).

    From the deepest block on, what was fused so far and the tokens of the next shallower block are mixed by two gates,
    which a token's own content sets. The paper's 3x3 convolutions are linear maps here, so that sampled patches and CLS
    can be fused, too.
    """

    def __init__(self, widths: Mapping[int, int], targets: Mapping[int, int]) -> None:
        super().__init__()
        self.order = sorted(widths, reverse=True)
        middle = min(512, widths[self.order[0]])
        self.enter = nn.ModuleDict(
            {str(b): nn.Sequential(nn.Linear(widths[b], middle, bias=False), nn.LayerNorm(middle)) for b in self.order}
        )
        self.gates = nn.ModuleDict({str(b): nn.Linear(2 * middle, 2) for b in self.order[1:]})
        self.leave = nn.ModuleDict({str(b): nn.Linear(middle, targets[b]) for b in self.order})

    def forward(
        self, tokens: Mapping[int, Tensor], prefix: int, grids: Mapping[int, tuple[int, int]] | None
    ) -> dict[int, Tensor]:
        """Fuse and project tokens {teacher block: (B, N, d)}; grids: of these tokens, None if all are alike."""
        found: dict[int, Tensor] = {}
        deeper, before = None, None
        for block in self.order:
            fused = self.enter[str(block)](tokens[block])
            if deeper is not None and before is not None:
                if grids is not None:
                    deeper = resize_tokens(deeper, prefix, grids[before], grids[block])
                gates = torch.sigmoid(self.gates[str(block)](torch.cat([fused, deeper], dim=-1)))
                fused = fused * gates[..., :1] + deeper * gates[..., 1:]
            found[block], deeper, before = self.leave[str(block)](fused), fused, block
        return found


PROJECTORS: dict[str, type[Linear] | type[Review]] = {"linear": Linear, "review": Review}
