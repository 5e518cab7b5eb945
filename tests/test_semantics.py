"""What is taken for an artifact, what decays, and what is said where something cannot be told or done."""

import ctypes
import errno
import json
import threading
import urllib.error
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import WIDTH, make_vit, seeded, world_config
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st
from test_real import DATA
from test_real import WEIGHTS as REAL
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.config import StudentConfig, TeacherConfig, load_config
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.storage import LocalStore, batched_reads
from pipeline.students.new import new_student
from pipeline.teachers.teacher import load_teacher
from pipeline.training.distiller import Distiller
from pipeline.training.fsdp import WholeOptimiser
from pipeline.training.joint_training import new_joint
from pipeline.training.parameter_groups import decay_groups
from pipeline.training.targets import Targets
from pipeline.training.teacher_branch import TeacherBranch, Teaching
from singer.adapter_losses import robust_outlier
from singer.artifacts import BlockScale, clip_norms, patch_norms, robust_threshold
from singer.backbones import block_outputs
from singer.cleaners import CLEANERS, Shape
from singer.errors import UserError
from singer.fit_context import FitContext
from singer.suffix import TeacherSuffix, suffix_state

CPU = torch.device("cpu")


# Thresholds


def flagged(norms: Tensor, k: float = 6.0) -> float:
    """The share of the norms that are above their threshold."""
    return float((norms > robust_threshold(norms, k)).float().mean())


@pytest.mark.parametrize(
    "norms",
    {
        "one": torch.tensor([7.0]),
        "two": torch.tensor([1.0, 100.0]),
        "all equal": torch.full((64,), 12.0),
        "all zero": torch.zeros(64),
        "most equal": torch.cat([torch.full((60,), 12.0), torch.linspace(11, 13, 40)]),
        "half equal, half elsewhere": torch.cat([torch.full((50,), 10.0), torch.full((50,), 20.0)]),
        "tiny deviation": torch.cat([10 + 1e-5 * torch.randn(60), torch.linspace(9, 11, 40)]),
        "few levels": torch.randn(1000).mul(1.0).add(10).round(),
    }.items(),
    ids=lambda item: item[0],
)
def test_without_outliers_nothing_is_flagged(norms: tuple[str, Tensor]) -> None:
    assert flagged(norms[1]) == 0


def test_an_artifact_among_equal_norms_is_flagged() -> None:
    norms = torch.full((100,), 12.0)
    norms[7] = 570
    assert flagged(norms) == pytest.approx(0.01) and robust_threshold(norms, 6) < 24


@given(
    st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=80),
    st.floats(0.5, 20),
    st.sampled_from([2.0**-10, 8.0, 2.0**12]),
)
def test_thresholds_of_any_norms(values: list[float], k: float, factor: float) -> None:
    """At most a quarter is flagged, whatever the norms are; and in other units the same tokens are."""
    norms = torch.tensor(values)
    threshold = robust_threshold(norms, k)
    assert flagged(norms, k) <= 0.25 and threshold >= norms.median()
    assert robust_threshold(norms * factor, k) == pytest.approx(threshold * factor, rel=1e-6)


@given(
    st.sampled_from(["normal", "uniform", "laplace", "gamma"]),
    st.floats(0.0, 0.15),
    st.floats(0.0, 0.8),
    st.integers(0, 2**16),
)
def test_thresholds_of_distributions_without_outliers(shape: str, spread: float, equal: float, seed: int) -> None:
    """However small their deviation, and whatever share of the norms is one and the same."""
    rng = np.random.default_rng(seeded(seed))
    drawn = {
        "normal": lambda: rng.normal(0, 1, 4000),
        "uniform": lambda: rng.uniform(-(3**0.5), 3**0.5, 4000),
        "laplace": lambda: rng.laplace(0, 0.5**0.5, 4000),
        "gamma": lambda: (rng.gamma(9, 1, 4000) - 9) / 3,
    }[shape]()
    drawn[: int(equal * len(drawn))] = 0
    # Sigma is at least a twentieth of the median, so that the threshold is two deviations or more above it, and beyond
    # that these distributions have 3.5 % at most.
    assert flagged(torch.from_numpy(20 * (1 + spread * drawn)).float()) <= 0.05


@pytest.mark.skipif(not REAL.exists(), reason=f"no real teacher at {REAL}")
def test_the_floor_changes_no_threshold_of_the_real_teacher() -> None:
    """At every block: sigma is that of the deviation itself, and the quarter is far below."""
    sets = ["teacher.name=vit_tiny_patch16_224", f"teacher.weights={REAL}", "teacher.image_size=128"]
    teacher = load_teacher(load_config(sets=sets).teacher)
    files = sorted(DATA.glob("tinyimagenet50-val-*.tar"))
    if not files:
        pytest.skip("no real images")
    from pipeline.data import ImageFile, index_images
    from pipeline.data.views import apply_view, crop_view, normalise

    images = index_images(str(files[0]))
    with ImageFile(images) as opened:
        pixels = [apply_view(i, crop_view(1.0, i.size), 128) for i in (opened.read(n) for n in range(0, 480, 10))]
    with torch.inference_mode():
        x = normalise(torch.from_numpy(np.stack(pixels)), teacher.mean, teacher.std)
        for block, tokens in block_outputs(teacher.model, x, list(range(12))).items():
            norms = patch_norms(tokens, 1)
            median = norms.median()
            plain = float(median + 6 * 1.4826 * (norms - median).abs().median())
            assert robust_threshold(norms, 6) == pytest.approx(plain, rel=1e-6), block


def test_tokens_without_a_norm_stay_finite() -> None:
    assert torch.equal(clip_norms(torch.zeros(1, 3, 4), 0.0), torch.zeros(1, 3, 4))
    assert torch.isfinite(robust_outlier(torch.ones(1, 3), BlockScale(0.0, 0.0), 0.97))


# Images without a clean patch


def evidence_with(tokens: Tensor, grid: tuple[int, int] | None) -> FitContext:
    vit = make_vit()
    suffix = TeacherSuffix(vit.architecture, vit.model_args, 2, suffix_state(vit.model.state_dict(), 2))
    return FitContext(suffix, 2, tokens, BlockScale(5.0, 10.0), 1, grid)


@pytest.mark.parametrize("grid", [(4, 4), None], ids=["grid", "sampled"])
@pytest.mark.parametrize("cleaner", ["neighbour", "projector"])
def test_an_image_of_artifacts_alone_is_clipped(cleaner: str, grid: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(seeded(0))
    tokens = torch.randn(6, 17, WIDTH, generator=generator)
    tokens[2, 1:] *= 50
    tokens[3, 4] *= 50
    layers = {}
    for name in (cleaner, "clip"):
        layers[name] = CLEANERS[name](Shape(WIDTH, 1, grid))
        layers[name].fit(evidence_with(tokens, grid))
    cleaned, clipped = (layers[name](tokens)[:, 1:] for name in (cleaner, "clip"))
    assert float(cleaned[2].norm(dim=-1).min()) > 1
    if cleaner == "neighbour":
        torch.testing.assert_close(cleaned[2], clipped[2])
        assert not torch.allclose(cleaned[3], clipped[3])  # that one has neighbours
    assert float(cleaned.norm(dim=-1).max()) <= 10 * (1 + 1e-5)


def test_an_image_of_artifacts_alone_is_no_energy_of_zeros() -> None:
    """What is expected there is the clipped token: its excess is what is above the threshold, not all of it."""
    tokens = torch.zeros(1, 5, WIDTH)
    tokens[0, 1:, 3] = 30.0
    energy = evidence_with(tokens, (2, 2)).artifact_energy()
    assert float(energy[3, 3]) == pytest.approx(20.0**2)


# Settings that cannot work together


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["distill.epochs=4", "distill.warmup_epochs=5"], "distill.warmup_epochs: a warm-up of 5 of 4 epochs never"),
        (["distill.epochs=1", "distill.warmup_epochs=1"], r"never reaches .* \(--set distill\.warmup_epochs=0\.05\)"),
        (
            ["distill.batch_size=8", "distill.accumulate=9"],
            "distill.accumulate: a batch of 8 records cannot have 9 parts",
        ),
        (["distill.read_block=64", "distill.shuffle_window=32"], "distill.read_block: 64 neighbouring records are"),
        (["views.count=2"], r"configuration: views\.count: center views are all alike; .* color$"),
    ],
)
def test_settings_that_cannot_work_together(sets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(sets=sets)
    assert "\n" not in str(error.value)


def test_a_remedy_works_as_printed() -> None:
    for epochs in (1, 3, 100):
        with pytest.raises(UserError) as error:
            load_config(sets=[f"distill.epochs={epochs}", f"distill.warmup_epochs={epochs + 1}"])
        remedy = str(error.value).split("--set ")[1].split(")")[0]
        assert load_config(sets=[f"distill.epochs={epochs}", remedy]).distill.warmup_epochs == pytest.approx(
            0.05 * epochs
        )


# Weight decay


def grouped(distiller: Distiller) -> tuple[set[str], set[str]]:
    """Names of what decays, and of what is trained without."""
    names = {id(p): name for name, p in distiller.named_parameters()}
    kept: dict[bool, set[str]] = {True: set(), False: set()}
    for group in decay_groups(distiller, 0.1):
        assert group["weight_decay"] in (0, 0.1)
        kept[group["weight_decay"] > 0] |= {names[id(p)] for p in group["params"]}
    return kept[True], kept[False]


@pytest.mark.parametrize(
    ("student", "spared"),
    [
        ("vit_tiny_patch16_224", {"student.pos_embed", "student.cls_token", "student.blocks.0.norm1.weight"}),
        ("vit_small_patch14_reg4_dinov2", {"student.reg_token", "student.blocks.0.ls1.gamma"}),
        ("test_convnext", {"student.stages.0.blocks.0.conv_dw.bias"}),
        ("fastvit_t8", {"student.stages.0.blocks.0.layer_scale.gamma"}),
    ],
)
def test_what_decays(world: Path, student: str, spared: set[str]) -> None:
    """Matrices of the student, projectors and adapters; no vectors, tokens, positions or scales."""
    cache = Cache(world / "cache")
    # The blocks that are matched are the last ones, so that all is trained.
    backbone = new_student(StudentConfig(name=student, image_size=56 if "14" in student else 64), 64)
    joint, adapters = new_joint(cache, world_config(world).refine, CPU)
    blocks = len(backbone.layout)
    targets = Targets(cache, None, backbone, CPU)
    head = TeacherBranch(
        backbone, {2: blocks - 2, 3: blocks - 1}, targets, Teaching({"mse": 1.0, "vitkd": 1.0}), adapters, joint
    )
    distiller = Distiller(backbone, [head])
    decays, others = grouped(distiller)
    assert decays | others == {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert not decays & others and spared <= others
    sizes = {name: p.shape for name, p in distiller.named_parameters()}
    for name in decays:
        assert len(sizes[name]) > 1, name
        assert not name.endswith(("bias", "_token", "pos_embed", "gamma"))
    assert any("projectors" in name for name in decays) and any("mask_token" in name for name in others)
    assert {name for name in sizes if name.startswith("adapters.")} <= decays


def test_positions_of_a_table_do_not_decay(world: Path) -> None:
    """What an architecture names, here Swin's table of relative positions."""
    swin = new_student(StudentConfig(name="swin_tiny_patch4_window7_224", image_size=224), 224)
    head = TeacherBranch(swin, {2: 2, 3: 3}, Targets(Cache(world / "cache"), None, swin, CPU), Teaching({"mse": 1.0}))
    decays, others = grouped(Distiller(swin, [head]))
    assert any(n.endswith("relative_position_bias_table") for n in others)
    assert not any(n.endswith("relative_position_bias_table") for n in decays)


def test_a_run_of_one_group_is_not_continued(world: Path) -> None:
    """A checkpoint from before decay was grouped: torch would load its moments, and change its decay in silence."""
    student = new_student(world_config(world).student, 32)
    head = TeacherBranch(
        student, {2: 1, 3: 2}, Targets(Cache(world / "cache"), None, student, CPU), Teaching({"mse": 1.0})
    )
    distiller = Distiller(student, [head])
    trained = [p for p in distiller.parameters() if p.requires_grad]

    def state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        for p in trained:
            p.grad = torch.ones_like(p)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return WholeOptimiser(distiller, optimiser).state_dict()

    def new() -> torch.optim.Optimizer:
        return torch.optim.AdamW(decay_groups(distiller, 0.5), lr=0.1)

    again = new()
    WholeOptimiser(distiller, again).load_state_dict(state(new()))
    assert [g["weight_decay"] for g in again.param_groups] == [0, 0.5] and len(again.state) == len(trained)
    with pytest.raises(UserError, match="it was made by another version of singer; start the run anew"):
        WholeOptimiser(distiller, new()).load_state_dict(state(torch.optim.AdamW(trained, weight_decay=0.5)))


# Whether a student learned from the test images


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    distill(world_config(world, "distill.epochs=1"), world / "cache", run)
    return run


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache_place": "GONE"}, "its cache cannot be read: "),
        ({"cache_place": None}, "the run does not say where its cache is"),
        ({"cache_place": "s3://bucket/cache"}, "its cache s3://bucket/cache is not on this machine"),
        ({"cache": "0" * 64}, "there is another cache at "),
        ({}, None),
    ],
    ids=["moved", "unsaid", "remote", "another", "there"],
)
def test_whether_a_student_knows_the_test_images(
    world: Path,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, str | None],
    reason: str | None,
) -> None:
    """Yes, no or unknown, in a line and in the result; unknown says why."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(trained / "student")
    change = {k: str(tmp_path / "gone") if v == "GONE" else v for k, v in change.items()}
    (run / "run.json").write_text(json.dumps({**json.loads((trained / "run.json").read_text()), **change}))
    answers = {}
    for split in ("train", "test"):
        result = evaluate(world_config(world), run, None, str(world / split / "*.tar"), "retrieval")
        assert result.written is not None
        answers[split] = json.loads(result.written.read_text())["learned_from_test"]
        assert answers[split] == result.learned_from_test
    said = capfd.readouterr().err
    unknown = "note: it is unknown whether the student learned from images of --test: "
    if reason is None:
        assert answers == {"train": "yes", "test": "no"} and unknown not in said
        assert said.count("note: the student learned from images of --test") == 1
    else:
        assert answers == {"train": "unknown", "test": "unknown"}
        assert said.count(unknown + reason) == 2


def test_of_a_model_that_is_no_run_nothing_is_asked(world: Path, trained: Path, tmp_path: Path) -> None:
    result = evaluate(
        world_config(world), trained / "student", None, str(world / "test" / "*.tar"), "retrieval", tmp_path
    )
    assert result.learned_from_test is None


# Reads that are not batched


def read_back(store: LocalStore) -> bytes:
    out = np.zeros(5, np.uint8)
    offsets, lengths, places = (np.array(n, np.int64) for n in ([8, 0], [2, 3], [0, 2]))
    store.read_ranges((["ten"], np.zeros(2, np.int64), offsets, lengths, out, places))
    return out.tobytes()


def refused_queue(number: int) -> Callable[[], object]:
    def refuse() -> object:
        raise OSError(number, "io_setup")

    return refuse


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EPERM, "io_setup: Operation not permitted)"),
        (errno.ENOSYS, "io_setup: Function not implemented)"),
        (errno.EAGAIN, "more are possible with a larger fs.aio-max-nr"),
    ],
)
def test_refused_queues_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, reason: str
) -> None:
    store = LocalStore(tmp_path)
    store.write("ten", b"0123456789")
    monkeypatch.setattr(batched_reads, "_told", threading.Lock())
    monkeypatch.setattr(batched_reads, "_local", threading.local())
    monkeypatch.setattr(batched_reads, "_Queue", refused_queue(number))
    threads = [threading.Thread(target=read_back, args=[store]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_back(store) == b"89012"
    said = capfd.readouterr().err
    assert said.count("features are read one range after the other, which is slower") == 1 and reason in said


def test_refused_reads_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system has a queue to give, but takes no read of this file."""
    store, call = LocalStore(tmp_path), batched_reads._call
    store.write("ten", b"0123456789")
    monkeypatch.setattr(batched_reads, "_told", threading.Lock())
    monkeypatch.setattr(batched_reads, "_local", threading.local())
    with batched_reads._queue() as queue:
        if queue is None:
            pytest.skip("this system has no queues")
    capfd.readouterr()
    assert read_back(store) == b"89012" and capfd.readouterr().err == ""
    submit = queue._submit

    def refuse(number: int, *arguments: int) -> int:
        if number != submit:
            return call(number, *arguments)
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(batched_reads, "_call", refuse)
    assert read_back(store) == read_back(store) == b"89012"
    assert capfd.readouterr().err.count("(io_submit: Invalid argument)") == 1


# Why a model is not there


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nFor url: somewhere", response=response)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def not_here(cause: Exception) -> Exception:
    return caused(LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub"), cause)


MISSING = "weights of teacher.name vit_tiny_patch16_224 were not fetched: "
REFUSED = "weights of teacher.name vit_tiny_patch16_224 were not loaded: "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (not_here(OfflineModeIsEnabled("offline mode is enabled")), MISSING + "no network (OfflineModeIsEnabled: "),
        (not_here(ConnectionError("Name or service not known")), MISSING + "no network (ConnectionError: Name or "),
        (not_here(TimeoutError("timed out")), MISSING + "no network (TimeoutError: timed out)"),
        (urllib.error.URLError("unreachable"), MISSING + "no network (URLError: <urlopen error unreachable>)"),
        (not_here(answered(503)), MISSING + "the server answered 503: 503 Client Error."),
        (answered(403, GatedRepoError), MISSING + "the server answered 403 (access is not granted): "),
        (answered(404), MISSING + "the server answered 404 (no such model or file): "),
        (urllib.error.HTTPError("u", 404, "Not Found", Message(), None), MISSING + "the server answered 404 (no such"),
        (FileNotFoundError(2, "No such file or directory", "w.bin"), REFUSED + "[Errno 2] No such file"),
        (RuntimeError("No pretrained weights exist for it."), REFUSED + "No pretrained weights exist for it."),
        (
            RuntimeError("Error(s) in loading state_dict for X:\n\tsize mismatch for head.weight: 1 and 2."),
            REFUSED + "size mismatch for head.weight: 1 and 2.",
        ),
    ],
)
def test_the_cause_is_kept(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    create = timm.create_model

    def fails(name: str, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            raise error
        return create(name, **kwargs)

    monkeypatch.setattr("pipeline.models.loading.timm.create_model", fails)
    with pytest.raises(UserError) as caught:
        load_teacher(TeacherConfig(name="vit_tiny_patch16_224"))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("; give a local file with --weights FILE (teacher.weights)")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [AttributeError("no 'blocks'"), NameError("x"), TypeError("'NoneType' is not iterable"), OSError(28, "disk full")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("given", [True, False], ids=["file", "fetched"])
def test_a_defect_is_none_of_the_networks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, given: bool
) -> None:
    """Of timm, or a disk that is full: as it is, with its own traceback."""
    create = timm.create_model
    safetensors.torch.save_file(create("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")

    def fails(name: str, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            raise error
        return create(name, **kwargs)

    monkeypatch.setattr("pipeline.models.loading.timm.create_model", fails)
    weights = tmp_path / "w.safetensors" if given else None
    with pytest.raises(type(error)) as caught:
        load_teacher(TeacherConfig(name="vit_tiny_patch16_224", weights=weights))
    assert caught.value is error


def test_arguments_that_an_architecture_does_not_take() -> None:
    with pytest.raises(UserError, match=r"^student.name test_resnet: .*unexpected keyword argument 'patch_size'"):
        new_student(StudentConfig(name="test_resnet", patch_size=7), 64)
