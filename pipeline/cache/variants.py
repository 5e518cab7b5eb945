"""Choose a teacher of a cache. A teacher at another precision, image size or preprocessing is a separate variant.

A variant is named ARCHITECTURE@HASH (TeacherManifest.variant). Shorter names that users know may fit several variants.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from pipeline.cache.manifest import TeacherManifest
from pipeline.cache.segments import Segment
from pipeline.storage import Place
from singer.errors import UserError

_SHORTEST_HASH = 6


def id_of_segments(segments: Sequence[Segment]) -> str:
    """Return the id of a cache with these complete segments; if there is only one, it is the id of the segment."""
    ids = [segment.id for segment in segments]
    return ids[0] if len(ids) == 1 else hashlib.sha256("\n".join(ids).encode()).hexdigest()


def ids_of(segments: Sequence[Segment]) -> tuple[str, ...]:
    """Return the id of a variant with these segments, then its earlier ids: it gets a new one with each segment."""
    return tuple(id_of_segments(segments[:n]) for n in range(len(segments), 0, -1))


def variants_of(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group segments by variant, in the order of the variants' first segments."""
    found: dict[str, list[Segment]] = {}
    for segment in segments:
        found.setdefault(segment.manifest.teacher.digest(), []).append(segment)
    return list(found.values())


def choose_variant(
    segments: Sequence[Segment], place: Place, teacher: str | None, known: str | None, option: str
) -> list[Segment]:
    """Return the segments of one variant: the first that `teacher` fits, or the first of all if `teacher` is None.

    known: the id by which a refiner or run knows the cache; the variant with this id is taken if there is one. option:
    the option that names a variant, with {} for the name. Raises UserError, which lists the variants, if the name fits
    none or, without a known id, several.
    """
    everything = variants_of(segments)
    fitting = [v for v in everything if teacher is None or fits(v[0].manifest.teacher, teacher)]
    if not fitting:
        names = ", ".join(names_of([v[0].manifest.teacher for v in everything]))
        raise UserError(f"{place} has no features of a teacher {teacher!r}; it has: {names}")
    for variant in fitting if known is not None else ():
        if known in ids_of(variant):
            return variant
    if teacher is not None and len(fitting) > 1:
        teachers = [v[0].manifest.teacher for v in fitting]
        raise UserError(
            f"{place} has {len(teachers)} variants of teacher {teacher!r}: {', '.join(names_of(teachers))}; "
            f"name one: {option.replace('{}', teachers[0].variant)}"
        )
    return fitting[0]


def check_held_once(segments: Sequence[Segment]) -> None:
    """Raise UserError if two segments hold the same block of one variant for the same records.

    It would not be clear which of the two readers take.
    """
    held: dict[tuple[str, str, int], Segment] = {}
    for segment in segments:
        teacher = segment.manifest.teacher
        for block in segment.manifest.blocks:
            earlier = held.setdefault((teacher.digest(), segment.manifest.listed_key(), block), segment)
            if earlier is not segment:
                raise UserError(
                    f"{earlier.store.url} and {segment.store.url} both hold block {block} of {teacher.variant} for the "
                    "same records; remove the second and all later segments, then repeat their cache-teacher commands "
                    "with --append"
                )


def fits(teacher: TeacherManifest, name: str) -> bool:
    """Return whether `name` is the teacher's variant, name or architecture, or the beginning of its weights' hash."""
    known = (teacher.variant, teacher.name, teacher.architecture)
    return name in known or (len(name) >= _SHORTEST_HASH and teacher.weights.startswith(name))


def names_of(teachers: Sequence[TeacherManifest]) -> list[str]:
    """Describe each variant by what differs between them, such as vit_tiny_patch16_224@0a1b2c3d (precision bf16)."""
    fields = [_fields(t) for t in teachers]
    different = [key for key in dict.fromkeys(itertools.chain(*fields)) if len({str(f.get(key)) for f in fields}) > 1]
    texts = [", ".join(f"{key} {field.get(key)}" for key in different) for field in fields]
    return [f"{t.variant} ({text or t.name})" for t, text in zip(teachers, texts, strict=True)]


def _fields(teacher: TeacherManifest) -> dict[str, Any]:
    """Return the fields in which variants can differ, without those that follow from others."""
    fields = {"dtype": teacher.dtype, "copies": teacher.copies}
    fields |= teacher.model_dump(mode="json", exclude={"grid", "model_args"})
    args = {f"model_args.{key}": value for key, value in teacher.model_args.items() if key != "img_size"}
    return fields | {"weights": teacher.weights[:12]} | args
