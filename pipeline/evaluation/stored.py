"""The files in which the figures of tasks are stored, and whether a student learned from the images of a test."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced
from pipeline.config import Config
from pipeline.data import ImageFile, Images, image_digest
from pipeline.evaluation.context import Answer, EvaluateResult, EvaluationContext
from pipeline.runtime.devices import resolved
from pipeline.storage import is_remote
from pipeline.storage.json_files import write_json
from pipeline.training.run_directory import DistillResult, TeacherLink
from singer.errors import UserError

# So many images of --test are looked up among the images that the student learned from.
_LOOKED_FOR = 256


def learned_from(run: DistillResult, test: Images) -> tuple[Answer, str]:
    """Return whether the caches that a run learned from hold any of a sample of test images.

    A fine-tuned run learned from test images, too, if it was fine-tuned on one of the files that hold them. If the
    answer is unknown, the second value is the reason. All caches of a run hold the same images, so that one of them is
    enough.
    """
    if run.finetuned is not None and {str(path) for path in test.given} & set(run.finetuned.sources):
        return "yes", ""
    reasons = []
    for link in run.teachers:
        known = _cached_images(link)
        if isinstance(known, str):
            reasons.append(known)
            continue
        with ImageFile(test) as files:
            looked_for = evenly_spaced(np.arange(len(test)), _LOOKED_FOR)
            digests = np.array([image_digest(files.encoded(n)[0]) for n in looked_for.tolist()], dtype=np.uint64)
        return ("yes" if np.isin(digests, known).any() else "no"), ""
    return "unknown", "; ".join(dict.fromkeys(reasons))


def _cached_images(link: TeacherLink) -> np.ndarray | str:
    """Return the digests of the images that a cache holds, or the reason why they are unknown."""
    place = link.cache_place
    if is_remote(place):
        return f"its cache {place} is not on this machine"
    try:
        cache = Cache(place, known=link.cache)
    except (UserError, OSError) as error:  # the cache was moved, deleted or damaged
        return f"its cache cannot be read: {error}"
    if link.cache not in cache.ids:
        return f"there is another cache at {place} now"
    return cache.index.digest


ImageSets = tuple[Images | None, Images]


def result_file(place: Path, task: str, images: ImageSets, config: Config, model: str | None = None) -> Path:
    """Return the path evaluate-<hash>.json, with one hash for each task, pair of image sets and settings.

    A repeated command therefore replaces its own file. model: the identity of a model that shares the folder with
    others, or None if the folder is the run itself.
    """
    what: list[Any] = [
        task,
        [each.place_hash() if each else None for each in images],
        config.evaluate.model_dump_json(exclude={"features"}),
    ]
    what += [] if model is None else [model]
    return place / f"evaluate-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}.json"


def store_result(context: EvaluationContext, result: EvaluateResult, task: str, model: str | None) -> None:
    """Write the figures of a task to the file of its context, if it has one.

    model: what was probed; None if the file is in the folder of the run itself.
    """
    if context.file is None:
        return
    places = [each.place_hash() if each else None for each in (context.learn_from, context.test)]
    place = hashlib.sha256(repr(places).encode()).hexdigest()[:8]
    about = {"model": model, "written": None, "task": task, "images": place}
    context.file.parent.mkdir(parents=True, exist_ok=True)
    settings = context.settings.model_copy(update={"precision": resolved(context.settings.precision)})
    write_json(context.file, {**asdict(result), **about, "config": settings.model_dump(mode="json")})
