"""Build what stage 3 trains, or find out before any training that a student cannot learn from the teachers."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.config import Config, DistillConfig, StudentConfig
from pipeline.models.backbone import Backbone
from pipeline.models.own import Own
from pipeline.storage.tensors import read_matrix
from pipeline.students.new import new_student
from pipeline.students.start import start_student
from pipeline.training.batch_norm import check_parts
from pipeline.training.distilling.cached_teachers import CachedTeacher, cached_weights
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.joint_training import new_joint
from pipeline.training.distilling.subset import image_counts, image_scorer, split_images
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.other_views import OtherViews
from singer.backbones import depth, freeze_others
from singer.lora import train_low_rank
from singer.matching import match_blocks
from singer.objectives import OBJECTIVES
from singer.patch_dropout import can_leave_out_patches
from singer.refiner import Refiner


def new_distiller(
    student: Backbone,
    config: Config,
    teachers: Sequence[CachedTeacher],
    device: torch.device,
    refiners: Sequence[Refiner | None] | None = None,
) -> tuple[Distiller, OtherViews | None]:
    """Build what is trained with a student, and what chooses the other views of distill.overlap, if it is set.

    refiners: one for each teacher; None to learn only whether all fits, without the adapters of joint training. Raises
    UserError if the student cannot learn from these teachers in this way.
    """
    settings = config.distill
    share = _token_share(student, settings, teachers)
    branches = _branches(student, config, teachers, device, refiners, whole=share == 1)
    distiller = Distiller(student, branches, settings.teacher_drop).to(device)
    if settings.mask_share:
        distiller.mask_patches(settings.mask_share, settings.mask_weight)
    if settings.trained is not None:
        freeze_others(student.model, settings.trained)
    if config.student.lora is not None:
        train_low_rank(student.model, config.student.lora)
    if share < 1:
        distiller.drop_patches(share, settings)
    others = None
    if settings.overlap != "none":
        for branch in branches:
            if settings.overlap == "other":
                branch.check_tokenwise("overlap=none", "the two views have other ones")
            else:
                branch.targets.check_whole("overlap=none", "the views of an image have other ones")
        others = OtherViews(teachers[0].cache, settings.seed, average=settings.overlap == "average")
    return distiller, others


def student_of(config: StudentConfig, teachers: Sequence[CachedTeacher], module: Own | None = None) -> Backbone:
    """Build a student for the input of the first teacher. Raises UserError as new_student does."""
    cache = teachers[0].cache
    teacher = cache.manifest.teacher
    width = teacher.width_of(cache.blocks[-1])
    return new_student(config, teacher.image_size, module, width, teach_cls(teachers))


def teach_cls(teachers: Sequence[CachedTeacher]) -> bool:
    """Return whether one of the teachers has a class token."""
    return any(teacher.cache.manifest.teacher.class_token for teacher in teachers)


def check_student(config: Config, teachers: Sequence[CachedTeacher]) -> None:
    """Raise UserError if a new student cannot learn from these teachers; refiners need not exist yet.

    It builds all that one process would train, on the CPU and with random weights; it reads no features, and does not
    load the teacher.
    """
    cache, settings = teachers[0].cache, config.distill
    random = config.student.model_copy(update={"pretrained": False})
    student = student_of(random, teachers)
    start_student(student, config.student, cached_weights(cache, config.teacher.weights), fits_only=True)
    distiller, _ = new_distiller(student, config, teachers, torch.device("cpu"))
    if settings.share_by == "random":
        records, _ = split_images(cache, settings)
        check_parts(student, distiller.blocks[-1], settings, len(cache) if records is None else len(records), 1)
    else:
        image_scorer(cache, settings, None, torch.device("cpu"))
        image_counts(len(np.unique(cache.index.first_image)), settings)


def _token_share(student: Backbone, settings: DistillConfig, teachers: Sequence[CachedTeacher]) -> float:
    """Return distill.token_share: by default a half, where student, caches and objectives allow it.

    With half of the patches, students were as good at equal steps, for three quarters of the time (docs/results.md,
    "Levers, one at a time").
    """
    if settings.whole_share == 1:
        return 1.0
    if settings.token_share is not None:
        return settings.token_share
    sampled = any(teacher.cache.manifest.sampled for teacher in teachers)
    tokenwise = all(OBJECTIVES[name].tokenwise for name in settings.objectives)
    may = tokenwise and not (settings.joint or sampled) and can_leave_out_patches(student.model)
    return 0.5 if may else 1.0


def _branches(
    student: Backbone,
    config: Config,
    teachers: Sequence[CachedTeacher],
    device: torch.device,
    refiners: Sequence[Refiner | None] | None,
    whole: bool,
) -> list[TeacherBranch]:
    """Build what the student has for each teacher, with fresh adapters in joint training.

    whole: whether the student always sees all patches; the other arguments are those of new_distiller.
    """
    settings = config.distill
    texts = read_matrix(settings.texts) if settings.texts is not None else None
    objectives, branches = settings.objectives_of(len(teachers)), []
    of_each = refiners if refiners is not None else [None] * len(teachers)
    for teacher, refiner, wanted in zip(teachers, of_each, objectives, strict=True):
        cache = teacher.cache
        matching = match_blocks(cache.blocks, cache.manifest.teacher.depth, depth(student.model))
        targets = Targets(cache, refiner, student, device, texts)
        joint = new_joint(cache, config.refine, device) if settings.joint and refiners is not None else None
        weights = settings.weights_of(cache.blocks)
        projector = "linear" if settings.joint and settings.projector is None else settings.projector
        teaching = Teaching(wanted, projector, weights, settings.kd_weight * teacher.weight, teacher.name)
        branches.append(TeacherBranch(student, matching, targets, teaching, joint, whole=whole))
    return branches
