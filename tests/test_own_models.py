"""Modules of one's own as teachers and students: the example of the page, objects in Python, and what can go wrong."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_with, run_singer, seeded
from pages import fences
from torch import nn

from pipeline.cache.reader import Cache
from pipeline.chains.run import run
from pipeline.config import Config
from pipeline.models.loading import load_model, load_saved
from pipeline.models.names import is_function
from pipeline.models.own import Own
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import export
from pipeline.stages.refine import refine
from pipeline.stages.report import report
from pipeline.stages.verify import verify
from singer import Description
from singer.backbones import block_outputs, depth
from singer.described import as_backbone
from singer.errors import UserError

PAGE = Path(__file__).parent.parent / "docs" / "own-models.md"
STUDENT = ["student.dim=null", "student.depth=null", "student.heads=null", "student.patch_size=null"]
# Of the tests' configuration: what builds a student, which is for no module that is given.
LEFT_OUT = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
TRAIN = ["refine.cleaner=neighbour", "distill.epochs=1", "distill.batch_size=50"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example of the page, in which the test runs."""
    example = next(f for f in fences(PAGE) if f.note == "file: mymodels.py")
    assert len(example.text.splitlines()) <= 27
    (tmp_path / "mymodels.py").write_text(example.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    return tmp_path


def mine_with(*sets: str) -> Config:
    return config_with("teacher.name=mymodels:net", "cache.blocks=[1,2]", *TRAIN, *sets)


def test_the_example_as_teacher_and_student(world: Path, mine: Path) -> None:
    train, test = (str(world / split / "*.tar") for split in ("train", "test"))
    config = mine_with("student.name=mymodels:net", *STUDENT)
    cache_teacher(config, train, mine / "cache")
    cache = Cache(mine / "cache")
    teacher = cache.manifest.teacher
    assert (teacher.name, teacher.architecture, teacher.depth) == ("mymodels:net", "own:Net", 3)
    assert (teacher.prefix_tokens, teacher.class_token, teacher.grid, cache.has_suffix) == (0, False, (4, 4), False)
    with pytest.raises(UserError, match="own:Net: this teacher has no suffix"):
        cache.suffix()
    refine(config, mine / "cache", mine / "refiner")
    assert np.isfinite(distill(config, mine / "cache", mine / "run", mine / "refiner").loss)

    # Neither a run nor a cache chooses which code is run.
    with pytest.raises(UserError, match=r"is a Net, a module of your own; name the function .*--set student.name="):
        evaluate(config_with(*STUDENT), mine / "run", train, test)
    assert set(evaluate(config, mine / "run", train, test).linear) == {"mean_patch"}
    assert export(config, mine / "run", mine / "exported", "torch-export").max_difference < 1e-4
    for to in ("timm", "hf"):
        with pytest.raises(UserError, match="onnx or torch-export"):
            export(config, mine / "run", mine / to, to)
    with pytest.raises(UserError, match="is a module of a program; .*--weights"):
        load_model(f"local-dir:{mine / 'run' / 'student'}")
    again = load_model("mymodels:net", mine / "run" / "student" / "model.safetensors")
    saved = load_saved(mine / "run" / "student", function="mymodels:net")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), saved.model.parameters(), strict=True))
    with pytest.raises(UserError, match="a module of your own; name the function .* with --student mymodels:net"):
        report([mine / "run"], mine / "page.html", cache=mine / "cache")
    made = report([mine / "run"], mine / "page.html", cache=mine / "cache", students=["mymodels:net"], records=8)
    assert made.runs == 1 and "data:image/png;base64," in made.out.read_text()


def test_from_photos_to_a_student_of_ones_own(world: Path, mine: Path) -> None:
    """There is nothing to export to timm, and the report knows the module."""
    config = mine_with("student.name=mymodels:net", *STUDENT, "views.count=1")
    made = run(config, world / "images" / "train", mine / "out")
    assert made.report.exists() and made.timm is None and not (mine / "out" / "timm").exists()


def test_the_cache_knows_its_teacher(world: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mine_with()
    cache_teacher(config, str(world / "train" / "*.tar"), mine / "cache")
    assert run_singer(monkeypatch, "cache", "verify", mine / "cache") == 0
    assert verify(config, mine / "cache", live=True).whole
    with pytest.raises(UserError, match="not run because the cache names it; .*--teacher mymodels:net"):
        verify(config_with(), mine / "cache", live=True)
    (mine / "mymodels.py").write_text((mine / "mymodels.py").read_text().replace("seed(0)", "seed(1)"))
    sys.modules.pop("mymodels")
    with pytest.raises(UserError, match=r"the cache's teacher.weights is .*, here it is .*\(mymodels:net\)"):
        verify(config, mine / "cache", live=True)


class Maps(nn.Module):
    """Two stages of feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 8, 2, 2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.second(self.first(images)),)


def test_objects_in_python(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(seeded(0))
    maps = Maps(), Description(blocks=["first", "second"], image_size=32)
    config = config_with("cache.blocks=[0,1]", *TRAIN, *LEFT_OUT)
    cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "cache", teacher=maps)
    cache = Cache(tmp_path / "cache")
    teacher = cache.manifest.teacher
    assert (teacher.name, teacher.shapes) == ("own:Maps", ((6, (8, 8)), (8, (4, 4))))
    live = block_outputs(as_backbone(*maps), torch.zeros(1, 3, 32, 32), [0, 1])
    assert [tuple(x.shape) for x in live.values()] == [(1, 64, 6), (1, 16, 8)]
    refine(config, tmp_path / "cache", tmp_path / "refiner")
    note = "note: the teacher has no CLS token, so the student's has no target"
    for sets, has_cls in (([], False), (["student.name=test_vit", *STUDENT], True)):
        result = distill(config_with(*TRAIN, *sets), tmp_path / "cache", tmp_path / "named", mode="overwrite")
        assert load_saved(result.student).has_cls == has_cls == (note in capsys.readouterr().err)
    before = maps[0].first.weight.detach().clone()
    distill(config, tmp_path / "cache", tmp_path / "run", tmp_path / "refiner", student=(maps[0].train(), maps[1]))
    assert "name: own:Maps" in (tmp_path / "run" / "config.yaml").read_text()
    assert not torch.equal(before, maps[0].first.weight.cpu())
    with pytest.raises(UserError, match="name a function that makes it, package.module:function"):
        load_model("own:Maps")


class Fixed(Maps):
    """Maps of a batch whose size becomes a constant in a traced program."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return super().forward(images.flatten().view(len(images), 3, 32, 32))


def fixed() -> Own:
    return Fixed(), Description(blocks=["first", "second"], image_size=32)


def test_code_that_torch_cannot_trace(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"student.name={__name__}:fixed"
    distill(config_with(own, *STUDENT, *TRAIN), world / "cache", tmp_path / "run")
    for to in ("torch-export", "onnx"):
        with pytest.raises(UserError, match=r"torch cannot trace own:Fixed .* write x\.shape\[0\] in the place"):
            export(config_with(own), tmp_path / "run", tmp_path / "e", to)
    assert not (tmp_path / "e").exists() and "stripped" not in capsys.readouterr().err


class Locked(Maps):
    """Maps that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_objects_in_other_states(world: Path, tmp_path: Path) -> None:
    """What is trained is float32; what has no gradients, or no copy for a moving average, is refused at first."""
    about, sets = Description(blocks=["first", "second"], image_size=32), ["distill.share=0.3", *TRAIN, *LEFT_OUT]

    def trained(module: Maps, *more: str) -> None:
        distill(config_with(*sets, *more), world / "cache", tmp_path / "run", mode="overwrite", student=(module, about))

    trained(half := Maps().bfloat16().requires_grad_(False))
    assert half.first.weight.dtype == torch.float32
    for make, more, said in (
        (Locked, ["distill.ema=0.9"], r"distill\.ema: a Locked cannot be copied \(cannot pickle .*\); set it to null"),
        (
            torch.inference_mode()(lambda: Maps()),
            [],
            r"student own:Maps was made in torch\.inference_mode and has no gradients",
        ),
        (Maps, ["student.depth=3"], r"student\.depth changes nothing in a module that is given .*; leave it out"),
        (Maps, ["student.drop_path=0.1"], r"student\.drop_path changes nothing"),
        (Maps, ["student.exit=wide"], r"student\.exit changes nothing"),
    ):
        with pytest.raises(UserError, match=said):
            trained(make(), *more)
    for key, value in (("weights", "x.pth"), ("averaged", "false"), ("dtype", "bfloat16")):
        config = config_with(f"teacher.{key}={value}", *TRAIN)
        with pytest.raises(
            UserError, match=rf"teacher\.{key} changes nothing in a module that is given as the teacher"
        ):
            cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "cache", teacher=(Maps(), about))


def test_blocks_run_only_as_far_as_needed() -> None:
    class Counts(Maps):
        ran = 0

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            first = self.first(images)
            Counts.ran += 1
            return (self.second(first),)

    model = as_backbone(Counts(), Description(blocks=["first", "second"], image_size=32))
    Counts.ran = 0
    with torch.no_grad():
        block_outputs(model, torch.zeros(1, 3, 32, 32), [0])
    assert Counts.ran == 0 and depth(model) == 2
    block_outputs(model, torch.zeros(1, 3, 32, 32), [0])
    assert Counts.ran == 1


TOKENS = Description(blocks="layers", image_size=32, patch_size=8)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (replace(TOKENS, blocks="blocks"), "Net has no module 'blocks'; it has embed, layers, norm"),
        (replace(TOKENS, blocks="norm"), "norm is a LayerNorm and no list of blocks"),
        (replace(TOKENS, blocks=["norm", "embed.bias"]), "Net has no module 'embed.bias'"),
        (replace(TOKENS, norm="ln"), "Net has no module 'ln'"),
        (replace(TOKENS, prefix=1), r"block layers.0 returns \(1, 16, 48\) at 32 pixels, not \(B, 1 prefix \+ 16"),
        (replace(TOKENS, class_token=True), "a class token is one of the prefix tokens"),
        (replace(TOKENS, patch_size=None), "for tokens, describe a patch_size"),
        (replace(TOKENS, patch_size=None, prefix=1), "describe the patch_size, too"),
        (
            replace(TOKENS, blocks=["embed", "layers.2"]),
            r"block embed returns \(1, 48, 4, 4\) at 32 pixels, not \(B, 0 pre",
        ),
        (replace(TOKENS, mean=(0.5, 0.5)), r"^mean takes three numbers, not \(0.5, 0.5\)"),
        (replace(TOKENS, std=(1, 1, 0)), r"^std takes three numbers above 0, not \(1, 1, 0\)"),
        (replace(TOKENS, std=0.5), "^std takes three numbers above 0, not 0.5"),  # type: ignore[arg-type]
        (replace(TOKENS, image_size=30), "image_size 30 is not a multiple of the patch size 8; the nearest is 32"),
    ],
)
def test_wrong_descriptions_are_named(description: Description, said: str, mine: Path) -> None:
    with pytest.raises(UserError, match=said):
        as_backbone(load_model("mymodels:net").model.backbone, description)


def test_mean_and_std_may_be_lists(world: Path, mine: Path, tmp_path: Path) -> None:
    module = load_model("mymodels:net").model.backbone
    listed = replace(TOKENS, mean=[0, 0, 0], std=[1, 1, 1])  # type: ignore[arg-type]
    cache_teacher(mine_with(), str(world / "train" / "*.tar"), tmp_path / "cache", teacher=(module, listed))
    assert Cache(tmp_path / "cache").manifest.teacher.std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:net", "there is no module nowhere_at_all in this folder or among the packages"),
        ("mymodels:nothing", "mymodels.py has no nothing"),
        ("mymodels:Net", r"returns a Net; return \(module, singer.Description"),
        ("broken:net", "broken:net failed: ZeroDivisionError"),
        ("lacking:net", "lacking:net failed: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_functions_that_fail_are_named(name: str, said: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine / "broken.py").write_text("def net():\n    return 1 / 0\n")
    (mine / "lacking.py").write_text("import nowhere_at_all\n")
    with pytest.raises(UserError, match=said):
        load_model(name)
    for module in ("broken", "lacking"):
        sys.modules.pop(module, None)


def test_names_of_functions() -> None:
    assert all(is_function(n) for n in ("a:b", "package.module:make_it", "_x.y2:z"))
    assert not any(
        is_function(n) for n in ("hf:dinov2", "hf:a/b", "hf-hub:a/b", "local-dir:x", "own:Net", "vit", "a:b:c")
    )
