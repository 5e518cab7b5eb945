"""Exports: each loads by the snippet of its model card and gives what the student gives, or nothing is written."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import config_with, draw_images, make_vit, seeded, tree_bytes, world_config
from PIL import ExifTags, Image
from safetensors import safe_open
from torch import Tensor

import pipeline.stages.export as stage
from pipeline.config import Config, load_config
from pipeline.data.views import normalise
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_model, load_saved
from pipeline.reports.model_card import began_as
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import CARD, ExportResult, export
from pipeline.students.export_formats import FORMATS, Student, Written
from singer.backbones import block_outputs
from singer.errors import UserError

CPU = torch.device("cpu")
TRACED = ("onnx", "torch-export")
# {format: the output that the tests take by default}; tracing takes seconds, so each format's other output is slow.
QUICK = {to: "tokens" if to == "torch-export" else "pooled" for to in FORMATS}
CASES = [
    pytest.param(to, output, marks=() if output == QUICK[to] else pytest.mark.slow)
    for to in FORMATS
    for output in ("pooled", "tokens")
    if output == "pooled" or to in TRACED
]
SLOW_IF_TRACED = [pytest.param(to, marks=pytest.mark.slow if to in TRACED else ()) for to in FORMATS]
# torch.export reads weights into a buffer that it never writes to, and says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


class Exports(dict[tuple[str, str], ExportResult]):
    """Exports of a run, each made when it is first asked for: {(format, output): result}."""

    def __init__(self, run: Path, root: Path) -> None:
        super().__init__()
        self.run, self.root = run, root

    def __missing__(self, case: tuple[str, str]) -> ExportResult:
        to, output = case
        self[case] = export(settings(output), self.run, self.root / f"{to}-{output}", to)
        return self[case]


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its probe's figures; tests only read it."""
    config = world_config(world, "distill.epochs=1", "evaluate.strengths=[0.1]")
    out = tmp_path_factory.mktemp("runs") / "run"
    distill(config, world / "cache", out, world / "adapters")
    evaluate(config, out, str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    return out


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The run in every format, with every output; tests only read them."""
    return Exports(run, tmp_path_factory.mktemp("exports"))


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run with other values of its teacher in its run.json."""

    def change(**values: object) -> Path:
        shutil.copytree(run, tmp_path / "changed")
        file = tmp_path / "changed" / "run.json"
        about = json.loads(file.read_text())
        about["teachers"][0] |= values
        file.write_text(json.dumps(about))
        return tmp_path / "changed"

    return change


def settings(output: str = "pooled") -> Config:
    return load_config(sets=[f"export.output={output}"])


@torch.inference_mode()
def expected(run: Path, images: Tensor, output: str) -> Tensor:
    model = load_saved(run / "student").model
    last = len(model.blocks) - 1
    return model(images) if output == "pooled" else block_outputs(model, images, [last])[last]


def load(folder: Path, to: str) -> Callable[[Tensor], Tensor]:
    """As any other program would."""
    if to == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    if to == "torch-export":
        module: Callable[[Tensor], Tensor] = torch.export.load(folder / "model.pt2").module()
        return module
    model: Callable[[Tensor], Tensor] = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the card's Python leaves, run where it says, on an image.png."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize(("to", "output"), CASES)
def test_export_gives_what_the_student_gives(
    to: str,
    output: str,
    run: Path,
    exports: Exports,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = exports[to, output]
    assert (result.format, result.output, result.parameters) == (to, output, 8208) and result.max_difference < 1e-5
    assert result.bytes == sum(map(len, tree_bytes(result.export).values()))
    out = tmp_path / "moved"
    shutil.copytree(result.export, out)
    loaded = load(out, to)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), expected(run, images, output), atol=1e-4, rtol=0)

    draw_images(tmp_path / "drawn", 1, 1)
    image = Image.open(tmp_path / "drawn" / "class0" / "0.png").resize((40, 40))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying, as telephones do
    image.transpose(Image.Transpose.ROTATE_90).save(out / "image.png", exif=exif)
    small = torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).copy())
    student = load_saved(run / "student")
    pixels = normalise(small.unsqueeze(0), student.mean, student.std)
    names = run_snippet(out, monkeypatch)
    given = torch.as_tensor(names[output])
    torch.testing.assert_close(given, expected(run, pixels, output), atol=1e-4, rtol=0)
    if to not in TRACED:
        tokens = torch.cat([torch.as_tensor(names["prefix"]), torch.as_tensor(names["patches"])], dim=1)
        torch.testing.assert_close(tokens, expected(run, pixels, "tokens"), atol=1e-4, rtol=0)


def test_files(run: Path, exports: Exports) -> None:
    """None names a place of the machine, but for the two that tell where it was made."""
    own = {"timm": {"config.json", "model.safetensors"}, "onnx": {"model.onnx", "preprocess.json"}}
    own |= {"hf": own["timm"], "torch-export": {"model.pt2", "preprocess.json"}}
    for to, output in QUICK.items():
        result = exports[to, output]
        assert {*tree_bytes(result.export)} == {"README.md", "config.yaml", "provenance.json"} | own[to]
        for name, data in tree_bytes(result.export, "config.yaml", "provenance.json").items():
            for place in (run.parent, Path(timm.__file__).parent, Path(stage.__file__).parent.parent):
                assert str(place).encode() not in data, (to, name)
        assert load_config(result.export / "config.yaml").distill == load_config(run / "config.yaml").distill
    onnx.checker.check_model(onnx.load(exports["onnx", "pooled"].export / "model.onnx"))


def test_preprocessing_is_stored_with_every_format(run: Path, exports: Exports) -> None:
    student = load_saved(run / "student")
    wanted = {
        "size": 32,
        "crop": "center-square",
        "interpolation": "bicubic",
        "mean": list(student.mean),
        "std": list(student.std),
    }
    for to in TRACED:
        assert json.loads((exports[to, QUICK[to]].export / "preprocess.json").read_text()) == wanted
    file = exports["onnx", "pooled"].export / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["preprocess"]) == wanted
    assert [i.shape for i in session.get_inputs()] == [["batch", 3, 32, 32]]
    within = {"preprocess.json": ""}
    torch.export.load(exports["torch-export", "tokens"].export / "model.pt2", extra_files=within)
    assert json.loads(within["preprocess.json"]) == wanted
    for to in ("timm", "hf"):
        model = timm.create_model(f"local-dir:{exports[to, 'pooled'].export}")
        data = timm.data.resolve_model_data_config(model)
        assert data["input_size"] == (3, 32, 32) and data["interpolation"] == "bicubic" and data["crop_pct"] == 1
        assert (data["mean"], data["std"]) == (wanted["mean"], wanted["std"])


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_export_is_probed_as_its_run(to: str, run: Path, world: Path, exports: Exports) -> None:
    config = world_config(world, "evaluate.strengths=[0.1]")
    place = exports[to, "pooled"].export
    found = evaluate(config, place, str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    (probe,) = (json.loads(f.read_text()) for f in run.glob("evaluate-*.json"))
    assert (found.linear, found.knn) == (probe["linear"], probe["knn"])


def test_hub_layout(
    run: Path,
    exports: Exports,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loads through timm's own hub client from a filled download cache, and as the TimmWrapper of transformers does."""
    out = exports["hf", "pooled"].export
    assert (out / CARD).read_text().startswith("---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\n")
    repo = tmp_path / "hub" / "models--me--student"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(out, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = timm.create_model("hf-hub:me/student", pretrained=True).eval()

    config = json.loads((out / "config.json").read_text())
    assert "pretrained_cfg" in config  # by which transformers knows a model of timm
    wrapped = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["model_args"]).eval()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        wrapped.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for model in (hub, load_model("hf-hub:me/student").model, wrapped):
            assert torch.equal(model(images), expected(run, images, "pooled"))


@pytest.mark.parametrize("to", SLOW_IF_TRACED)
def test_student_with_untrained_pooling(
    to: str, changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CLS, pooled by an attention that distillation never reaches: exported as it is, and said so."""
    run = changed()
    vit = make_vit("vit_base_patch16_siglip_224", num_classes=0, embed_dim=12, depth=3)
    save_backbone(vit, vit.model.state_dict(), run / "student")
    out = tmp_path / "export"
    export(settings(), run, out, to)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(load(out, to)(images), expected(run, images, "pooled"), atol=1e-4, rtol=0)
    assert "**Beware:** the attention pooling is untrained" in (out / CARD).read_text()
    Image.new("RGB", (50, 40)).save(out / "image.png")
    assert torch.as_tensor(run_snippet(out, monkeypatch)["pooled"]).shape == (1, 12)


def test_card_tells_where_the_student_comes_from(run: Path, exports: Exports) -> None:
    card = (exports["timm", "pooled"].export / CARD).read_text()
    (about,) = json.loads((run / "run.json").read_text())["teachers"]
    inputs = json.loads((run / "inputs.json").read_text())
    (probe,) = (json.loads(f.read_text()) for f in run.glob("evaluate-*.json"))
    for text in (
        "ViT of width 12 and depth 3, distilled from vit_tiny_patch16_224\n",
        f"weights `{about['teacher']['weights']}`",
        f"| cache | `{about['cache']}` |",
        f"| refiner | cleaner adapter, normaliser standardize; SHA-256 `{inputs['refiner']}` |",
        "| teacher block -> student block | 2 -> 1, 3 -> 2 |",
        "| objective | mse |",
        "| epochs, steps | 1, 7 |",
        f"| seed | {seeded(0)} |",
        "| parameters | 8,208 |",
        f"| linear | cls | {probe['linear']['cls']['top1']:.1f} | {probe['linear']['cls']['top5']:.1f} |",
        f"| k-NN | mean_patch | {probe['knn']['mean_patch']['top1']:.1f} |",
        "The final norm was not trained and is still at its initial values",
        f"timm {timm.__version__}",
        "the licenses of both may restrict",
    ):
        assert text in card, text
    assert "**Beware" not in card


def test_card_says_how_the_student_began() -> None:
    told = {value: began_as(config_with(value)) for value in ("student.init=random", "student.init=a/b.safetensors")}
    assert list(told.values()) == ["random weights", "weights of b.safetensors"]
    assert began_as(config_with("student.init=auto")).startswith(
        "weights of the teacher if these fit it, else random weights"
    )
    assert began_as(config_with("student.init=teacher")) == "weights of the teacher"


def test_card_of_another_run(changed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw targets, blocks after the last target, a pretrained norm, no probes."""
    run = changed(matching={"2": 1}, refiner=None, refiner_kind=None)
    for file in run.glob("evaluate-*.json"):
        file.unlink()
    vit = load_saved(run / "student")
    state = vit.model.state_dict()
    state["norm.weight"] += 0.5
    save_backbone(vit, state, run / "student")
    export(settings(), run, tmp_path / "e", "timm")
    card = (tmp_path / "e" / CARD).read_text()
    for text in (
        "| refiner | none: raw features (FitNet) |",
        "its weights are those of the pretrained model",
        "**Beware:** no target reached the blocks after block 1 (of 0 to 2)",
        "The run has none (`singer evaluate` makes them).",
    ):
        assert text in card, text
    assert "note: no target reached the blocks after block 1" in capsys.readouterr().err


def test_card_of_a_student_whose_teacher_has_no_cls(run: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    (about,) = json.loads((run / "run.json").read_text())["teachers"]
    export(settings(), changed(teacher=about["teacher"] | {"class_token": False}), tmp_path / "e", "timm")
    assert "**Beware:** the teacher has no CLS token" in (tmp_path / "e" / CARD).read_text()


def test_a_new_format_is_a_function_and_a_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(student: Student, folder: Path) -> Written:
        return Written(student.module, "answer = 42")

    monkeypatch.setitem(FORMATS, "nothing", write_nothing)
    assert export(settings(), run, tmp_path / "e", "nothing").max_difference == 0
    assert "```python\nanswer = 42\n```" in (tmp_path / "e" / CARD).read_text()


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_unfaithful_export_leaves_nothing(
    error: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrongly(student: Student, folder: Path) -> Written:
        (folder / "model").write_bytes(b"wrong")
        return Written(lambda images: student.module(images) + error, "")

    out = tmp_path / "e"
    export(settings(), run, out, "timm")
    before = tree_bytes(out)
    monkeypatch.setitem(FORMATS, "wrong", write_wrongly)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    for place, mode in ((out, "overwrite"), (tmp_path / "new", "new")):
        with pytest.raises(UserError, match=r"differs from the student by .*, beyond export.tolerance 0.0001; nothing"):
            export(settings(), run, place, "wrong", mode)  # type: ignore[arg-type]
    assert tree_bytes(out) == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["e", "scratch"] and not tree_bytes(tmp_path / "scratch")


def test_existing_output(run: Path, world: Path, exports: Exports, tmp_path: Path) -> None:
    out = tmp_path / "e"
    shutil.copytree(exports["onnx", "pooled"].export, out)
    with pytest.raises(UserError, match=r"e exists; replace it with --overwrite, or give another --out"):
        export(settings(), run, out, "timm")
    export(settings(), run, out, "timm", "overwrite")
    assert not (out / "model.onnx").exists()
    for place, message in (
        (world / "cache", "was written by singer cache-teacher, not by export"),
        (run / "student", "overlaps the input"),
    ):
        with pytest.raises(UserError, match=message):
            export(settings(), run, place, "timm", "overwrite")


def test_bad_input_is_one_line(
    run: Path, world: Path, changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e"
    unfinished, bare = tmp_path / "unfinished", changed()
    shutil.copytree(run, unfinished)
    (unfinished / "run.json").unlink()
    (bare / "config.yaml").unlink()
    cases = [
        (run, "onxx", "pooled", "--to: unknown 'onxx'; known: timm, hf, onnx, torch-export"),
        (unfinished, "timm", "pooled", "is not a finished run: it has no run.json"),
        (bare, "timm", "pooled", "is not a finished run: it has no config.yaml"),
        (world / "cache", "timm", "pooled", "is not a finished run"),
        (run, "hf", "tokens", "--output tokens is for onnx and torch-export"),
    ]
    for place, to, output, message in cases:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            export(settings(output), place, out, to)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"export\.output: input should be 'pooled' or 'tokens'"):
        settings("cls")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"--to onnx needs onnxruntime: pip install onnx onnxruntime onnxscript"):
        export(settings(), run, out, "onnx")
    assert not out.exists()


@pytest.mark.parametrize("to", SLOW_IF_TRACED)
def test_a_student_with_feature_maps(world: Path, tmp_path: Path, to: str) -> None:
    own = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    config = world_config(world, "student.name=test_convnext", *own, "distill.epochs=1")
    distill(config, world / "cache", tmp_path / "run")
    result = export(config, tmp_path / "run", tmp_path / "out", to)
    assert result.max_difference < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| width of the last stage, stages |" in card and "Vision Transformer" not in card
