"""Which teacher suits a data set: `singer rank CACHE ...` scores cached teachers on the labels of their images.

Nothing is trained. Scores are of CLS (without CLS, of the mean patch) of each teacher's last cached block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from pipeline.cache.segments import read_segments
from pipeline.cache.statistics import batches, evenly_spaced, first_views, last_block
from pipeline.cache.variants import variants_of
from pipeline.data.source_listing import NO_LABEL
from pipeline.runtime.devices import own_settings
from pipeline.runtime.progress import say
from pipeline.storage import Place, open_store
from singer.errors import UserError
from singer.tokens import global_tokens
from singer.transfer import cka, parc, teacher_weights


@dataclass(frozen=True)
class RankedTeacher:
    """A teacher and its scores.

    parc, cka: how well its features fit the labels, None without labels (singer.transfer); agreement: the mean CKA with
    the other teachers, None if there is no other, or if the caches hold other images; weight: its share in
    distill.teacher_weights.
    """

    cache: str
    teacher: str
    block: int
    parc: float | None
    cka: float | None
    agreement: float | None
    weight: float


@dataclass(frozen=True)
class RankResult:
    """Teachers, the best first: by parc, or without labels by agreement. images: how many of each were compared."""

    teachers: list[RankedTeacher]
    by: str
    images: int
    classes: int
    teacher_weights: list[float]


@dataclass(frozen=True)
class _Sample:
    """A teacher's features (n, d) of one view of some images, their labels (n,), and which views they are."""

    place: Place
    variant: str
    block: int
    features: torch.Tensor
    labels: torch.Tensor
    rows: object


@own_settings()
def rank(places: Sequence[Place], images: int = 1000) -> RankResult:
    """Score all teachers in some caches, on at most so many of the images of each, evenly spread over them.

    Raises UserError for a cache that is incomplete, and if there is nothing to rank by: neither labels of two classes
    nor a second teacher of the same images.
    """
    samples = [_sample(place, variant, images) for place in places for variant in _variants(place)]
    labelled = all(len(s.labels.unique()) > 1 and bool((s.labels >= 0).all()) for s in samples)
    same = len(samples) > 1 and all(s.rows == samples[0].rows for s in samples)
    if not labelled and not same:
        raise UserError(
            "nothing to rank by: these caches do not hold images with labels of two classes or more, nor several "
            "teachers of the same images"
        )
    say(f"{len(samples)} teachers, {min(len(s.features) for s in samples)} images of each")
    agreements: list[list[float]] = [[] for _ in samples]
    for a, b in combinations(range(len(samples)), 2) if same else ():
        agreement = cka(samples[a].features, samples[b].features)
        agreements[a].append(agreement)
        agreements[b].append(agreement)
    means = [sum(values) / len(values) if same else 0.0 for values in agreements]
    scores = [parc(s.features, s.labels) for s in samples] if labelled else means
    weights = teacher_weights(scores)
    teachers = [
        RankedTeacher(
            cache=str(s.place),
            teacher=s.variant,
            block=s.block,
            parc=score if labelled else None,
            cka=cka(s.features, one_hot(s.labels)) if labelled else None,
            agreement=mean if same else None,
            weight=weight,
        )
        for s, score, mean, weight in zip(samples, scores, means, weights, strict=True)
    ]
    order = sorted(range(len(samples)), key=lambda n: -scores[n])
    return RankResult(
        teachers=[teachers[n] for n in order],
        by="parc" if labelled else "agreement",
        images=min(len(s.features) for s in samples),
        classes=len(samples[0].labels.unique()) if labelled else 0,
        teacher_weights=weights,
    )


def _variants(place: Place) -> list[str]:
    """Return the names of a cache's teachers, in the order in which they were cached."""
    return [segments[0].manifest.teacher.variant for segments in variants_of(read_segments(open_store(place)))]


def _sample(place: Place, variant: str, images: int) -> _Sample:
    """Read the last block of a teacher: CLS, or the mean patch where there is none, of the first view of images."""
    cache = last_block(place, variant)
    first = first_views(cache)
    labels = cache.index.images.labels[cache.index.image[first]]
    # Where some images have labels, the others say nothing.
    known = first[labels != NO_LABEL] if (labels != NO_LABEL).any() else first
    records = evenly_spaced(known, images)
    (block,), teacher = cache.blocks, cache.manifest.teacher
    parts = [
        global_tokens(x[block], teacher.prefix_tokens, teacher.class_token)
        for x in batches(cache, records, torch.device("cpu"))
    ]
    chosen = cache.index.image[records]
    found = torch.from_numpy(cache.index.images.labels[chosen].astype(np.int64))
    rows = cache.records_key, tuple(records.tolist())
    return _Sample(place, variant, block, torch.cat(parts).float(), found, rows)


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    """Return a column for each class that there is, however large its number: labels (n,) -> (n, classes)."""
    return torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).float()
