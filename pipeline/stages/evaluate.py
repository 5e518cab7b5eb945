"""After stage 3: probes of a frozen model on labelled images.

Run it with `singer evaluate MODEL --task retrieval --test 'val-*.tar'`. pipeline/evaluation/ holds the tasks.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, overload

from pipeline.checks import check_folder, check_model, check_writable
from pipeline.config import Config
from pipeline.data import Images, Spec, list_images, list_probe_images, readable
from pipeline.evaluation.classification import Classification
from pipeline.evaluation.context import Answer, ComputedFeatures, EvaluateResult, EvaluationContext
from pipeline.evaluation.learned_from import learned_from
from pipeline.evaluation.open_model import check_known_model, open_model
from pipeline.evaluation.result_files import result_file, store_result
from pipeline.evaluation.tasks import TASKS
from pipeline.models.backbone import Backbone
from pipeline.outputs.resuming import RUN_RESULT, STUDENT_FOLDER
from pipeline.outputs.stage_log import process_log, stage_log
from pipeline.reports.model_card import caveats
from pipeline.runtime.devices import default_device, own_settings
from pipeline.runtime.progress import say
from pipeline.training.run_directory import load_result
from singer.errors import require_known


@own_settings()
def evaluate_tasks(
    config: Config,
    model: Path | str,
    train: Spec | None,
    test: Spec,
    tasks: Sequence[str],
    out: Path | None = None,
    weights: Path | None = None,
) -> dict[str, EvaluateResult]:
    """Probe a model by several tasks and return {task: its figures}.

    model: a run, of which the student is probed, a folder in timm's layout, or the name of a timm model; train: None
    if no task learns; out: a folder for the figures; by default the run's folder, and for other models none is
    written; weights: a file for a model given by name; by default, timm fetches the weights. Tasks with a label for
    each image share the model's passes over the images. data.on_error skip leaves out images that cannot be read; for
    this, all are read once more. Raises UserError for mistakes that the user can fix.
    """
    started = time.perf_counter()
    for task in tasks:
        require_known("--task", task, TASKS)
    run = Path(model) if (Path(model) / STUDENT_FOLDER).is_dir() else None
    place = out or run
    if place is not None:
        check_writable("--out", place)
    if config.evaluate.features is not None:  # features that are there are only read
        check_folder("evaluate.features", config.evaluate.features)
    check_model(model, weights)
    check_known_model(model)
    images: tuple[Images | None, Images]
    images = (None, list_images(config, test)) if train is None else list_probe_images(config, train, test)
    if config.data.on_error == "skip":
        images = None if images[0] is None else readable(images[0]), readable(images[1])
    for task in tasks:
        TASKS[task].check(*images, config.evaluate)
    backbone = open_model(model, weights, config.evaluate.image_size, config.student.name)
    learned = _noted(run, backbone, images[1]) if run is not None and (run / RUN_RESULT).is_file() else None
    device = default_device()
    backbone.model.to(device)
    own = place is not None and run is not None and place.resolve() == run.resolve()
    computed: ComputedFeatures = {}
    results = {}
    # A folder that is not the run gets a log only if there is a warning or an error.
    log = stage_log(place, config) if own and place else process_log(place) if place is not None else nullcontext()
    with log:
        for task in dict.fromkeys(tasks):
            named = None if own else f"{model} {weights}"
            file = result_file(place, task, images, config, named) if place is not None else None
            context = EvaluationContext(
                model, backbone, device, *images, config.evaluate, started, file, computed, learned
            )
            results[task] = TASKS[task].probe(context)
            # A run's own path is left out, because a run may move. Other models are identified by their name.
            store_result(context, results[task], task, None if own else str(model))
            started = time.perf_counter()
    return results


def _noted(run: Path, backbone: Backbone, test: Images) -> Answer:
    """Say what makes the figures of a run's student less than they seem; return whether it learned from --test."""
    made = load_result(run)
    for caveat in caveats(backbone, made):
        say(f"note: {caveat}")
    learned, reason = learned_from(made, test)
    if learned == "yes":
        say("note: the student learned from images of --test; are --train and --test swapped?")
    elif learned == "unknown":
        say(f"note: it is unknown whether the student learned from images of --test: {reason}")
    return learned


@overload
def evaluate(
    config: Config,
    model: Path | str,
    train: Spec | None,
    test: Spec,
    task: Literal["classification"] = "classification",
    out: Path | None = None,
    weights: Path | None = None,
) -> Classification: ...
@overload
def evaluate(
    config: Config,
    model: Path | str,
    train: Spec | None,
    test: Spec,
    task: str,
    out: Path | None = None,
    weights: Path | None = None,
) -> EvaluateResult: ...
def evaluate(
    config: Config,
    model: Path | str,
    train: Spec | None,
    test: Spec,
    task: str = "classification",
    out: Path | None = None,
    weights: Path | None = None,
) -> EvaluateResult:
    """Run one task, as evaluate_tasks does, and return its figures."""
    (result,) = evaluate_tasks(config, model, train, test, [task], out, weights).values()
    return result
