"""The parts of the benchmark for GPUs, but for the steps of students (steps.py): each yields its figures."""

import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

import numpy as np
import timm
import torch
from PIL import Image
from read_speed import BATCH, synthetic_features, synthetic_manifest, write_synthetic
from torch import Tensor
from write_speed import from_memory

from pipeline.cache.calibration import calibrate
from pipeline.cache.codecs import CODECS, Decoder
from pipeline.cache.reader import Cache
from pipeline.cache.stored import Encoded, Ragged
from pipeline.config import Config, load_config
from pipeline.data import ImageFile, index_images
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.names import LOCAL
from pipeline.planning.sample import Sample
from pipeline.runtime.buffers import moved
from pipeline.runtime.devices import with_precision
from pipeline.runtime.prefetch import prefetch
from pipeline.stages.cache_teacher import cache_teacher
from singer.backbones import block_outputs, resolve_blocks
from singer.cleaners import CLEANERS, BlockSpec
from singer.logistic import LogisticProblem
from singer.metrics import knn_scores
from singer.objectives import OBJECTIVES, ObjectiveContext
from singer.refiner import Refiner


@dataclass(frozen=True)
class Figure:
    """A figure of the table; value: None if it was not measured, and `unit` then says why."""

    what: str
    value: float | None
    unit: str

    def text(self) -> str:
        """Return the value with its unit."""
        return self.unit if self.value is None else f"{self.value:.4g} {self.unit}"


@dataclass(frozen=True)
class Bench:
    """The device, whether sizes are tiny, and a folder for temporary files."""

    device: torch.device
    small: bool
    folder: Path

    def rate(self, work: Callable[[], object], count: int = 1, seconds: float = 2.0) -> float:
        """Return how many of `count` items a second `work` does; the first two calls warm up."""
        seconds = 0.05 if self.small else seconds
        for _ in range(2):
            work()
        self.wait()
        start, calls = perf_counter(), 0
        while calls == 0 or perf_counter() - start < seconds:
            work()
            calls += 1
            if calls % 8 == 0:  # the CPU must not run ahead by more
                self.wait()
        self.wait()
        return calls * count / (perf_counter() - start)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> list[Figure]:
        """Return the peak of the device's memory since the last call, and of the host's."""
        status = Path("/proc/self/status").read_text().splitlines()
        host = next(int(line.split()[1]) / 1e6 for line in status if line.startswith("VmHWM"))
        found = [Figure("peak memory of the host", host, "GB")]
        if self.device.type == "cuda":
            found.append(Figure("peak memory of the GPU", torch.cuda.max_memory_allocated() / 1e9, "GB"))
            torch.cuda.reset_peak_memory_stats()
        return found

    def config(self, *sets: str) -> Config:
        """Return the configuration of a chain from ViT-L/16 at 224 pixels, or of a tiny one."""
        size = 32 if self.small else 224
        own = [f"teacher.name={LOCAL}{self.teacher}", f"teacher.image_size={size}", "cache.codec=int4"]
        # Students see all patches, whether the teacher is in the step or not.
        own += ["distill.projector=linear", "distill.token_share=1"]
        own += ["cache.workers=16", "distill.workers=16"] if not self.small else ["distill.batch_size=8"]
        return with_precision(load_config(sets=[*own, "distill.trackers=[]", *sets]))

    @cached_property
    def teacher(self) -> Path:
        """Return the folder of a teacher with random weights."""
        args = {"img_size": 32, "patch_size": 8, "depth": 4} if self.small else {}
        name = "vit_tiny_patch16_224" if self.small else "vit_large_patch16_224"
        model = timm.create_model(name, num_classes=10, **args)
        size = int(args.get("img_size", 224))
        backbone = Backbone(model, name, {**args, "num_classes": 10}, size, (0.5,) * 3, (0.5,) * 3)
        save_backbone(backbone, model.state_dict(), self.folder / "teacher")
        return self.folder / "teacher"

    @cached_property
    def shards(self) -> Path:
        """Return a shard of JPEGs, smooth like photographs, of 500 pixels or tiny ones."""
        count, side = (24, 40) if self.small else (2048, 500)

        def jpeg(number: int) -> bytes:
            noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            return buffer.getvalue()

        with ThreadPoolExecutor() as pool, tarfile.open(self.folder / "train-000000.tar", "w") as tar:
            for number, data in enumerate(pool.map(jpeg, range(count))):
                for name, content in ((f"{number:06d}.jpg", data), (f"{number:06d}.cls", str(number % 10).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return self.folder / "train-000000.tar"

    @cached_property
    def cache(self) -> Path:
        """Return a cache of the shard by the teacher."""
        cache_teacher(self.config(), str(self.shards), self.folder / "cache")
        return self.folder / "cache"


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return float((found.cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def equal_share(found: Tensor | Ragged, expected: Tensor | Ragged) -> float:
    """Return the share of equal numbers, or of equal byte strings."""
    if isinstance(found, Ragged) and isinstance(expected, Ragged):
        strings = zip(*(part.data.split(part.lengths.tolist()) for part in (found, expected)), strict=True)
        return sum(torch.equal(a, b) for a, b in strings) / len(found.lengths)
    assert isinstance(found, Tensor) and isinstance(expected, Tensor)
    return float((found == expected).float().mean())


def exact(bench: Bench) -> Iterator[Figure]:
    """Compare the device with the CPU: codes, decoded features, refined targets, losses."""
    n, width = (4, 24) if bench.small else (32, 384)
    side, device = (4 if bench.small else 14), bench.device
    x = synthetic_features(n, 1 + side * side, width)
    calibration = calibrate(x, 1)
    for name, codec in CODECS.items():
        here, there = codec.encode(x, calibration), codec.encode(x.to(device), calibration.to(device))
        for part, values in here.items():
            yield Figure(f"{name}: equal {part}", 100 * equal_share(there[part].to("cpu"), values), "%")
        stored = {part: values.to(device) for part, values in here.items()}
        decoded = codec.decode(stored, calibration.to(device))
        yield Figure(f"{name}: decoding", difference(decoded, codec.decode(here, calibration)), "relative difference")
    for cleaner in CLEANERS:
        refiner = Refiner({0: BlockSpec(width, 1, (side, side), rank=4)}, cleaner, "standardize")
        with torch.no_grad():
            for name, t in [*refiner.named_buffers(), *refiner.named_parameters()]:
                if name.endswith("threshold"):
                    t.fill_(calibration.threshold)
                elif name.endswith(("move", "down", "up")):
                    t.copy_(0.05 * torch.randn(t.shape))
            expected = refiner({0: x})[0]
            refined = refiner.to(device)({0: x.to(device)})[0]
        yield Figure(f"{cleaner}: refining", difference(refined, expected), "relative difference")
    context = ObjectiveContext((0,), width, 1, (side, side), classes=10)
    student, labels = torch.randn_like(x), torch.arange(n) % 10
    for name, kind in OBJECTIVES.items():
        if kind.in_teacher_units or name == "vitkd":
            continue  # it needs a teacher, or draws its mask on the device
        objective = kind(context)
        with torch.no_grad():
            objective({0: student}, {0: x}, labels)  # what it draws at first, such as prototypes
            on_device = deepcopy(objective).to(device)  # a batch changes its state, such as a queue
            losses = torch.stack(list(objective({0: student}, {0: x}, labels).values()))
            moved = on_device({0: student.to(device)}, {0: x.to(device)}, labels.to(device))
        yield Figure(f"{name}: loss", difference(torch.stack(list(moved.values())), losses), "relative difference")


def caching(bench: Bench) -> Iterator[Figure]:
    """Cache images with ViT-L/16 as the command does, start included."""
    # So many views of an image that the start does not count.
    views = [] if bench.small else ["views.count=8", "views.kind=random-resized-crop"]
    for codec in ("int4",) if bench.small else ("int4", "float16"):
        out = bench.folder / f"cache-{codec}"
        result = cache_teacher(bench.config(f"cache.codec={codec}", *views), str(bench.shards), out)
        yield Figure(f"cache-teacher, {codec}, {result.records} images", result.images_per_second, "images/s")
    yield from bench.memory()


def teachers(bench: Bench) -> Iterator[Figure]:
    """Time the bare forward pass of large teachers with random weights, in bf16, plain and compiled."""
    tiny = {"vit_tiny_patch16_224": (4, {"img_size": 32, "patch_size": 8, "depth": 2})}
    large = {
        "vit_large_patch16_224": (256, {}),
        "vit_giant_patch14_dinov2": (128, {"img_size": 224}),
        "vit_7b_patch16_dinov3": (32, {"img_size": 224}),
    }
    for name, (batch, args) in (tiny if bench.small else large).items():
        with torch.device(bench.device):
            model = timm.create_model(name, **args).eval().to(torch.bfloat16)
        images = torch.randn(batch, 3, *model.patch_embed.img_size, device=bench.device, dtype=torch.bfloat16)
        blocks = resolve_blocks(None, len(model.blocks))
        forward = torch.inference_mode()(partial(block_outputs, model, images, blocks))
        yield Figure(f"{name}, plain", bench.rate(forward, batch), "images/s")
        if bench.device.type == "cuda" and "7b" not in name:
            model.forward_intermediates = torch.compile(model.forward_intermediates)
            yield Figure(f"{name}, compiled", bench.rate(forward, batch), "images/s")
        del model, forward
    yield from bench.memory()


def decoding(bench: Bench) -> Iterator[Figure]:
    """Time decoding and refining of a batch of ViT-L/16 alone, one block."""
    n, tokens, width = (4, 17, 24) if bench.small else (256, 197, 1024)
    side = round((tokens - 1) ** 0.5)
    x = synthetic_features(n, tokens, width)
    calibration = calibrate(x[:64], 1)
    refiner = Refiner({0: BlockSpec(width, 1, (side, side))}, "neighbour", "standardize").to(bench.device)
    for codec in ("int4", "int8", "float16"):
        stored = Encoded({0: CODECS[codec].encode(x, calibration)}).map(partial(moved, device=bench.device))
        decode = Decoder(CODECS[codec], {0: calibration.to(bench.device)})

        @torch.no_grad()
        def both(decode: Decoder = decode, stored: Encoded = stored) -> Tensor:
            refined: Tensor = refiner(decode(stored).blocks)[0]
            return refined

        yield Figure(f"decode {codec}", 1e6 / bench.rate(partial(decode, stored)), "µs a batch")
        yield Figure(f"decode {codec} and refine", 1e6 / bench.rate(both), "µs a batch")
        if bench.device.type == "cuda":
            yield Figure(f"decode {codec} and refine, compiled", 1e6 / bench.rate(torch.compile(both)), "µs a batch")


def jpegs(bench: Bench) -> Iterator[Figure]:
    """Decode JPEGs and cut the teacher's views of them by Pillow and by torchvision, in as many threads as caching."""
    count, views = (8 if bench.small else 64), {}
    for kind in ("pillow", "torchvision"):
        config = bench.config(f"views.decoder={kind}", "views.kind=random-resized-crop")
        size = config.teacher.image_size
        assert size is not None
        with ImageFile(index_images(str(bench.shards))) as files:
            sample = Sample(config, files.images, files, size, bench.device)
            views[kind] = sample.views(sample.batches(count)[0], {size})[size].cpu().float()
            with closing(sample.decoding(count, size)) as decoding:
                yield Figure(f"JPEGs to views by {kind}", bench.rate(partial(next, decoding), count), "images/s")
    differences = (views["torchvision"] - views["pillow"]).abs()
    yield Figure("largest difference of torchvision's views", float(differences.max()), "levels of 255")
    yield Figure("mean difference of torchvision's views", float(differences.mean()), "levels of 255")


def probes(bench: Bench) -> Iterator[Figure]:
    """Time the probes of 100,000 features of 384 channels and 1,000 classes."""
    n, width, classes = (200, 16, 5) if bench.small else (100_000, 384, 1000)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    x = centres[labels] + 2 * torch.randn(n, width, generator=generator)
    a, y, b = (t.to(bench.device) for t in (x, labels, x[: n // 10]))
    rate = bench.rate(lambda: list(knn_scores(a, y, b, classes, 20, 0.07)), seconds=1.0)
    yield Figure(f"k-NN of {n // 10} in {n}", 1 / rate, "s")
    start = perf_counter()
    fitted = LogisticProblem(a, y, classes).fit(0.1)
    yield Figure(f"linear probe of {n}, one penalty, {fitted.passes} passes", perf_counter() - start, "s")


def disk(bench: Bench) -> Iterator[Figure]:
    """Encode and write features from memory, and read a cache in shuffled batches."""
    width, count = (24, 1) if bench.small else (1024, 8)
    features = [synthetic_features(BATCH, 197, width, seed) for seed in range(1 if bench.small else 4)]
    values = 2 * sum(x.numel() for x in features)
    for codec in ("int4", "float16"):
        folder = bench.folder / f"disk-{codec}"
        seconds = from_memory(codec, width, features, folder, count)
        yield Figure(f"encode and write {codec}", count * values / seconds / 1e9, "GB/s of float16")
    for codec in ("int4", "float16"):
        place = bench.folder / f"read-{codec}"
        write_synthetic(place, synthetic_manifest(codec, 197, width, BATCH if bench.small else 8192))
        cache = Cache(place)
        order = np.random.default_rng(0).permutation(len(cache))
        lists = np.array_split(order, max(1, len(order) // 256))
        start = perf_counter()
        for _ in prefetch(cache.read, lists, 16):
            pass
        rate = len(cache) * cache.record_bytes / (perf_counter() - start) / 1e9
        yield Figure(f"read {codec} in random batches", rate, "GB/s as stored")
