"""The files in which the figures of tasks are stored."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data import Images
from pipeline.evaluation.context import EvaluateResult, EvaluationContext
from pipeline.runtime.devices import resolved
from pipeline.storage.json_files import write_json

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
