"""A quick measurement of teacher, student and codecs, for a chain that has to fit a disk and a time: `singer run`.

A few images go through both models, for some seconds each and at most a tenth of the images, so that small data sets
are not planned for longer than they take. `cache plan` measures more, and longer. choice.py chooses.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline.cache.calibration import calibrate
from pipeline.cache.format import TAIL
from pipeline.cache.pixels import encode_jpegs
from pipeline.config import Config
from pipeline.data import ImageFile, Images
from pipeline.models.backbone import Backbone
from pipeline.planning.cache_size import SizeEstimate
from pipeline.planning.choice import LADDER, Costs
from pipeline.planning.sample import Record, Sample, draw_images, open_teacher, sample_features
from pipeline.runtime.devices import autocast
from pipeline.students.new import new_student
from pipeline.teachers.teacher import load_teacher
from pipeline.training.optimisers import new_optimiser
from singer.backbones import block_outputs, count_parameters, depth, resolve_blocks
from singer.patch_masks import patch_embedding
from singer.sizes import Size

# Each model is measured for so many seconds at most, on this share of the images, in batches of at most this size.
_SECONDS, _IMAGES, _MOST_BATCH = 3.0, 0.1, 64
# The quickest of so many updates counts: other programs may have had the processor in the others.
_UPDATES = 3


def measure_costs(config: Config, listed: Images, device: torch.device) -> Costs:
    """Measure the teacher, the student and the codecs on some of the images.

    Raises UserError if one of them cannot be used.
    """
    backbone = load_teacher(config.teacher)
    blocks = tuple(resolve_blocks(config.cache.blocks, depth(backbone.model)))
    if config.refine.blocks is None and config.distill.blocks is None:
        config.distill.weights_of(blocks)
    images, most = draw_images(config, listed), max(1, int(_IMAGES * len(listed)))
    with ImageFile(images) as files:
        sample = Sample(config, images, files, backbone.image_size, device)
        teacher = open_teacher(config, backbone, device)
        records = sample.batches(min(len(sample), most, _MOST_BATCH))[0]
        decode = _rate(lambda some: sample.load(some, backbone.image_size), records, device, _MOST_BATCH)
        views = sample.load(records, backbone.image_size)
        forward = _rate(lambda some: teacher.trial(views[: len(some)]), records, device, config.cache.views_at_once)
        # So many take about two seconds.
        features = sample_features(config, sample, teacher, max(1, min(len(records), int(2 * forward))))
    calibration = {b: calibrate(x, backbone.prefix) for b, x in features.items()}
    fixed = 4 * count_parameters(backbone.model)
    estimate = SizeEstimate(config, backbone, len(listed), features, calibration, {TAIL: fixed}, 1, None)
    stored, patches = (
        _pixel_bytes(config, views),
        max(1, round(config.cache.token_share * backbone.grid[0] * backbone.grid[1])),
    )
    codecs = dict.fromkeys([config.cache.codec, *LADDER])
    sizes = {codec: stored + sum(estimate.block_bytes(codec, b, patches) for b in blocks) for codec in codecs}
    student = new_student(config.student, backbone.image_size, width=backbone.width, class_token=backbone.has_cls)
    trained, update = _student_costs(config, student, records, device)
    return Costs(decode, forward, trained, sizes, fixed, device.type == "cuda", student.image_size, update)


def _student_costs(
    config: Config, student: Backbone, records: Sequence[Record], device: torch.device
) -> tuple[float, float]:
    """Return the views a second that a student does with its backward pass, and the seconds of the optimiser's step.

    It sees the views twice if patches are masked. Raises UserError if they cannot be.
    """
    model = student.model.to(device).train()
    inputs = torch.zeros(len(records) + 1, 3, *Size.of(student.image_size), device=device)
    last = depth(model) - 1
    passes = 1
    if config.distill.mask_share:
        patch_embedding(model)  # looks whether the model has patches that can be masked
        passes = 2

    def step(some: Sequence[Record]) -> None:
        for _ in range(passes):
            # One image more, because batch norm needs two.
            with autocast(device, config.distill.precision):
                tokens = block_outputs(model, inputs[: len(some) + 1], [last])[last]
            tokens.float().square().mean().backward()

    rate = _rate(step, records, device, _MOST_BATCH)
    learner = nn.Module()
    learner.student = model
    optimiser = new_optimiser(learner, config.distill, device)
    optimiser.step()  # makes its state
    # The default projectors have about as many weights as the student.
    return rate, 2 * min(_timed(optimiser.step, device) for _ in range(_UPDATES))


def _pixel_bytes(config: Config, views: torch.Tensor) -> float:
    """Return the bytes of a stored view; views: (n, height, width, 3) uint8 as the teacher sees them."""
    settings, seen = config.views, Size(*views.shape[1:3])
    stored = Size.of(settings.pixel_size or seen)
    share = (stored.height / seen.height) * (stored.width / seen.width)
    if settings.pixels == "jpeg":
        return share * float(encode_jpegs(views.cpu().numpy(), settings.jpeg_quality).lengths.float().mean())
    return share * 3 * seen.height * seen.width if settings.pixels == "uint8" else 0.0


def _rate(
    work: Callable[[Sequence[Record]], object], records: Sequence[Record], device: torch.device, batch: int
) -> float:
    """Return the records a second of `work`, in batches that grow up to `batch`. The first call does not count."""

    def timed(count: int) -> float:
        return max(_timed(lambda: work(records[:count]), device), 1e-6)

    size, spent, best = 1, timed(1), 0.0
    while True:
        seconds = timed(size)
        best, spent = max(best, size / seconds), spent + seconds
        if size >= min(batch, len(records)) or spent + 2 * seconds > _SECONDS:
            return best
        size = min(2 * size, batch, len(records))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `work`, which may go on on a GPU after its call has ended."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
