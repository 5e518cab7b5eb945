"""Stage 3: train a student on frozen refined targets, computed on the fly from the cached features.

`singer distill --cache CACHE --adapters ADAPTERS --out RUN`, or `accelerate launch cli.py distill ...` on several
processes. Without adapters the targets are the raw features: the FitNet baseline. Sees only the cache and the images.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from pipeline.cache.reader import Cache, Encoded
from pipeline.checkpoint import Checkpoint, RunLog
from pipeline.config import Config, DistillConfig, RefineConfig
from pipeline.devices import make_accelerator
from pipeline.models import Vit, new_student, save_vit
from pipeline.outputs import (
    INPUTS,
    Mode,
    check_inputs,
    check_output,
    claimed_output,
    file_hash,
    read_as,
    write_json,
    write_tensors,
)
from pipeline.prefetch import prefetch
from pipeline.progress import Meter, meter, say
from pipeline.readplan import EpochOrder, Share, share, steps_per_epoch
from pipeline.refine import REFINER, Fit, load_refiner, read_refiner
from pipeline.shards import ImageFile, relocate
from pipeline.stores import Place
from pipeline.views import normalise
from singer.artifacts import BlockScale
from singer.cleaners import Adapter
from singer.losses import Exchange, adapter_losses
from singer.matching import match_blocks, resize_tokens, take_patches
from singer.objectives import OBJECTIVES, Setting
from singer.refiner import Refiner
from singer.tail import TeacherTail
from singer.vit import block_outputs, depth, freeze_unused, grid_size

STAGE = "distill"
STUDENT = "student"
PROJECTORS = "projectors.safetensors"
# Of joint training.
ADAPTERS = "adapters.safetensors"
CHECKPOINT = "checkpoint.pt"
RUN = "run.json"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TeacherNote:
    """Whose features a student learned from. weights: SHA-256, as in the cache's manifest."""

    name: str
    architecture: str
    weights: str
    image_size: int
    class_token: bool


@dataclass(frozen=True)
class RefinerNote:
    """What refined them; the hash of its file is among the inputs."""

    cleaner: str
    normaliser: str


@dataclass(frozen=True)
class DistillResult:
    """A trained student. loss: mean of the last epoch; matching: {teacher block: student block}.

    refiner: None without adapters. Runs from before there were notes have None for both.
    """

    run: Path
    student: Path
    cache: str
    adapters: str | None
    matching: dict[int, int]
    parameters: int
    steps: int
    loss: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    teacher: TeacherNote | None = None
    refiner: RefinerNote | None = None


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step: pixels (n, size, size, 3) uint8, stored features, weights (n,)."""

    pixels: Tensor
    encoded: Encoded
    weights: Tensor


@dataclass(frozen=True)
class Joint:
    """What the paper trains with the student: fresh adapters, and what their losses need. Not a module: all frozen."""

    tail: TeacherTail
    scales: dict[int, BlockScale]
    settings: RefineConfig
    prefix: int

    def losses(self, original: Mapping[int, Tensor], refined: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Weighted L_outlier and L_info (and L_keep) over {block: (B, N, d)}, each a mean over the blocks."""
        s = self.settings
        weights = {"outlier": s.outlier_weight, "info": s.info_weight, "keep": s.keep_weight}
        found = adapter_losses(
            Exchange(original, refined, self.tail, self.scales, self.prefix),
            list(refined), s.outlier_form, s.info_form, s.quantile, s.keep_weight > 0,
        )  # fmt: skip
        return {name: weights[name] * torch.stack(list(of.values())).mean() for name, of in found.items()}


class Distiller(nn.Module):
    """All that is trained, and its losses: a student, a projector to the teacher's width at every matched block, an
    objective and, in joint training, the adapters that refine its targets.
    """

    def __init__(
        self,
        student: Vit,
        matching: dict[int, int],
        targets: "Targets",
        objective: str,
        adapters: Refiner | None = None,
        joint: Joint | None = None,
        kd_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student.model
        self.matching, self.prefix, self.kd_weight = matching, student.prefix, kd_weight
        # Frozen, and so none of this module's.
        self._targets, self._joint = [targets], joint
        width = targets.cache.manifest.teacher.width
        self.projectors = nn.ModuleDict({str(b): nn.Linear(student.width, width) for b in matching})
        self.objective = OBJECTIVES[objective](
            Setting(tuple(matching), width, int(targets.keep_cls), targets.meeting_grid)
        )
        self.adapters = adapters
        freeze_unused(self.student, max(matching.values()))

    def tokens(self, images: Tensor) -> dict[int, Tensor]:
        """{teacher block: projected student tokens (B, [CLS +] patches, teacher width)}."""
        outputs = block_outputs(self.student, images, sorted(self.matching.values()))
        keep_cls = self._targets[0].keep_cls
        return {
            teacher: self.projectors[str(teacher)](select_tokens(outputs[block], self.prefix, keep_cls))
            for teacher, block in self.matching.items()
        }

    def forward(
        self, images: Tensor, features: dict[int, Tensor], positions: Tensor | None, weights: Tensor
    ) -> dict[str, Tensor]:
        """Named scalar losses, whose sum is to be minimised, for images (B, 3, H, W).

        features: {block: (B, N, d)}, refined unless training is joint; weights (B,): of each record in the mean.
        """
        (targets,) = self._targets
        losses: dict[str, Tensor] = {}
        if self._joint is not None:
            assert self.adapters is not None
            real = weights > 0  # the last batch of an epoch may be filled up
            with torch.autocast(images.device.type, enabled=False):
                refined = self.adapters(features)
                losses = self._joint.losses(
                    {b: x[real] for b, x in features.items()}, {b: x[real] for b, x in refined.items()}
                )
            features = refined
        tokens = targets.meet(self.tokens(images), positions)
        wanted = targets.arrange(features, positions)
        found = self.objective({b: x.float() for b, x in tokens.items()}, wanted)
        each = {f"{b}": (loss * weights).sum() * self.kd_weight / len(found) for b, loss in found.items()}
        return each | losses


def select_tokens(tokens: Tensor, prefix: int, keep_cls: bool) -> Tensor:
    """CLS (if kept) and patches of tokens (B, N, d); registers never meet those of another model."""
    patches = tokens[:, prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if keep_cls else patches


class Targets:
    """Stored features -> what the student is to match, on its own token grid."""

    def __init__(self, cache: Cache, refiner: Refiner | None, student: Vit, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.refiner = refiner.to(device) if refiner is not None else None
        self.keep_cls = cache.manifest.teacher.class_token and student.has_cls
        self.student_grid = grid_size(student.model)

    @property
    def meeting_grid(self) -> tuple[int, int] | None:
        """The grid on which tokens are compared; None where the cache holds a share of the patches."""
        return None if self.cache.manifest.sampled else self.student_grid

    def features(self, encoded: Encoded) -> dict[int, Tensor]:
        """The teacher's features {block: (B, N, d)} on the device."""
        return self.cache.decode(encoded, self.device)

    @torch.no_grad()
    def refine(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """By the frozen refiner, if there is one."""
        return self.refiner(features) if self.refiner is not None else features

    def arrange(self, features: dict[int, Tensor], positions: Tensor | None) -> dict[int, Tensor]:
        """The tokens that students have counterparts of, on the student's grid unless they were sampled."""
        teacher = self.cache.manifest.teacher
        targets = {b: select_tokens(x, teacher.prefix_tokens, self.keep_cls) for b, x in features.items()}
        if positions is not None:
            return targets
        return {b: resize_tokens(x, int(self.keep_cls), teacher.grid, self.student_grid) for b, x in targets.items()}

    def __call__(self, encoded: Encoded) -> dict[int, Tensor]:
        return self.arrange(self.refine(self.features(encoded)), encoded.positions)

    def meet(self, tokens: dict[int, Tensor], positions: Tensor | None) -> dict[int, Tensor]:
        """Student tokens where there are targets: of a cache with sampled tokens, those at the teacher's positions."""
        if positions is None:
            return tokens
        prefix, grid = int(self.keep_cls), self.cache.manifest.teacher.grid
        return {
            b: take_patches(resize_tokens(x, prefix, self.student_grid, grid), prefix, positions)
            for b, x in tokens.items()
        }


def distill(
    config: Config,
    cache_path: Place,
    out: Path,
    adapters: Path | None = None,
    shards: str | Sequence[str] | None = None,
    mode: Mode = "new",
) -> DistillResult:
    """Train a student and store it at `out`. Raises ValueError for whatever the user can mend.

    shards: where the cached shards lie now, if they have moved since they were cached.
    """
    settings = config.distill
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"distill.objective: unknown {settings.objective!r}; known: {', '.join(OBJECTIVES)}")
    if settings.joint and adapters is not None:
        raise ValueError("distill.joint trains adapters of its own; leave --adapters out, or distill.joint")
    blocks, teacher = settings.blocks, settings.teacher
    if adapters is not None:
        fitted = read_refiner(adapters)
        blocks, teacher = blocks or tuple(fitted.scales), teacher or fitted.teacher
    cache = Cache(cache_path, teacher, blocks, settings.local_copy)
    check_output(out, mode, STAGE, config, [cache_path, *filter(None, [adapters]), *cache.index.images.paths])
    refiner = load_refiner(adapters, cache) if adapters is not None else None
    images = open_images(cache, shards)
    set_seed(settings.seed)
    student = new_student(config.student, cache.manifest.teacher.image_size)
    matching = match_blocks(cache.blocks, cache.manifest.teacher.depth, depth(student.model))
    inputs = {"cache": cache.id, "adapters": file_hash(adapters / REFINER) if adapters is not None else None}
    if mode == "resume" and (out / INPUTS).exists():
        check_inputs(out, inputs)
        if (out / RUN).exists():
            return load_result(out)

    accelerator = make_accelerator(settings.precision)
    main = accelerator.is_main_process
    with claimed_output(out, mode, STAGE, config, settings.seed) if main else nullcontext():
        return _distill(config, cache, out, adapters, images, student, matching, refiner, inputs, mode, accelerator)


def _distill(
    config: Config,
    cache: Cache,
    out: Path,
    adapters: Path | None,
    images: AbstractContextManager[ImageFile | None],
    student: Vit,
    matching: dict[int, int],
    refiner: Refiner | None,
    inputs: dict[str, str | None],
    mode: Mode,
    accelerator: Accelerator,
) -> DistillResult:
    """Train and store, once everything has been checked and the output is ours."""
    settings, main = config.distill, accelerator.is_main_process
    teacher = cache.manifest.teacher
    # Now, since adapters may be gone when a long run ends.
    fitted = read_refiner(adapters) if adapters is not None else None
    if main:
        write_json(out / INPUTS, inputs)
        say("teacher block -> student block: " + ", ".join(f"{t} -> {s}" for t, s in matching.items()))
    accelerator.wait_for_everyone()
    targets = Targets(cache, refiner, student, accelerator.device)
    joint, fresh = new_joint(cache, config.refine, accelerator.device) if settings.joint else (None, None)
    distiller = Distiller(student, matching, targets, settings.objective, fresh, joint, settings.kd_weight)
    distiller.to(accelerator.device)
    trainable = [p for p in distiller.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
    parts = {"model": distiller, "optimiser": optimiser, "scaler": accelerator.scaler}
    checkpoint = Checkpoint(out / CHECKPOINT, parts, settings.checkpoint_minutes)
    first_step = checkpoint.restore(accelerator.device) if mode == "resume" else 0
    model, optimiser = accelerator.prepare(distiller, optimiser)

    log = RunLog(out / LOG, first_step, main)
    with images as files:
        load = BatchLoader(cache, files, student.image_size)
        loss, m = train(settings, student, targets, load, model, optimiser, checkpoint, log, accelerator, first_step)
    result = DistillResult(
        run=out,
        student=out / STUDENT,
        cache=cache.id,
        adapters=str(adapters) if adapters is not None else None,
        matching=matching,
        parameters=sum(p.numel() for p in student.model.parameters()),
        steps=settings.epochs * steps_per_epoch(len(cache), settings.batch_size),
        loss=loss,
        seconds=m.seconds,
        images_per_second=m.rate,
        data_wait_percent=m.wait_percent,
        teacher=TeacherNote(
            teacher.name, teacher.architecture, teacher.weights, teacher.image_size, teacher.class_token
        ),
        refiner=RefinerNote(fitted.cleaner, fitted.normaliser) if fitted is not None else None,
    )
    if main:
        save_vit(student, student.model.state_dict(), out / STUDENT)
        write_tensors(out / PROJECTORS, distiller.projectors.state_dict())
        if fresh is not None:
            write_tensors(out / ADAPTERS, fresh.state_dict())
        # Without the place where it was made: a run may move.
        write_json(out / RUN, {**asdict(result), "run": ".", "student": STUDENT})
        checkpoint.path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return result


def train(
    settings: DistillConfig,
    student: Vit,
    targets: Targets,
    load: "BatchLoader",
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    log: RunLog,
    accelerator: Accelerator,
    first_step: int,
) -> tuple[float, Meter]:
    """The steps from first_step to the end of the last epoch; the mean loss since the last log line, and the meter."""
    cache = targets.cache
    per_epoch = steps_per_epoch(len(cache), settings.batch_size)
    total = settings.epochs * per_epoch

    def seen(step: int) -> int:
        """Records that all processes have trained on before `step`."""
        epoch, within = divmod(step, per_epoch)
        return epoch * len(cache) + min(len(cache), within * settings.batch_size)

    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    log_every = min(50, max(1, per_epoch // 4))
    model.train()
    with meter("distill", settings.epochs * len(cache), "images", quiet=not main, done=seen(first_step)) as m:
        plan = shares(len(cache), settings, rank, world, first_step, total)
        summed: dict[str, Tensor] = {}
        since = mean_loss = 0.0
        for step, batch in enumerate(prefetch(load, plan, settings.workers, m), start=first_step):
            # Whatever a model draws (drop path, dropout) depends on the step alone, so that a resumed run repeats it.
            torch.manual_seed(hash((settings.seed, step, rank)) & 0x7FFFFFFF)
            rate = learning_rate(settings, step, per_epoch)
            for group in optimiser.param_groups:
                group["lr"] = rate
            images = normalise(batch.pixels, student.mean, student.std, accelerator.device)
            weights = batch.weights.to(accelerator.device)
            features = targets.refine(targets.features(batch.encoded))
            losses = model(images, features, batch.encoded.positions, weights)
            optimiser.zero_grad(set_to_none=True)
            accelerator.backward(torch.stack(list(losses.values())).sum())
            if settings.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), settings.clip_grad)
            optimiser.step()
            summed = {name: summed.get(name, 0) + loss.detach() for name, loss in losses.items()}
            since += 1
            m.advance(seen(step + 1) - seen(step), f"loss {mean_loss:.4f}" if mean_loss else "")

            epoch_ends = (step + 1) % per_epoch == 0
            if (step + 1) % log_every == 0 or epoch_ends:
                parts = {name: float(v) / since for name, v in accelerator.reduce(summed, "mean").items()}
                mean_loss = sum(parts.values())
                if not math.isfinite(mean_loss):
                    raise ValueError(
                        f"the loss is {mean_loss} at step {step + 1}; lower distill.lr or use precision no"
                    )
                log.write(
                    step=step + 1,
                    epoch=(step + 1) / per_epoch,
                    lr=rate,
                    loss=mean_loss,
                    parts=parts,
                    images_per_second=m.rate,
                    data_wait_percent=m.wait_percent,
                )
                summed, since = {}, 0.0
                # Only here are all running sums empty, so that a checkpoint needs none of them.
                if main and step + 1 < total:
                    checkpoint.save(step + 1, force=epoch_ends)
    return mean_loss, m


def new_joint(cache: Cache, settings: RefineConfig, device: torch.device) -> tuple[Joint, Refiner]:
    """Fresh adapters for joint training, in their starting subspace, and what their losses need."""
    settings = settings.model_copy(update={"cleaner": "adapter", "normaliser": "none"})
    fit = Fit(cache, settings, np.arange(len(cache)), device)
    for block, start in fit.starts.items():
        adapter = fit.refiner.cleaner(block)
        assert isinstance(adapter, Adapter)
        adapter.start(start, settings.start == "doubled")
    return Joint(fit.tail, fit.scales, settings, cache.manifest.teacher.prefix_tokens), fit.refiner


def learning_rate(settings: DistillConfig, step: int, per_epoch: int) -> float:
    """Linear warm-up over warmup_epochs, then half a cosine down to final_lr · lr at the last step."""
    warm = settings.warmup_epochs * per_epoch
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, settings.epochs * per_epoch - 1 - warm)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def shares(
    records: int, settings: DistillConfig, rank: int, world: int, first_step: int, total: int
) -> Iterator[Share]:
    """This process's part of every global batch from first_step on."""
    per_epoch = steps_per_epoch(records, settings.batch_size)
    order: EpochOrder | None = None
    for step in range(first_step, total):
        epoch, within = divmod(step, per_epoch)
        if order is None or within == 0:
            order = EpochOrder(records, settings.seed, epoch, settings.read_block, settings.shuffle_window)
        yield share(order, within, settings.batch_size, rank, world)


class BatchLoader:
    """Share -> Batch: the stored views, decoded anew at the student's resolution, and the stored features."""

    def __init__(self, cache: Cache, files: ImageFile | None, image_size: int) -> None:
        self.cache, self.files, self.image_size = cache, files, image_size

    def __call__(self, share: Share) -> Batch:
        pixels = self.cache.pixels(share.records, self.image_size, self.files)
        return Batch(pixels, self.cache.read(share.records), torch.from_numpy(share.weights))


def open_images(cache: Cache, shards: str | Sequence[str] | None = None) -> AbstractContextManager[ImageFile | None]:
    """The cached images where they lie now; None if the cache holds the views. Raises ValueError as relocate."""
    return nullcontext() if cache.has_pixels else ImageFile(relocate(cache.index.images, shards))


def load_result(run: Path) -> DistillResult:
    """The result of a finished run. Raises ValueError if there is none at `run`."""
    return replace(read_as(run / RUN, DistillResult, "finished run"), run=run, student=run / STUDENT)
