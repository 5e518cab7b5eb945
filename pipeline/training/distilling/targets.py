"""Stored features -> what a student is to match."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.data.source_listing import NO_LABEL
from pipeline.models.backbone import Backbone
from singer.errors import UserError
from singer.objectives import Objective, ObjectiveContext, Tokens
from singer.overlap import average_overlap, resample_overlap
from singer.refiner import Refiner
from singer.tokens import resize_tokens, select_tokens, take_patches


class Targets:
    """Turn stored features into what the student must match.

    The targets are on the student's token grid, or on the teacher's grid if the student has several grids. texts: of
    the objective zero-shot.
    """

    def __init__(
        self,
        cache: Cache,
        refiner: Refiner | None,
        student: Backbone,
        device: torch.device,
        texts: Tensor | None = None,
    ) -> None:
        self.cache, self.device, self.texts = cache, device, texts
        self.decode = cache.decoder(device)
        self.refiner = refiner.to(device) if refiner is not None else None
        self.keep_cls = cache.manifest.teacher.class_token and student.has_cls
        self._grid = student.grid if student.gives_tokens else None

    def grid(self, block: int) -> tuple[int, int]:
        """Return the grid of the targets of a teacher's block."""
        return self._grid or self.cache.manifest.teacher.grid_of(block)

    def width(self, block: int) -> int:
        """Return the width of the targets of a teacher's block, in channels."""
        return self.cache.manifest.teacher.width_of(block)

    def objective_context(
        self, blocks: tuple[int, ...], objectives: Sequence[type[Objective]], whole: bool
    ) -> ObjectiveContext:
        """Return what these objectives may know; the teacher's suffix is only loaded if one of them needs it.

        whole: whether the student always sees all patches.
        """
        teacher, labels = self.cache.manifest.teacher, self.cache.index.images.labels
        numbers = np.unique(labels[labels != NO_LABEL])
        classes = int(numbers[-1]) + 1 if len(numbers) > 1 else len(numbers) or None
        return ObjectiveContext(
            blocks,
            teacher.width_of(blocks[-1]),
            int(self.keep_cls),
            self.grid(blocks[-1]) if whole and not self.cache.manifest.sampled else None,
            self.cache.suffix().to(self.device) if any(o.in_teacher_units for o in objectives) else None,
            teacher.prefix_tokens,
            classes,
            self.texts,
            {block: teacher.width_of(block) for block in blocks},
        )

    @torch.no_grad()
    def refine(self, features: dict[int, Tensor]) -> Tokens:
        """Clean and normalise features by the frozen refiner, if there is one.

        This is done in full precision because refinement takes small differences of large values.
        """
        if self.refiner is None:
            return Tokens(features, features)
        with torch.autocast(self.device.type, enabled=False):
            cleaned = {b: self.refiner.clean(x, b) for b, x in features.items()}
            return Tokens({b: self.refiner.normaliser(b)(x) for b, x in cleaned.items()}, cleaned)

    @torch.no_grad()
    def averages(self, features: Mapping[int, Tensor], places: Tensor) -> dict[int, Tensor]:
        """Average the patches of each view over all its image's views that show them: {block: (B, N, d)}.

        features: {block: (V · B, N, d)}, as they are in a Batch; places: those of it.
        """
        teacher = self.cache.manifest.teacher
        with torch.autocast(places.device.type, enabled=False):
            return {
                b: average_overlap(x, teacher.prefix_tokens, teacher.grid_of(b), places) for b, x in features.items()
            }

    def check_whole(self, off: str, why: str) -> None:
        """Raise UserError if the cache has only some of the patches.

        off: how the key of section distill that needs all is set so that it does not; why: it needs them.
        """
        if self.cache.manifest.sampled:
            raise UserError(
                f"distill.{off.partition('=')[0]}: {self.cache.place} holds only some of the patches "
                f"(cache.token_share), and {why}; set distill.{off}"
            )

    def target_tokens(
        self, features: Mapping[int, Tensor], positions: Tensor | None, kept: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Select the tokens that the student has, too, and resize them to the common grid unless they were sampled.

        positions: (B, k), those of sampled patches; kept: (B, k), the patches that the student saw, None for all.
        """
        teacher = self.cache.manifest.teacher
        targets = {b: select_tokens(x, teacher.prefix_tokens, self.keep_cls) for b, x in features.items()}
        if positions is not None:
            return targets
        prefix = int(self.keep_cls)
        targets = {b: resize_tokens(x, prefix, teacher.grid_of(b), self.grid(b)) for b, x in targets.items()}
        return targets if kept is None else {b: take_patches(x, prefix, kept) for b, x in targets.items()}

    @torch.no_grad()
    def overlap_tokens(
        self, features: Mapping[int, Tensor], student: Mapping[int, Tensor], places: Tensor, kept: Tensor | None
    ) -> dict[int, Tensor]:
        """Select the tokens of target_tokens, with patches of other views; the student's own where these show nothing.

        features: {block: (2 B, N, d)} of the views, then of the others; student: {block: (B, N, d)}, what is compared;
        places: those of a Batch; kept: as in target_tokens.
        """
        teacher, prefix, found = self.cache.manifest.teacher, int(self.keep_cls), {}
        with torch.autocast(places.device.type, enabled=False):
            for b, x in features.items():
                own, other = x.chunk(2)
                patches = other[:, teacher.prefix_tokens :]
                patches, shown = resample_overlap(patches, teacher.grid_of(b), places, self.grid(b))
                shown = torch.cat([shown.new_ones(len(shown), prefix), shown], 1).unsqueeze(-1)
                tokens = torch.cat([own[:, :prefix], patches], 1)
                if kept is not None:
                    tokens, shown = take_patches(tokens, prefix, kept), take_patches(shown, prefix, kept)
                found[b] = torch.where(shown, tokens, student[b])
        return found

    def student_tokens(
        self, tokens: Mapping[int, Tensor], grids: Mapping[int, tuple[int, int]] | None, positions: Tensor | None
    ) -> dict[int, Tensor]:
        """Bring student tokens to the places of the targets, which are the sampled positions if patches were sampled.

        tokens: {teacher block: (B, N, d)}; grids: {teacher block: the grid of these tokens}, None for patches that are
        at these places already; positions: (B, k), those of sampled patches.
        """
        prefix, tokens = int(self.keep_cls), {b: x.float() for b, x in tokens.items()}
        if grids is None:
            return tokens
        if positions is None:
            return {b: resize_tokens(x, prefix, grids[b], self.grid(b)) for b, x in tokens.items()}
        grid = self.cache.manifest.teacher.grid
        return {b: take_patches(resize_tokens(x, prefix, grids[b], grid), prefix, positions) for b, x in tokens.items()}
