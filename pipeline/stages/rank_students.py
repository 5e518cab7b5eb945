"""Which student suits a teacher: `singer rank-students CACHE --parameters N` scores untrained students.

Candidates are plain ViTs of a budget of parameters, with several widths, depths and MLPs, and models that are named.
Each is built with random weights and sees one batch of images; its relations are compared with cached ones.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced, first_views, last_block
from pipeline.config import Config, StudentConfig
from pipeline.data import Spec
from pipeline.data.views import normalise
from pipeline.models.backbone import Backbone
from pipeline.runtime.devices import own_settings
from pipeline.runtime.progress import say
from pipeline.storage import Place
from pipeline.students.new import new_student
from pipeline.training.distilling.cached_teachers import open_images
from singer.backbones import block_outputs, count_parameters, depth
from singer.errors import UserError
from singer.sizes import ImageSize, Size
from singer.tokens import global_tokens, resize_tokens
from singer.zero_cost import gradient_norm, patch_distance, sample_distance

# Plain ViTs: channels of a head; the widths, ratios of MLPs and depths among which students of a budget are sought.
_HEAD, _WIDTHS, _RATIOS, _DEPTHS = 32, range(64, 1025, 32), (4, 3, 2), range(2, 25)
# How far a candidate may be from the budget, in shares of it; most candidates that are tried.
_WITHIN, _MOST = 0.1, 12
# The figure is that of benchmarks/student_ranking.py (docs/results.md, Untrained students).
CAUTION = (
    "nothing was trained, and this order said nothing of twelve students that were (rank correlation 0.03); compare a "
    "few with a short sweep before you choose"
)


@dataclass(frozen=True)
class RankedStudent:
    """A student and its scores, means over several starts.

    diswot: minus the sum of samples and patches, which are distances of relations (singer.zero_cost); gradient: the
    norm of the gradient of that sum. parameters: without a head.
    """

    student: str
    parameters: int
    diswot: float
    samples: float
    patches: float
    gradient: float


@dataclass(frozen=True)
class RankStudentsResult:
    """Students, the best first by diswot. images: how many were compared; starts: how often each was initialised."""

    students: list[RankedStudent]
    teacher: str
    block: int
    images: int
    starts: int
    caution: str = CAUTION


@own_settings()
def rank_students(
    config: Config,
    place: Place,
    parameters: int | None = None,
    names: Sequence[str] = (),
    batch: int = 64,
    starts: int = 3,
    images: Spec | None = None,
) -> RankStudentsResult:
    """Score untrained students by their relations to the last cached block of a teacher.

    parameters: the budget of plain ViTs; names: models of any kind; batch: how many images; starts: how often each
    student is initialised; images: where the cached images are, if they moved. Raises UserError if there is no
    candidate, or if the cache holds only some of the patches.
    """
    if parameters is None and not names:
        raise UserError("name students with --student, or give a budget of --parameters")
    cache = Cache(place, config.distill.teachers[0] if config.distill.teachers else None)
    cache = last_block(place, cache.manifest.teacher.variant)
    (block,), teacher = cache.blocks, cache.manifest.teacher
    if cache.manifest.sampled:
        raise UserError(
            f"{place} holds only some of the patches (cache.token_share), which have no relations to others"
        )
    tried = {name: named_student(config.student, name) for name in names}
    if parameters is not None:
        tried |= plain_students(config.student, parameters, teacher.image_size)
    records = evenly_spaced(first_views(cache), batch)
    tokens = cache.features(records, torch.device("cpu"))[block]
    with open_images(cache, images) as files:
        found = []
        for name, student in tried.items():
            size = student.image_size or teacher.image_size
            pixels = cache.pixels(records, size, files)
            built = [_built(student, size, config.distill.seed + n, teacher.class_token) for n in range(starts)]
            scores = [_score(each, pixels, cache, tokens) for each in built]
            means = {key: fmean(s[key] for s in scores) for key in scores[0]}
            found.append(RankedStudent(name, count_parameters(built[0].model), **means))
            say(f"{name}: {found[-1].diswot:.4g}")
    ranked = sorted(found, key=lambda s: -s.diswot)
    return RankStudentsResult(ranked, teacher.variant, block, len(records), starts)


def named_student(base: StudentConfig, name: str) -> StudentConfig:
    """Return the settings of a named model; the dimensions of a plain ViT are not for it."""
    shape = {} if name == "vit" else dict.fromkeys(("dim", "depth", "heads", "mlp_ratio"))
    return base.model_copy(update={"name": name, **shape})


def plain_students(base: StudentConfig, budget: int, image_size: ImageSize) -> dict[str, StudentConfig]:
    """Return {name: settings} of plain ViTs whose size is within a tenth of a budget, one for each width and MLP.

    base: its mlp_ratio, if it has one, is that of all; image_size: in pixels. Raises UserError if there are none.
    """
    found = {}
    for dim, ratio in itertools.product(_WIDTHS, (base.mlp_ratio,) if base.mlp_ratio else _RATIOS):
        settings = base.model_copy(update={"name": "vit", "dim": dim, "heads": dim // _HEAD, "mlp_ratio": ratio})
        rest, one = (vit_parameters(settings, depth, image_size) for depth in (0, 1))
        deep = min(_DEPTHS[-1], round((budget - rest) / (one - rest)))
        if deep in _DEPTHS and abs(rest + deep * (one - rest) - budget) <= _WITHIN * budget:
            found[f"vit {dim} x {deep}, MLP x {ratio:g}"] = settings.model_copy(update={"depth": deep})
    if not found:
        least, most = (
            vit_parameters(base.model_copy(update={"dim": dim, "mlp_ratio": ratio}), depth, image_size)
            for dim, depth, ratio in (
                (_WIDTHS[0], _DEPTHS[0], base.mlp_ratio or min(_RATIOS)),
                (_WIDTHS[-1], _DEPTHS[-1], base.mlp_ratio or max(_RATIOS)),
            )
        )
        raise UserError(
            f"--parameters {budget}: no plain ViT of 64 to 1,024 channels and 2 to 24 blocks has that size; the "
            f"smallest has {least:,} and the largest {most:,}"
        )
    chosen = evenly_spaced(np.arange(len(found)), _MOST)
    return {name: settings for n, (name, settings) in enumerate(found.items()) if n in chosen}


def vit_parameters(settings: StudentConfig, blocks: int, image_size: ImageSize) -> int:
    """Return the number of parameters of a plain ViT, which takes too long to count on the model itself."""
    dim, patch = settings.dim or 0, Size.of(settings.patch_size or 16)
    hidden = int(dim * (settings.mlp_ratio or 4))
    tokens = math.prod(Size.of(settings.image_size or image_size).grid(patch.written)) + 1
    # Patch embedding, CLS, positions and final norm; then norms, attention and MLP of a block, with their biases.
    embedding = dim * (3 * math.prod(patch) + 1 + 1 + tokens + 2)
    return embedding + blocks * (4 * dim**2 + 9 * dim + 2 * dim * hidden + hidden)


def _built(settings: StudentConfig, size: ImageSize, seed: int, class_token: bool) -> Backbone:
    torch.manual_seed(seed)
    return new_student(settings, size, class_token=class_token)


def _score(student: Backbone, pixels: Tensor, cache: Cache, tokens: Tensor) -> dict[str, float]:
    """Return the scores of a student; tokens: the teacher's (n, prefix + patches, d)."""
    teacher, (block,) = cache.manifest.teacher, cache.blocks
    last = depth(student.model) - 1
    images = normalise(pixels, student.mean, student.std)
    own = block_outputs(student.model.eval(), images, [last])[last]
    ours = resize_tokens(own[:, student.prefix :], 0, student.layout[last][1], teacher.grid_of(block))
    theirs = tokens[:, teacher.prefix_tokens :]
    samples = sample_distance(
        global_tokens(own, student.prefix, student.has_cls),
        global_tokens(tokens, teacher.prefix_tokens, teacher.class_token),
    )
    patches = patch_distance(ours, theirs)
    distance = samples + patches
    return {
        "gradient": gradient_norm(distance, student.model), "diswot": -distance.item(),
        "samples": samples.item(), "patches": patches.item(),
    }  # fmt: skip
