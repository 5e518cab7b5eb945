"""After stage 3, if there are labels: fine-tune a distilled student as a classifier.

Run it with `singer finetune RUN --train 'shards/*.tar' --out OUT`, or with `accelerate launch cli.py finetune ...` on
several processes. A head is put on the student, and both are trained by cross-entropy on random resized crops that
Mixup and CutMix mix (the recipe of DeiT, arXiv:2012.12877). If asked (finetune.kd), a teacher with a head says what it
sees in the same views, and the student learns that, too. The output is a run as stage 3 makes it: its student has a
head.
"""

import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed

from pipeline.config import Config, FinetuneConfig
from pipeline.data import ImageFile, Images, Spec, list_images, list_probe_images, listing_hash, places_of, readable
from pipeline.evaluation import own_head
from pipeline.evaluation.classification import check_choice, check_labels
from pipeline.evaluation.context import EvaluationContext
from pipeline.evaluation.learned_from import learned_from
from pipeline.evaluation.linear_head import probe_weights
from pipeline.evaluation.open_model import open_model
from pipeline.evaluation.own_head import Asked, OwnHead, class_of_label
from pipeline.evaluation.result_files import result_file, store_result
from pipeline.models.backbone import Backbone, save_backbone, weight_hash
from pipeline.models.loading import load_saved
from pipeline.outputs.folder import Mode, begun_inputs, check_output, claimed_output
from pipeline.outputs.provenance import INPUTS, check_inputs, file_hash, read_inputs
from pipeline.outputs.resuming import RUN_RESULT, STUDENT_FOLDER, TRAINING_CHECKPOINT
from pipeline.outputs.stage_log import process_log
from pipeline.runtime.devices import default_device, make_accelerator, own_settings, with_precision
from pipeline.runtime.progress import say
from pipeline.runtime.ranks import current
from pipeline.runtime.watched_rank import watched
from pipeline.storage.json_files import write_json
from pipeline.students.with_head import set_head, student_with_head
from pipeline.training.batch_norm import check_parts, synchronise
from pipeline.training.best_epoch import State
from pipeline.training.distilling.cached_teachers import cache_of_run, cached_weights
from pipeline.training.distilling.subset import held_out_images
from pipeline.training.finetuning.classifier import Classifier
from pipeline.training.finetuning.head_teacher import HeadTeacher
from pipeline.training.finetuning.labelled import LabelledLoader
from pipeline.training.finetuning.mixing import Mixing
from pipeline.training.fsdp import check_fsdp
from pipeline.training.new_student_run import new_student_run
from pipeline.training.run_directory import (
    ADAPTERS,
    FINETUNE,
    DistillResult,
    Finetuned,
    load_result,
    load_run_config,
    resumed_result,
    write_result,
)
from pipeline.training.trackers import check_trackers
from pipeline.training.trainer import train
from singer.backbones import count_parameters
from singer.errors import UserError

_TASK = "head"
# The name of the teacher among the inputs of a run.
_TEACHER = "finetune.teacher"
# A teacher that takes part, and the class of its head for each label (HeadTeacher).
LabelTeacher = tuple[Backbone, list[int]]
_NAME_ONE = "name a classifier: --set finetune.teacher=NAME"


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned student.

    parameters: with the head; finetuned: of its training; test: what its head says to --test, None without.
    """

    run: Path
    student: Path
    parameters: int
    finetuned: Finetuned
    test: OwnHead | None


@own_settings()
def finetune(
    config: Config, run: Path, train: Spec, out: Path, test: Spec | None = None, mode: Mode = "new"
) -> FinetuneResult:
    """Fine-tune the student of a finished run with labels, and store it at `out`.

    Only the sections finetune, evaluate and data of `config` are used, and teacher.weights if a teacher takes part; the
    others are those of the run. train: labelled images; test: others, on which the student is tested once, at the end,
    as `singer evaluate --task head` does. data.on_error skip leaves out images that cannot be read; for this, all are
    read once more. Raises UserError for mistakes that the user can fix.
    """
    trained, weights = load_result(run), config.teacher.weights
    config = with_precision(_recipe(run, config))
    check_fsdp(config.finetune.precision)
    check_trackers(config.finetune)
    images, tested = _images(config, train, test)
    check_labels(images, tested or images, classes_of(images))
    if tested is not None:
        _check_test(config, trained, images, tested)
    named = config.finetune.teacher_path
    read = [run, *places_of(images), *(places_of(tested) if tested is not None else ())]
    check_output(out, mode, FINETUNE, config, read if named is None else [named, *read])
    begun = begun_inputs(out, mode)
    finished = begun is not None and (out / RUN_RESULT).exists()
    try:
        teacher = teacher_of_labels(config.finetune, weights, run, trained, images)
    except UserError:
        if not finished:
            raise
        teacher = None  # what is finished needs it no more
    inputs = _inputs(config.finetune, run, trained, images, teacher)
    accelerator = make_accelerator(config.finetune.precision)
    main, result = accelerator.is_main_process, None
    if begun is not None:
        check_inputs(out, inputs if teacher is not None else {**inputs, _TEACHER: begun.get(_TEACHER)})
        if finished:
            result = resumed_result(out)
    if result is None:
        new = NewClassifier(config, run, trained, images, teacher, out, accelerator)
        claim = claimed_output(out, mode, FINETUNE, config, config.finetune.seed) if main else process_log(out)
        with watched(accelerator, FINETUNE), claim:
            if main:
                write_json(out / INPUTS, inputs)
            result = new.run(mode)
    assert result.finetuned is not None
    figures = _test(config, result, tested) if tested is not None and main else None
    return FinetuneResult(out, result.student, result.parameters, result.finetuned, figures)


def _recipe(run: Path, config: Config) -> Config:
    """Return the configuration of the run, with the sections of this stage."""
    own = {name: getattr(config, name) for name in ("finetune", "evaluate", "data")}
    return load_run_config(run).model_copy(update=own)


def _images(config: Config, train: Spec, test: Spec | None) -> tuple[Images, Images | None]:
    """List the images; those of `test` have the numbers of classes that those of `train` have."""
    images, tested = (list_images(config, train), None) if test is None else list_probe_images(config, train, test)
    if config.data.on_error == "skip":
        images, tested = readable(images), None if tested is None else readable(tested)
    return images, tested


def classes_of(images: Images) -> int:
    """Return how many classes a head for labelled images has."""
    return max(len(images.classes), int(images.labels.max()) + 1)


def _check_test(config: Config, trained: DistillResult, images: Images, tested: Images) -> None:
    """Raise UserError, before anything is trained, if the student could not be tested afterwards."""
    if config.evaluate.class_map is not None:
        raise UserError("evaluate.class_map: the classes of finetune are those of its images; leave it out")
    named, count = own_head.named_classes(tested), classes_of(images)
    if named not in (None, count):
        raise UserError(f"--test has {named} classes, but --train has {count}; give sets with the same classes.json")
    if config.evaluate.image_size is not None:
        load_saved(trained.student, config.evaluate.image_size)


def teacher_of_labels(
    settings: FinetuneConfig, weights: Path | None, run: Path, trained: DistillResult, images: Images
) -> LabelTeacher | None:
    """Load the teacher that takes part, if one does.

    weights: a file with its own, if they are not where its name says. Raises UserError if it is not found, or if its
    head does not know the classes of the images.
    """
    if settings.kd == "none":
        return None
    if settings.teacher is None:
        teacher, name = _teacher_of_run(run, trained, weights), trained.teachers[0].teacher.name
    else:
        name = settings.teacher
        try:
            teacher = open_model(settings.teacher_path or name, weights, None)
        except UserError as error:
            raise UserError(f"finetune.teacher: {error}") from error
    asked = Asked("finetune.kd", "--train", "finetune.class_map", _NAME_ONE, whole=True)
    mapped = class_of_label(teacher.model, name, images, settings.class_map, asked)
    classes = [mapped.get(label, -1) for label in range(classes_of(images))]
    known = sorted(number for number in classes if number >= 0)
    twice = [one for one, other in pairwise(known) if one == other]
    if twice:
        raise UserError(
            f"finetune.class_map: {settings.class_map} has class {twice[0]} for several labels; give each its own"
        )
    return teacher, classes


def _teacher_of_run(run: Path, trained: DistillResult, weights: Path | None) -> Backbone:
    """Load the teacher that a run learned from, as it was cached."""
    link, *others = trained.teachers
    if others:
        raise UserError(f"finetune.kd: {run} learned from {len(others) + 1} teachers; {_NAME_ONE}")
    cache = cache_of_run(run, link)
    if cache is None:
        raise UserError(f"finetune.kd: the cache that {run} learned from is not at {link.cache_place}; {_NAME_ONE}")
    return cached_weights(cache, weights).load("finetune.kd", f"or {_NAME_ONE}")


def _inputs(
    settings: FinetuneConfig, run: Path, trained: DistillResult, images: Images, teacher: LabelTeacher | None
) -> dict[str, str | None]:
    """Return what identifies the inputs: those of the run, its student, the images and the teacher."""
    before = read_inputs(run, "finished run")
    weights = trained.student / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{run} is not a finished run: {weights} is missing")
    return {
        **before,
        "student": file_hash(weights),
        "image_set": listing_hash(images),
        _TEACHER: weight_hash(teacher[0].model.state_dict()) if teacher is not None else None,
        "finetune.class_map": file_hash(settings.class_map) if settings.class_map is not None else None,
    }


class NewClassifier:
    """A student that is fine-tuned, with all it needs. Nothing has been written to its folder yet."""

    def __init__(
        self,
        config: Config,
        source: Path,
        trained: DistillResult,
        images: Images,
        teacher: LabelTeacher | None,
        out: Path,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.source, self.trained, self.images = config, source, trained, images
        self.out, self.accelerator = out, accelerator
        settings, device = config.finetune, accelerator.device
        self.classes = classes_of(images)
        set_seed(settings.seed)
        self.student = student_with_head(trained.student, settings, self.classes, images.classes)
        if config.student.checkpointing:
            self.student.model.set_grad_checkpointing(True)
        synchronise(self.student.model, accelerator)
        self.numbers, self.held_out = held_out_images(len(images), settings)
        check_parts(self.student, None, settings, len(self.numbers), accelerator.num_processes)
        if settings.head == "probe":
            check_choice(images.labels[self.numbers], config.evaluate)
        head = HeadTeacher(*teacher, settings, device) if teacher is not None else None
        self.learner = Classifier(self.student, device, Mixing(settings, self.classes), head).to(device)

    def run(self, mode: Mode) -> DistillResult:
        """Train the student; the first process stores it. Return the result."""
        settings, accelerator, ranks = self.config.finetune, self.accelerator, current()
        main = accelerator.is_main_process
        if settings.head == "probe" and not (mode == "resume" and (self.out / TRAINING_CHECKPOINT).exists()):
            self._start_head()
        if main:
            say(f"{len(self.numbers)} images of {self.classes} classes; the head starts as {settings.head}")
        ranks.wait()
        holds_out = len(self.held_out) > 0
        with ranks.together():
            student_run = new_student_run(
                self.student, self.learner, self.config, settings, self.out, holds_out, mode, accelerator
            )
        with ImageFile(self.images) as files:
            load, apart = (
                LabelledLoader(files, numbers, self.student.image_size, drawn)
                for numbers, drawn in ((self.numbers, settings), (self.held_out, None))
            )
            m = train([student_run], load, apart, accelerator)
        earlier = self.trained.finetuned.sources if self.trained.finetuned is not None else []
        sources = list(dict.fromkeys([*earlier, *map(str, self.images.given)]))
        finetuned = Finetuned(
            self.classes, len(self.numbers), sources, student_run.steps,
            student_run.loss, m.seconds, m.rate, m.wait_percent, student_run.kept_epoch,
        )  # fmt: skip
        parameters, student = count_parameters(self.student.model), self.out / STUDENT_FOLDER
        result = replace(self.trained, run=self.out, student=student, parameters=parameters, finetuned=finetuned)
        student_run.finish(partial(self._store, result), main)
        return result

    def _store(self, result: DistillResult, student: State, trained: State) -> None:
        """Store the student; write the result last."""
        save_backbone(self.student, student, result.student)
        if (self.source / ADAPTERS).exists():  # the refiner of joint training, which reports read
            shutil.copyfile(self.source / ADAPTERS, self.out / ADAPTERS)
        write_result(result)

    def _start_head(self) -> None:
        """Let the head start as a linear probe, which the first process fits: others might round it in another way."""
        accelerator, ranks = self.accelerator, current()
        width = self.student.model.get_classifier().in_features
        weights = torch.zeros(self.classes, width + 1, device=accelerator.device)
        if accelerator.is_main_process:
            chosen = self.images.select(self.numbers)
            with ranks.slow():
                weight, bias = probe_weights(
                    self.student, chosen, self.classes, self.config.evaluate, accelerator.device
                )
            weights = torch.cat([weight, bias[:, None]], 1)
        ranks.wait()
        if accelerator.num_processes > 1:
            with ranks.together():
                weights = broadcast(weights.contiguous())
        set_head(self.student, weights[:, :-1], weights[:, -1])


def _test(config: Config, result: DistillResult, test: Images) -> OwnHead:
    """Test the student's head, and store the figures in its folder, as singer evaluate does."""
    device = default_device()
    student = load_saved(result.student, config.evaluate.image_size)
    student.model.to(device)
    learned, _ = learned_from(result, test)
    if learned == "yes":
        say("note: the student learned from images of --test")
    file = result_file(result.run, _TASK, (None, test), config)
    context = EvaluationContext(
        result.run, student, device, None, test, config.evaluate, time.perf_counter(), file, learned_from_test=learned
    )
    figures = own_head.probe(context)
    store_result(context, figures, _TASK, None)
    return figures
