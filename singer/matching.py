"""Which student block learns from which teacher block."""

from collections.abc import Sequence

import numpy as np

from singer.errors import UserError


def match_blocks(teacher_blocks: Sequence[int], teacher_depth: int, student_depth: int) -> dict[int, int]:
    """Return {teacher block: student block}: each student block is used at most once, in order, by relative depth.

    Depth is counted at a block's OUTPUT, (l + 1) / depth, so that the last block gets the last one and equal depths
    give the identity. (Counted at the input, as in the authors' code, the student's last block has no target.)
    Raises UserError if there are more teacher blocks than student blocks.
    """
    if len(teacher_blocks) > student_depth:
        raise UserError(
            f"{len(teacher_blocks)} teacher blocks cannot be matched to {student_depth} student blocks: "
            "cache fewer blocks or use a deeper student"
        )
    # This import takes half a second, which only training needs to spend.
    from scipy.optimize import linear_sum_assignment

    teacher = (np.array(teacher_blocks) + 1) / teacher_depth
    student = (np.arange(student_depth) + 1) / student_depth
    rows, columns = linear_sum_assignment(np.square(teacher[:, None] - student[None]))
    return {teacher_blocks[r]: int(c) for r, c in zip(rows, columns, strict=True)}
