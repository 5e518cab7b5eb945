"""The fusion of blocks of ReviewKD (arXiv 2104.09044)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from singer.projectors.base import Projection, ProjectorSpec
from singer.tokens import resize_tokens


class Review(Projection):
    """Fuse the student's deeper blocks into shallower ones before they are compared (ReviewKD, arXiv 2104.09044).

    From the deepest block on, what was fused so far and the tokens of the next shallower block are mixed by two gates,
    which a token's own content sets. The paper's 3x3 convolutions are linear maps here, so that sampled patches and CLS
    can be fused, too.
    """

    def __init__(self, specs: Mapping[int, ProjectorSpec]) -> None:
        super().__init__()
        widths = {block: spec.widths[-1] for block, spec in specs.items()}
        self.prefix = next(iter(specs.values())).prefix
        self.order = sorted(widths, reverse=True)
        middle = min(512, widths[self.order[0]])
        self.enter = nn.ModuleDict(
            {str(b): nn.Sequential(nn.Linear(widths[b], middle, bias=False), nn.LayerNorm(middle)) for b in self.order}
        )
        self.gates = nn.ModuleDict({str(b): nn.Linear(2 * middle, 2) for b in self.order[1:]})
        self.leave = nn.ModuleDict({str(b): nn.Linear(middle, specs[b].target) for b in self.order})

    def forward(
        self, tokens: Mapping[int, Sequence[Tensor]], grids: Mapping[int, tuple[int, int]] | None
    ) -> dict[int, Tensor]:
        """Fuse and project the matched tokens {teacher block: (B, N, d)}; grids: of them, None if all are alike."""
        found: dict[int, Tensor] = {}
        deeper, before = None, None
        for block in self.order:
            fused = self.enter[str(block)](tokens[block][-1])
            if deeper is not None and before is not None:
                if grids is not None:
                    deeper = resize_tokens(deeper, self.prefix, grids[before], grids[block])
                gates = torch.sigmoid(self.gates[str(block)](torch.cat([fused, deeper], dim=-1)))
                fused = fused * gates[..., :1] + deeper * gates[..., 1:]
            found[block], deeper, before = self.leave[str(block)](fused), fused, block
        return found
