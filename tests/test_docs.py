"""The commands in the pages: every one runs, or could run.

Each ```bash and ```python fence of README.md and docs/*.md is run, page by page and in order, in a folder of the
page's own that looks like the repository's root. What a page needs to be there is in a comment at its top,
`<!-- given: photos shards cache -->` (World makes it). A fence after `<!-- not run: WHY -->` is only checked: its
options parse, its files exist, its keys and its models are known. The content of a fence after `<!-- file: NAME -->`
goes to that file. Commands run as they stand, but on a teacher and a student of toy size (TOY) and in this very
process: real bash calls small stand-ins for `singer` and `accelerate`, which hand their arguments over.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import draw_images, make_vit, plant_artifacts
from pages import DOCUMENTS, PAGES, ROOT, Fence, fences, name_of, place_of

import cli
import pipeline.config
import pipeline.evaluation.open_model
import pipeline.planning.plan
import pipeline.sweeps.file
from pipeline.config import Config, load_config
from pipeline.models.backbone import save_backbone
from pipeline.models.names import HF, LOCAL, is_function
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine
from pipeline.sweeps.file import read_plan

TEACHER = "teacher"
# Every command runs with these keys, whatever it says itself: 24 blocks, so that the numbers in the pages exist.
TOY: dict[str, object] = {
    "teacher.image_size": 32,
    "cache.workers": 1,
    "cache.precision": "no",
    "refine.batch_size": 8,
    "refine.rank": 4,
    "refine.steps": 20,
    "student.name": "vit",
    "student.dim": 12,
    "student.depth": 3,
    "student.heads": 2,
    "student.patch_size": 8,
    "student.image_size": 32,
    "student.pretrained": False,
    "distill.epochs": 1,
    "distill.batch_size": 16,
    "distill.workers": 1,
    "distill.precision": "no",
    "distill.warmup_epochs": 0.5,
    "distill.trackers": [],
    "finetune.epochs": 1,
    "finetune.batch_size": 16,
    "finetune.workers": 1,
    "finetune.precision": "no",
    "finetune.trackers": [],
    "evaluate.workers": 1,
    "evaluate.strengths": [0.1],
}


# Checking without running


def command_parser(args: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The subcommand and its parsed options. Raises UsageError of click for whatever the command line refuses."""
    command: Any = typer.main.get_command(cli.app)
    path: list[str] = []
    rest = list(args)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"singer has no command {' '.join([*path, *rest[:1]])!r}"
        path.append(rest.pop(0))
        command = command.commands[path[-1]]
    return " ".join(path), command.make_context(path[-1], rest).params


def check_singer(args: Sequence[str]) -> None:
    """Options parse, keys and recipes are known, models exist."""
    command, options = command_parser(args)
    tree = load_config(options.get("config"), options.get("sets") or ())
    check_model(options.get("teacher") or tree.teacher.name)
    check_model(options.get("student") or tree.student.name)
    if command == "sweep" and Path(options["file"]).suffix:
        read_plan(Path(options["file"]))


def check_model(name: str) -> None:
    """As `local-dir:`, `hf:`, a function, `vit`, or what timm knows, its tag included."""
    if name.startswith((LOCAL, HF)) or is_function(name) or name == "vit":
        return
    architecture, _, tag = name.partition(".")
    assert timm.is_model(architecture), f"timm has no model {name}"
    assert not tag or name in timm.list_pretrained(f"{architecture}*"), f"timm has no weights {name}"


def check_accelerate(args: Sequence[str]) -> list[str]:
    """What `accelerate launch` would start: the arguments of singer."""
    assert args[0] == "launch", args
    parser: argparse.ArgumentParser = launch_command_parser()
    parsed = parser.parse_args(args[1:])
    assert parsed.training_script == ("cli" if parsed.module else "cli.py"), parsed.training_script
    if parsed.config_file is not None:
        known = load_config_from_file(parsed.config_file)
        assert known.mixed_precision in (None, "no"), "singer's own --precision decides"
    return [str(a) for a in parsed.training_script_args]


def check_benchmark(script: str, args: Sequence[str]) -> None:
    """The script exists and has these options, or the module has that it shares with others."""
    text = (ROOT / script).read_text()
    if "from setting import" in text:
        text += (ROOT / "benchmarks" / "setting.py").read_text()
    for option in (a for a in args if a.startswith("--")):
        assert f'"{option}"' in text, f"{script} has no option {option}"


def check_fence(fence: Fence) -> None:
    """Of a fence that is not run."""
    if fence.language == "python":
        ast.parse(fence.text)
        return
    assert subprocess.run(["bash", "-n", "-c", fence.text], check=False).returncode == 0, fence.place
    for line in fence.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        match words:
            case []:
                pass
            case ["singer", *args]:
                check_singer(args)
            case ["accelerate", *args]:
                check_singer(check_accelerate(args))
            case ["python", script, *args]:
                check_benchmark(script, args)
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
            case ["git" | "cd" | "pip" | "pre-commit" | "." | "export" | "tensorboard" | "df", *_]:
                pass
            case _:
                raise AssertionError(f"{fence.place}: do not know how to check {line!r}")


# Running

# Hands its name and arguments over; prints what it is answered and ends as it is told.
STAND_IN = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" > "$REQUESTS"
{ read -r code; cat; } < "$ANSWERS"
exit "$code"
"""
# A cluster of one machine.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && echo localhost
"""
SBATCH = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
export SLURM_JOB_ID=1 SLURM_JOB_NODELIST=localhost SLURM_NNODES=1 SLURM_GPUS_ON_NODE=2 SLURM_CPUS_PER_TASK=8
exec bash "$@"
"""
LAST = '\nprintf "end\\0%s\\0" "$?" > "$REQUESTS"\n'


class Shell:
    """bash in a folder, whose `singer` and `accelerate` run in this process."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        programs = {"singer": STAND_IN, "accelerate": STAND_IN, "srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH}
        (scratch / "bin").mkdir()
        for name, text in programs.items():
            (scratch / "bin" / name).write_text(text)
            (scratch / "bin" / name).chmod(0o755)
        self.requests, self.answers = scratch / "requests", scratch / "answers"
        os.mkfifo(self.requests)
        os.mkfifo(self.answers)

    def run(self, fence: Fence) -> None:
        """Raises AssertionError naming the place and what was printed, unless all commands succeed."""
        script, log = self.scratch / "fence.sh", self.scratch / "log"
        script.write_text("set -eu\n" + fence.text)
        places = {"REQUESTS": str(self.requests), "ANSWERS": str(self.answers), "TMPDIR": str(self.scratch)}
        environment = {**os.environ, **places, "PATH": f"{self.scratch / 'bin'}:{os.environ['PATH']}"}
        said = io.StringIO()
        with log.open("w") as output:
            bash = subprocess.Popen(
                ["bash", "-c", f"bash {script}{LAST}"],
                cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            while True:
                name, *args = self.requests.read_text().removesuffix("\0").split("\0")
                if name == "end":
                    break
                code, out = self._serve(name, args, said)
                self.answers.write_text(f"{code}\n{out}")
            bash.wait()
        assert args == ["0"], f"{fence.place}:\n{fence.text}\n{said.getvalue()}\n{log.read_text()}"

    def _serve(self, name: str, args: list[str], said: io.StringIO) -> tuple[int, str]:
        """Exit code and stdout of a program of ours."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            try:
                run_singer(check_accelerate(args) if name == "accelerate" else args)
            except SystemExit as stop:
                return int(stop.code or 0), out.getvalue()
            except Exception as error:  # what bash is waiting for must come in any case
                print(f"{type(error).__name__}: {error}", file=said)
                return 70, out.getvalue()
        return 0, out.getvalue()


def run_singer(args: list[str]) -> None:
    check_singer(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["singer", *args])
        cli.main()


class World:
    """What pages may find in their folder, made once from toy images and a toy teacher of 24 blocks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        teacher = make_vit(depth=24)
        plant_artifacts(teacher)
        save_backbone(teacher, teacher.model.state_dict(), root / TEACHER)
        self.toy = {**TOY, "teacher.name": f"{LOCAL}{root / TEACHER}"}
        makers: dict[str, Callable[[Path], object]] = {
            "photos": lambda out: draw_images(out, 2, 12),
            "photos-test": lambda out: draw_images(out, 2, 4, seed=1, start=50),
            "shards": lambda out: prepare(self.config, self.made("photos"), out),
            "val": lambda out: prepare(self.config, self.made("photos-test"), out),
            "cache": lambda out: cache_teacher(self.config, f"{self.made('shards')}/*.tar", out),
            "refiner": lambda out: refine(self.config, self.made("cache"), out),
            "run": self._train,
        }
        self._makers, self._lock = makers, threading.Lock()

    @property
    def config(self) -> Config:
        return load_config(sets=[f"{key}={json.dumps(value)}" for key, value in self.toy.items()])

    def made(self, name: str) -> Path:
        if not (self.root / name).exists():
            self._makers[name](self.root / name)
        return self.root / name

    def give(self, name: str, folder: Path) -> None:
        """Put it into a page's folder."""
        if name.endswith(".safetensors"):
            shutil.copy(self.root / TEACHER / "model.safetensors", folder / name)
        elif name.endswith(".tar"):
            shutil.copy(sorted(self.made("val" if "val" in name else "shards").glob("*.tar"))[0], folder / name)
        else:
            shutil.copytree(self.made(name), folder / name)

    def _train(self, out: Path) -> None:
        distill(self.config, self.made("cache"), out, self.made("refiner"))
        evaluate(self.config, out, *(f"{self.made(name)}/*.tar" for name in ("shards", "val")))


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def small(toys: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All configurations that commands and examples load become toys; the numbers in sweeps' files stay."""
    real = pipeline.config.load_config
    toy = [f"{key}={json.dumps(value)}" for key, value in toys.toy.items()]

    def last(file: Any = None, sets: Sequence[str] | None = None, options: Any = None) -> Config:
        return real(file, [*(sets or ()), *toy], options)

    def first(file: Any = None, sets: Sequence[str] = (), options: Any = None) -> Config:
        return real(file, [*toy, *sets], options)

    monkeypatch.setattr(pipeline.config, "load_config", last)
    monkeypatch.setattr(pipeline.sweeps.file, "load_config", first)
    load_model = pipeline.evaluation.open_model.load_model
    monkeypatch.setattr(
        pipeline.evaluation.open_model, "load_model", lambda _, *how: load_model(str(toys.toy["teacher.name"]), *how)
    )
    plan = pipeline.planning.plan.plan
    monkeypatch.setattr(
        pipeline.planning.plan, "plan", lambda config, shards, out, seconds=1.0: plan(config, shards, out, 0.01)
    )


def _running_pages() -> list[object]:
    """Pages with commands to run. Only what a new user reads first is run by default."""
    first = ("README.md", "quick-start.md")
    return [
        pytest.param(page, id=name_of(page), marks=() if page.name in first else pytest.mark.slow)
        for page in PAGES
        if any(f.runs for f in fences(page))
    ]


@pytest.mark.parametrize("page", _running_pages())
def test_page_runs(
    page: Path, toys: World, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    folder, scratch = tmp_path / "page", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    for name in ("cli.py", "configs", "benchmarks", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    given = re.search(r"^<!-- given: (.*) -->$", page.read_text(), re.MULTILINE)
    for name in given[1].split() if given else ():
        if name == "s3://bucket":
            request.getfixturevalue("s3")
        else:
            toys.give(name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as for a program that is started there
    shell = Shell(folder, scratch)
    names: dict[str, object] = {}
    for fence in fences(page):
        if fence.note.startswith("file: "):
            (folder / fence.note.removeprefix("file: ")).write_text(fence.text)
        elif fence.runs and fence.language == "bash":
            shell.run(fence)
        elif fence.runs:
            # Line numbers of a traceback are those of the page.
            exec(compile("\n" * (fence.line - 1) + fence.text, str(page), "exec"), names)


@pytest.mark.parametrize("page", DOCUMENTS, ids=place_of)
def test_fences_are_labelled_and_those_not_run_are_right(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for fence in fences(page):
        assert fence.language in ("bash", "python", "yaml", "text"), f"{fence.place}: say what it is"
        if fence.language in ("bash", "python") and (page not in PAGES or not fence.runs):
            check_fence(fence)
        if fence.language == "yaml":
            yaml.safe_load(fence.text)


def test_few_fences_are_not_run() -> None:
    """Those of the benchmarks take hours; the others are one in eight at most, and each has to say why."""
    commands = [f for p in PAGES for f in fences(p) if f.language in ("bash", "python")]
    idle = [f for f in commands if not f.runs]
    assert all(len(f.note) > len("not run: ") for f in idle)
    others = [f.place for f in idle if "python benchmarks/" not in f.text]
    assert len(others) <= len(commands) // 8, others


WRONG = {
    "command": "singer destill --cache cache --out run",
    "option": "singer distill --cache cache --out run --adaptors adapters",
    "missing option": "singer distill --out run",
    "value": "singer distill --cache cache --out run --epochs many",
    "key": "singer distill --cache cache --out run --set distill.epoch=3",
    "recipe": "singer distill --cache cache --out run --config dinov2-l-to-xs",
    "teacher": "singer cache-teacher --shards 'x/*.tar' --out cache --teacher vit_large_patch14_dinov3x",
    "weights": "singer cache-teacher --shards 'x/*.tar' --out cache --teacher vit_large_patch14_dinov2.lvd143m",
    "student": "singer distill --cache cache --out run --student vit_smal_patch14_dinov2",
    "launcher": "accelerate launch --num_procs 2 cli.py distill --cache cache --out run",
    "file": "accelerate launch --config_file configs/accelerate/two.yaml cli.py distill --cache cache --out run",
    "script": "accelerate launch singer.py distill --cache cache --out run",
    "under accelerate": "accelerate launch cli.py distill --cache cache",
    "benchmark": "python benchmarks/result.py",
    "its option": "python benchmarks/results.py --seed 0",
    "target": "make demos",
    "unknown": "singr distill --cache cache --out run",
    "syntax": "for run in a b; singer export",
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_commands_are_found_without_running(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(BaseException, match=".") as caught:
        check_fence(Fence(ROOT / "README.md", 1, "bash", f"{WRONG[what]}\n", "not run: wrong"))
    assert not isinstance(caught.value, KeyboardInterrupt | RecursionError | NameError | AttributeError)


@pytest.mark.parametrize(
    "text", ["false\n", "singer distill --cache none --out run\n", "ls none | cat; exit 3\n", "test -e none\n"]
)
def test_a_fence_that_fails_is_found(text: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(AssertionError, match="README.md:1"):
        Shell(tmp_path, tmp_path / "scratch").run(Fence(ROOT / "README.md", 1, "bash", text, ""))
