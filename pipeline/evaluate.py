"""After stage 3: probes of a frozen model on labelled shards.

`singer evaluate MODEL --task retrieval --test 'val-*.tar'`. pipeline/probes/ holds the tasks.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, overload

import torch

from pipeline.config import Config
from pipeline.distill import RUN, STAGE, STUDENT, load_result
from pipeline.model_card import caveats
from pipeline.models import check_known, load_model, load_saved
from pipeline.outputs import PROVENANCE, read_json, write_json
from pipeline.probes import TASKS
from pipeline.probes.classification import Classification
from pipeline.probes.trial import Computed, EvaluateResult, Trial
from pipeline.progress import say
from pipeline.shards import Images, index_shards

Shards = str | Sequence[str]


@overload
def evaluate(
    config: Config,
    model: Path | str,
    train: Shards | None,
    test: Shards,
    task: Literal["classification"] = "classification",
    out: Path | None = None,
    weights: Path | None = None,
) -> Classification: ...
@overload
def evaluate(
    config: Config,
    model: Path | str,
    train: Shards | None,
    test: Shards,
    task: str,
    out: Path | None = None,
    weights: Path | None = None,
) -> EvaluateResult: ...
def evaluate(
    config: Config,
    model: Path | str,
    train: Shards | None,
    test: Shards,
    task: str = "classification",
    out: Path | None = None,
    weights: Path | None = None,
) -> EvaluateResult:
    """One task of evaluate_tasks."""
    (result,) = evaluate_tasks(config, model, train, test, [task], out, weights).values()
    return result


def evaluate_tasks(
    config: Config,
    model: Path | str,
    train: Shards | None,
    test: Shards,
    tasks: Sequence[str],
    out: Path | None = None,
    weights: Path | None = None,
) -> dict[str, EvaluateResult]:
    """Probe a run (its student), a folder in timm's layout, or a model that timm knows by name; {task: its figures}.

    train: None if all tasks learn nothing. out: a folder for the figures; default: the run, and nowhere for other
    models. weights: a file for a model given by name; default: those that timm fetches. Tasks with a label for each
    image share the model's passes over the shards. Raises ValueError for what the user can mend.
    """
    started = time.perf_counter()
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"--task: no task {unknown[0]!r}; known: {', '.join(TASKS)}")
    run = Path(model) if (Path(model) / STUDENT).is_dir() else None
    _check_model(model, weights)
    shards = None if train is None else index_shards(train), index_shards(test)
    if Path(model).exists():
        vit = load_saved(run / STUDENT if run is not None else Path(model), config.evaluate.image_size)
    else:
        vit = load_model(str(model), weights, config.evaluate.image_size)
    for caveat in caveats(vit, load_result(run)) if run is not None and (run / RUN).is_file() else ():
        say(f"note: {caveat}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit.model.to(device)
    place = out or run
    train_names, test_names = ([p.name for p in images.paths] if images else [] for images in shards)
    computed: Computed = {}
    results = {}
    for task in dict.fromkeys(tasks):
        file = result_file(place, task, shards, config) if place is not None else None
        result = TASKS[task].probe(Trial(model, vit, device, *shards, config.evaluate, started, file, computed))
        if file is not None:
            about = {"model": None, "written": None, "task": task, "train": train_names, "test": test_names}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**asdict(result), **about, "config": config.evaluate.model_dump(mode="json")})
        results[task], started = result, time.perf_counter()
    return results


def _check_model(model: Path | str, weights: Path | None) -> None:
    folder = Path(model)
    if not folder.exists():
        check_known(str(model), f"{model} does not exist, and timm has no model of this name")
    elif weights is not None:
        raise ValueError(f"--weights {weights} is for a model given by name; the folder {model} has its own")
    elif (folder / PROVENANCE).is_file() and not ((folder / STUDENT).is_dir() or (folder / "config.json").is_file()):
        stage = read_json(folder, PROVENANCE, "output of singer").get("stage")
        if stage == STAGE:
            raise ValueError(f"{model} is no finished run: repeat its distill command with --resume")
        raise ValueError(f"{model} was written by singer {stage}; evaluate takes a run of singer distill, or a model")


def result_file(place: Path, task: str, shards: tuple[Images | None, Images], config: Config) -> Path:
    """evaluate-<hash>.json: one for each task, pair of shard sets and settings; a repeated command replaces its own."""
    what: list[Any] = [
        task,
        [images.place_hash() if images else None for images in shards],
        config.evaluate.model_dump_json(),
    ]
    return place / f"evaluate-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}.json"
