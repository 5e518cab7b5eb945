"""A step of training as a GPU does it: one graph, and no waiting for the device."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import seeded, world_config
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.cache import Cache
from pipeline.cache.calibration import calibrate
from pipeline.cache.codecs import CODECS, Decoder
from pipeline.cache.stored import Encoded
from pipeline.config import load_config
from pipeline.data.sampler import BatchIndices
from pipeline.runtime import devices
from pipeline.runtime.buffers import moved
from pipeline.runtime.compiling import Compilable
from pipeline.runtime.progress import Meter
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.distilling.cached_teachers import open_images
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.finetuning.mixing import Mixing
from pipeline.training.optimisers import new_optimiser
from pipeline.training.refining.stored_refiners import load_refiner
from pipeline.training.student_run import fetched
from pipeline.training.to_device import on_device
from singer.errors import UserError
from singer.lora import train_low_rank
from singer.objectives import OBJECTIVES

CPU, META = torch.device("cpu"), torch.device("meta")


class Waits(TorchDispatchMode):
    """Finds what would make the CPU wait for a GPU; meta tensors stand for those on the GPU.

    Reading a number, a branch on one, a selection by a mask and a copy to the CPU fail on them by themselves. A copy
    to the device must be asynchronous, and numbers of rows must be there already.
    """

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs, found = op.overloadpacket._qualified_op_name, kwargs or {}, op(*args, **(kwargs or {}))
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if name == "aten::_to_copy" and first is not None and first.device != found.device:
            assert kwargs.get("non_blocking"), "a copy that the CPU waits for"
        if name == "aten::copy_" and args[1].device != args[0].device:
            assert args[2] if len(args) > 2 else kwargs.get("non_blocking"), "a copy that the CPU waits for"
        if name.startswith("aten::index") and first is not None and first.device == META:
            rows = [x for x in args[1] if x is not None] if isinstance(args[1], list | tuple) else []
            assert all(x.device == META for x in rows), "numbers of rows that are sent from the CPU"
        return found


@pytest.fixture
def meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let meta tensors stand for a GPU's where torch tells devices apart by name."""
    make, autocast = torch.tensor, torch.autocast

    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "numbers that are sent from the CPU"
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "autocast", lambda name, *args, **kwargs: autocast("cpu", *args, **kwargs))


def setup(
    world: Path, device: torch.device, *sets: str, objectives: Mapping[str, float] = {"mse": 1.0, "cosine": 0.5}
) -> tuple[Cache, Distiller, Batch]:
    """A student of the world, and a batch as it is read."""
    cache, student = Cache(world / "cache"), new_student(world_config(world, *sets).student, 32)
    targets = Targets(cache, load_refiner(world / "adapters", cache), student, device)
    model = Distiller(student, [TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching(objectives))])
    weights = torch.full((6,), 1 / 6).numpy()
    indices = BatchIndices(torch.arange(6).numpy(), weights)

    with open_images(cache) as files:
        (stored,) = BatchLoader([cache], files, [32])([[indices]], 1)
    return cache, model.to(device), stored


MAPS = ["student.name=test_resnet", *(f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size"))]


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize("sets", [[], MAPS], ids=["tokens", "maps"])
def test_a_step_waits_for_nothing(world: Path, sets: list[str]) -> None:
    cache, model, stored = setup(world, META, *sets)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cache.decoder(META)  # what stays on the device is sent there once, before the first step
    with Waits():
        losses, _ = model(stored.map(partial(moved, device=META)))
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    assert all(loss.device.type == "meta" for loss in losses.values())


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_with_all_its_parts_waits_for_nothing(world: Path, optimizer: str) -> None:
    """Parts of a batch, other views, a share of the patches, masks, and a limit of the gradient."""
    config = world_config(world, f"distill.optimizer={optimizer}")
    _, model, stored = setup(world, META, "student.patch_size=4", objectives={"mse": 1, "unic": 1})
    model.drop_patches(0.5, config.distill)
    model.mask_patches(0.25, 0.5)
    optimiser = new_optimiser(model, config.distill, META)
    views = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.2, 0.2, 1.0, 1.0, 1.0]]).expand(len(stored.weights), -1, -1)
    both = [of_teacher.map(lambda x: torch.cat([x, x])) for of_teacher in stored.features]
    model.train()
    with Waits():
        batch = replace(stored, features=both, places=views).map(partial(moved, device=META))
        for part in model.decoded(model.begin_step(batch, 2)).split(3):
            losses, _ = model(part)
            torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert set(losses) == {f"{m}{n}" for m in ("", "masked.") for n in ("mse.2", "mse.3", "unic.2", "unic.3")}


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize("name", sorted(n for n, o in OBJECTIVES.items() if not o.in_teacher_units))
def test_objectives_wait_for_nothing(world: Path, name: str) -> None:
    """Those that the teacher's suffix reads are checked when they are made, which needs numbers."""
    _, model, stored = setup(world, META, objectives={name: 1.0})
    model.train()
    with Waits():
        losses, _ = model(stored.map(partial(moved, device=META)))
        torch.stack(list(losses.values())).sum().backward()
    assert all(loss.device.type == "meta" for loss in losses.values())


@pytest.mark.usefixtures("meta_device")
def test_mixing_waits_for_nothing() -> None:
    mixing = Mixing(load_config(sets=["finetune.mixup=0.8", "finetune.cutmix=1"]).finetune, 5)
    pixels, labels = torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.arange(6) % 5
    with Waits():
        for step in range(8):  # by the step, images are mixed by Mixup, by CutMix or not at all
            batch = Batch({8: pixels}, [], torch.ones(6) / 6, labels, step=step).map(partial(moved, device=META))
            mixed = mixing(batch)
    assert mixed.labels.shape == (6, 5) and mixed.labels.device == META


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x * torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x * torch.ones(2).to(x.device),
        lambda x: x[torch.arange(2)],
    ],
)
def test_what_waits_is_found(wait: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Waits():
        wait(torch.empty(3, 2, device=META))


@pytest.mark.parametrize("codec", ["int8", "int3"])
def test_decoding_is_one_graph(codec: str) -> None:
    """Also for other numbers of outliers than the first time, without a new graph each."""
    torch.manual_seed(seeded(0))
    x = torch.randn(5, 17, 24)
    calibration = calibrate(x, 1)
    decoder, graphs = Decoder(CODECS[codec], {1: calibration, 2: calibration}), []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    decode = torch.compile(decoder, fullgraph=True, backend=count)
    for outliers in (1, 2, 3, 5):
        y = x.clone()
        y[range(outliers), range(3, 3 + outliers)] *= 60
        encoded = Encoded({b: CODECS[codec].encode(y, calibration) for b in (1, 2)})
        for block, found in decode(encoded).blocks.items():
            assert torch.equal(found, decoder(encoded).blocks[block])
    assert len(graphs) <= 2


@pytest.mark.parametrize(("sets", "rank"), [([], 0), (MAPS, 0), ([], 2)], ids=["tokens", "maps", "low rank"])
def test_a_step_is_one_graph(world: Path, sets: list[str], rank: int) -> None:
    _, model, stored = setup(world, CPU, *sets)
    if rank:
        train_low_rank(model.student, rank)
    torch._dynamo.reset()
    losses, _ = torch.compile(model, fullgraph=True, backend="eager")(stored)
    for name, loss in model(stored)[0].items():
        torch.testing.assert_close(losses[name], loss)


@pytest.mark.slow
def test_two_shares_of_the_patches_make_few_graphs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each share and size of a batch; other numbers of outliers need none."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    sets = ["distill.token_share=0.5", "distill.whole_share=0.5", "distill.batch_size=40", "distill.epochs=4"]
    plain = distill(world_config(world, *sets), world / "cache", tmp_path / "plain", world / "adapters")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    config = world_config(world, *sets, "distill.compile=true")
    compiled = distill(config, world / "cache", tmp_path / "compiled", world / "adapters")
    assert compiled.steps == 12 and 1 < len(graphs) <= 4
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)


def test_a_compiler_that_fails(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a note, once, and training goes on; where compilation was asked for, it is an error."""

    def broken(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for required in (False, True):
        torch._dynamo.reset()
        model = Compilable(linear, required or "auto", True, "distill.compile")
        if required:
            with pytest.raises(UserError, match="does not work here .*; do without it: --set distill.compile=false"):
                model.run(lambda m: m(x))
        else:
            assert all(torch.equal(model.run(lambda m: m(x)), linear(x)) for _ in range(2))
    said = capfd.readouterr().err
    assert said.count("note: torch.compile does not work here") == 1 and "there is no compiler" in said


def test_auto_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is float32 on a CPU, bf16 on a GPU that has it, and never wins over what is asked for."""
    assert devices.resolved("auto") == "no" and devices.resolved("bf16") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert devices.resolved("auto") == ("bf16" if has else "no") and devices.resolved("no") == "no"
    config = devices.with_precision(load_config(sets=["cache.precision=fp16"]))
    assert (config.cache.precision, config.distill.precision) == ("fp16", "no")


def test_waiting_counts_while_the_device_is_idle() -> None:
    busy = True
    m = Meter("x", 1, "images", True, 0, lambda: busy)
    with m.waiting():
        pass
    assert m.waited == 0
    busy = False
    with m.waiting():
        pass
    assert m.waited > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_for_nothing(world: Path) -> None:
    """What torch itself sees; it is the same step as above."""
    device = torch.device("cuda")
    _, model, stored = setup(world, device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(batch: Batch) -> torch.Tensor:
        losses, _ = model(batch)
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        return torch.stack(list(losses.values())).detach()

    for batch in on_device([stored, stored], device):
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        waiting = [fetched(step(batch)) for batch in on_device([stored] * 4, device)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(wait()) == 4 for wait in waiting)
