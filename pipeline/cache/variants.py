"""Which teacher of a cache: one teacher at another precision, image size or preprocessing is a variant of its own.

A variant is named ARCHITECTURE@HASH (TeacherManifest.variant). Names that users know, which say less, may fit several.
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


def joint_id(parts: Sequence[Segment]) -> str:
    """The id of a cache of these parts, which are complete; of a single one, its own."""
    ids = [p.id for p in parts]
    return ids[0] if len(ids) == 1 else hashlib.sha256("\n".join(ids).encode()).hexdigest()


def ids_of(parts: Sequence[Segment]) -> tuple[str, ...]:
    """The id of a variant of these parts now and, before that, at each time since it began to grow."""
    return tuple(joint_id(parts[:n]) for n in range(len(parts), 0, -1))


def variants_of(parts: Sequence[Segment]) -> list[list[Segment]]:
    """The parts of each variant, in the order of their first parts."""
    found: dict[str, list[Segment]] = {}
    for part in parts:
        found.setdefault(part.manifest.teacher.digest(), []).append(part)
    return list(found.values())


def choose_variant(
    parts: Sequence[Segment], place: Place, teacher: str | None, known: str | None, option: str
) -> list[Segment]:
    """The parts of one variant: the first that `teacher` fits, of all if it is None.

    known: the id that a refiner or run has of the cache, which decides where the cache still has its variant.
    option: what names a variant, with {} for its name. Raises UserError, which lists variants, if the name fits none
    or, without a known id, several.
    """
    everything = variants_of(parts)
    fitting = [v for v in everything if teacher is None or fits(v[0].manifest.teacher, teacher)]
    if not fitting:
        names = ", ".join(describe([v[0].manifest.teacher for v in everything]))
        raise UserError(f"{place} has no features of a teacher {teacher!r}; it has: {names}")
    for variant in fitting if known is not None else ():
        if known in ids_of(variant):
            return variant
    if teacher is not None and len(fitting) > 1:
        teachers = [v[0].manifest.teacher for v in fitting]
        raise UserError(
            f"{place} has {len(teachers)} variants of teacher {teacher!r}: {', '.join(describe(teachers))}; "
            f"name one: {option.replace('{}', teachers[0].variant)}"
        )
    return fitting[0]


def check_held_once(parts: Sequence[Segment]) -> None:
    """Raise UserError if two parts hold a block of one variant for the same records: readers would take either."""
    held: dict[tuple[str, str, int], Segment] = {}
    for part in parts:
        teacher = part.manifest.teacher
        for block in part.manifest.blocks:
            earlier = held.setdefault((teacher.digest(), part.manifest.rows(), block), part)
            if earlier is not part:
                raise UserError(
                    f"{earlier.store.url} and {part.store.url} both hold block {block} of {teacher.variant} for the "
                    "same records; remove the second and all later parts, then repeat their cache-teacher commands "
                    "with --append"
                )


def fits(teacher: TeacherManifest, name: str) -> bool:
    """Whether `name` is the teacher's variant, name or architecture, or the beginning of its weights' hash."""
    known = (teacher.variant, teacher.name, teacher.architecture)
    return name in known or (len(name) >= _SHORTEST_HASH and teacher.weights.startswith(name))


def describe(teachers: Sequence[TeacherManifest]) -> list[str]:
    """Each variant with that in which the listed ones differ: vit_tiny_patch16_224@0a1b2c3d (precision bf16)."""
    fields = [_fields(t) for t in teachers]
    different = [key for key in dict.fromkeys(itertools.chain(*fields)) if len({str(f.get(key)) for f in fields}) > 1]
    texts = [", ".join(f"{key} {field.get(key)}" for key in different) for field in fields]
    return [f"{t.variant} ({text or t.name})" for t, text in zip(teachers, texts, strict=True)]


def _fields(teacher: TeacherManifest) -> dict[str, Any]:
    """What tells variants apart, each field by itself and without what follows from the others."""
    fields = teacher.model_dump(mode="json", exclude={"grid", "model_args"})
    args = {f"model_args.{key}": value for key, value in teacher.model_args.items() if key != "img_size"}
    return fields | {"weights": teacher.weights[:12]} | args
