"""The house: imports go one way, the method does no I/O, nothing is unpickled, the wheel is whole."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Set
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import cli
import pipeline
import singer
from pipeline import checks
from pipeline.config import load_config
from singer.cleaners import CLEANERS
from singer.errors import UserError

ROOT = Path(__file__).parent.parent
# Rooms, the highest floor first: a room imports from its own and from lower floors, and from no other on its floor.
FLOORS = [
    {"cli"},
    {"sweeps", "chains"},
    {"planning"},
    {"stages"},
    {"checks"},
    {"reports"},
    {"evaluation"},
    {"training"},
    {"cache"},
    {"students"},
    {"teachers"},
    {"models"},
    {"data"},
    {"outputs"},
    {"storage"},
    {"runtime"},
    {"config"},
    {"singer"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What arithmetic may use.
PURE = {
    "collections",
    "dataclasses",
    "functools",
    "importlib",
    "inspect",
    "math",
    "numpy",
    "scipy",
    "singer",
    "timm",
    "torch",
    "typing",
}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def modules_of(file: Path) -> Iterator[str]:
    """What a file imports, wherever in it."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def imported_modules(file: Path, named: Set[str]) -> Iterator[str]:
    """Which of the named modules a file imports, wherever in it."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in named)
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (below & named) or {str(node.module)} & named


def imported(file: Path) -> Iterator[str]:
    return (module.split(".")[0] for module in modules_of(file))


def test_singer_is_pure() -> None:
    for file in (ROOT / "singer").rglob("*.py"):
        assert set(imported(file)) <= PURE, file
        assert not [module for module in modules_of(file) if "._" in module], file  # loaders of weights are there
        calls = [n.func.id for n in ast.walk(tree_of(file)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not {"open", "print", "input", "exec", "eval"} & set(calls), file


def room(module: str) -> str:
    """Of pipeline.cache.reader, cache; of cli and singer, themselves."""
    top, *below = module.split(".")
    return below[0] if top == "pipeline" and below else top


def test_every_module_has_a_room() -> None:
    found = {
        f.name.removesuffix(".py")
        for f in (ROOT / "pipeline").iterdir()
        if f.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert found == set(FLOOR) - {"cli", "singer"}


def test_imports_go_down() -> None:
    """One list of rooms, and no stage imports another."""
    wrong = []
    for file in [ROOT / "cli.py", *(ROOT / "pipeline").rglob("*.py")]:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        known = {n for n in modules_of(file) if n.split(".")[0] in ("cli", "pipeline", "singer")}
        for name in known - ({"pipeline"} if module == "cli" else set()):  # the public API
            here, there = room(module), room(name)
            beside = here == there and here == "stages"
            if module != "pipeline" and (FLOOR[there] < FLOOR[here] + (here != there) or beside):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_importers_are_on_top_of_the_readers_of_images() -> None:
    readers = [file for file in (ROOT / "pipeline" / "data").rglob("*.py") if file.parent.name != "importers"]
    assert not [file for file in readers if any("importers" in module for module in modules_of(file))]


def test_the_loop_does_not_know_what_it_trains() -> None:
    """Only distilling, which can train adapters with the student, knows another of the three."""
    for room, known in (("", ""), ("refining", ""), ("finetuning", ""), ("distilling", "refining")):
        for file in (ROOT / "pipeline" / "training" / room).glob("*.py"):
            there = {name.split(".")[2] for name in modules_of(file) if name.startswith("pipeline.training.")}
            assert there & {"refining", "finetuning", "distilling"} <= {room, known}, file


def test_no_module_imports_itself_through_others() -> None:
    """Wherever an import is, also in a function or for type checkers alone."""
    files = [ROOT / "cli.py", *(f for room in ("pipeline", "singer") for f in (ROOT / room).rglob("*.py"))]
    named = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    graph = {module: {*imported_modules(file, named.keys())} - {module} for module, file in named.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_pipeline_does_not_know_the_command_line() -> None:
    for file in (ROOT / "pipeline").rglob("*.py"):
        assert not {"cli", "typer"} & set(imported(file)), file


def test_imports_in_a_new_process(tmp_path: Path) -> None:
    """singer is importable alone, with each of its names; importing the stages installs no handler of logs."""
    code = (
        "import logging, sys; from singer import *\n"
        "assert not any(m.split('.')[0] in ('pipeline', 'cli') for m in sys.modules)\n"
        "import pipeline.stages.distill, pipeline.stages.cache_teacher\n"
        "from pipeline.runtime.progress import say\n"
        "assert not logging.getLogger('singer').handlers and not logging.getLogger().handlers\n"
        "say('silent')\n"
        "logging.basicConfig(level=logging.INFO, format='%(name)s %(message)s')\n"
        "say('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == "singer heard\n"


@pytest.mark.parametrize("package", [pipeline, singer], ids=lambda p: p.__name__)
def test_what_is_public_is_there(package: ModuleType) -> None:
    """Listed once for readers and type checkers, once for the import, and each is what it is called."""
    assert package.__all__ == list(package._MODULES) and (Path(package.__path__[0]) / "py.typed").exists()
    for name in package.__all__:
        value = getattr(package, name)
        assert getattr(value, "__name__", name) == name and not isinstance(value, ModuleType)
        assert inspect.getdoc(value) or not callable(value), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


# The lower floors come first, so that each finds only what it needs itself already imported.
WITHOUT_TORCH = [
    "singer.errors",
    "pipeline",
    "pipeline.config",
    "pipeline.runtime.machine",
    "pipeline.storage",
    "pipeline.data",
    "pipeline.checks",
    "cli",
]


def test_what_needs_no_torch_does_not_wait_for_it(tmp_path: Path) -> None:
    """All in one process: what an earlier import hides from a later one has not imported torch either."""
    code = (
        "import sys; from importlib import import_module\n"
        f"for module in {WITHOUT_TORCH!r}:\n"
        "    import_module(module)\n"
        "    assert not {'torch', 'timm', 'accelerate'} & set(sys.modules), module\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_wheel_is_whole(tmp_path: Path) -> None:
    """Built and unpacked elsewhere, it has every command, recipe and the demo's teacher, and knows its version."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT)]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "docs/", "data/"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = (
        "import sys, cli; from pipeline.config import recipes, load_config; from pipeline.config import resource\n"
        "from pipeline.runtime.machine import versions\n"
        f"assert versions()['singer'] == {project['version']!r}, versions()\n"
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__\n"
        "assert 'vit-l-to-ti' in recipes() and load_config('demo').student.dim\n"
        "assert (resource('data/demo_teacher') / 'model.safetensors').is_file()\n"
        "templates = {f.name for f in resource('.').rglob('*.j2')}\n"
        "assert templates == {'inspect.html.j2', 'leaderboard.html.j2', 'mean.html.j2', "
        "'model_card.md.j2', 'report.html.j2', 'report_style.html.j2', 'style.html.j2'}\n"
        "assert (resource('configs') / 'sweeps' / 'tinyimagenet-methods.yaml').is_file()\n"
        "sys.argv = ['singer', '--help']; cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "cache-teacher" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("target", "installed"), [("demo", ["."]), ("test", [".", "'.[dev]'"]), ("docs", [".", "'.[docs]'"])]
)
def test_one_command_installs_what_it_needs(target: str, installed: list[str]) -> None:
    """On a fresh machine; and the demo installs no tools of developers."""
    make = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert [line.split()[-1] for line in make.stdout.splitlines() if "pip install" in line] == installed


# Modules that unpickle, or load code in another way.
UNPICKLERS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Functions that unpickle unless this argument of theirs has this value.
LOADERS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def unpickling(tree: ast.Module) -> list[str]:
    """Imports and calls that might unpickle; the errors of pickle may be imported."""
    found = []
    full = {}  # the names of a file, with the modules that they are from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found += [name for name in full.values() if name.split(".")[0] in UNPICKLERS and not name.endswith("Error")]
    values = dict(LOADERS.values())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, dot, rest = ast.unparse(call.func).partition(".")
        given = {argument.arg: ast.unparse(argument.value) for argument in call.keywords}
        argument, value = LOADERS.get(full.get(first, first) + dot + rest, (None, None))
        safe = argument is None or given.get(argument) == str(value)
        if not safe or any(given.get(name, str(value)) != str(value) for name, value in values.items()):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import load",
        "from pickle import *",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch as t\nt.load(f, **options)",
        "from torch import load as read\nread(f)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, None, True)",
        "from numpy.lib.format import read_array\nread_array(f, allow_pickle=flag)",
    ],
)
def test_unpickling_is_found(source: str) -> None:
    assert unpickling(ast.parse(source))


def test_nothing_is_unpickled() -> None:
    for file in [
        *ROOT.glob("*.py"),
        *(f for d in ("singer", "pipeline", "benchmarks", "data") for f in (ROOT / d).rglob("*.py")),
    ]:
        assert not unpickling(tree_of(file)), file


# An error about each of these comes before torch and timm are imported; the file `x.tar` exists.
EARLY = [
    "evaluate nothing/here --test x.tar",
    "evaluate vit_tiny_patch16_224 --test nothing",
    "evaluate vit_tiny_patch16_224 --test x.tar --task flow",
    "evaluate vit_tiny_patch16_224 --test x.tar --weights nothing.pth",
    "prepare nothing --out out",
    "prepare images --out out --layout coco",
    "prepare images --out taken",
    "run nothing --out out",
    "run x.tar --out taken",
    "run x.tar --out out --teacher local-dir:nothing",
    "run x.tar --out out --hours 0",
    "run x.tar --out out --set cache.codec=int7",
    "cache-teacher --shards nothing --out out",
    "cache-teacher --shards x.tar --out out --codec int7",
    "cache-teacher --shards x.tar --out out --teacher local-dir:nothing",
    "cache-teacher --shards x.tar --out out --teacher models/vit",
    "cache-teacher --shards x.tar --out out --teacher hf:./nothing",
    "cache-teacher --shards x.tar --out out --teacher nothing_here:net",
    "cache-teacher --shards x.tar --out out --weights nothing.pth",
    "cache-teacher --shards x.tar --out taken",
    "cache-teacher --shards x.tar --out out --set cache.codecs=int8",
    "refine --cache nothing --out out",
    "refine --cache nothing --out out --cleaner soap",
    "refine --cache nothing --out out --normaliser soap",
    "distill --cache nothing --out out",
    "distill --cache nothing --out out --refiner nothing",
    "distill --cache nothing --out out --set distill.objective=soap",
    "finetune nothing --train x.tar --out out",
    "finetune taken --train x.tar --out out",
    "inspect nothing",
    "rank nothing/here",
    "rank-students nothing/here",
    "embed nothing/here x.tar --out out.npy",
    "embed vit_tiny_patch16_224 nothing --out out.npy",
    "embed vit_tiny_patch16_224 x.tar --out out.txt",
    "embed vit_tiny_patch16_224 x.tar --out x.tar/../x.npy --features patches",
    "embed vit_tiny_patch16_224 x.tar --out taken.csv --features dense",
    "sweep nothing --cache nothing --out out",
    "sweep tinyimagenet-methods --cache nothing --out out",
    "report nothing --out out.html",
    "report taken --out out",
    "export nothing --to timm --out out",
    "export nothing --to onxx --out out",
    "cache info nothing",
    "cache plan --shards nothing",
    "cache plan --shards x.tar --codec int7",
    "cache verify nothing",
    "config --set a.b=1",
    "demo --out taken",
]


def test_errors_about_paths_and_options_do_not_wait_for_torch(tmp_path: Path) -> None:
    """Every command has one; all run in one process, which may import neither torch nor timm."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "x.tar").touch()
    (tmp_path / "images").mkdir()
    code = (
        "import sys, cli\n"
        f"for command in {EARLY!r}:\n"
        "    sys.argv = ['singer', *command.split()]\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: assert stop.code == 2, command\n"
        "    else: raise AssertionError(command)\n"
        "    assert not {'torch', 'timm'} & set(sys.modules), command\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY) and all(line.startswith("error: ") for line in lines), lines
    commands = {command.split()[0] for command in EARLY}
    assert commands == {name or function.__name__ for name, function in registered_commands()}
    assert {path.name for path in tmp_path.iterdir()} == {"images", "taken", "x.tar"}


def registered_commands() -> Iterator[tuple[str | None, Callable[..., object]]]:
    """Each command's name, if it is given, and its function; `cache` is one of them."""
    for command in cli.app.registered_commands:
        assert command.callback is not None
        yield command.name, command.callback
    yield "cache", cli.app


def test_names_are_read_from_the_source_as_the_registries_have_them() -> None:
    own = [checks.TASKS, checks.FORMATS, ("pipeline.stages.embed", "FORMATS")]
    for module, registry in [*checks.NAMES.values(), *own]:
        assert checks.names_in_source(module, registry) == tuple(getattr(import_module(module), registry)), registry


def test_names_that_a_program_registers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` and `embed` check names, too, when they are called in Python."""
    config = load_config(sets=["refine.cleaner=mine"])
    with pytest.raises(UserError, match=r"refine\.cleaner: unknown 'mine'"):
        checks.check_command("run", config)
    monkeypatch.setitem(CLEANERS, "mine", CLEANERS["clip"])
    checks.check_command("run", config)
