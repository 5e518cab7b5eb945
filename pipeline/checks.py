"""What a command can say about its paths and options before it waits for torch and timm: `check_command`.

Every command calls it first, so that such an error takes less than a second. The stages check the same, and more.
"""

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.student import STARTS
from pipeline.data import Spec, resolve
from pipeline.models.names import CONFIG, HF, is_function, is_transformers, local_folder, looks_like_path
from pipeline.outputs.chain_folder import GIVEN, STEPS, chain_has_begun
from pipeline.outputs.folder import Mode, check_output
from pipeline.outputs.provenance import PROVENANCE
from pipeline.outputs.resuming import CACHE_MANIFEST, REFINER_MANIFEST, RUN_RESULT, STUDENT_FOLDER
from pipeline.reports import GENERATOR
from pipeline.storage import Place, is_remote, open_store
from pipeline.storage.disk import existing, is_writable
from pipeline.storage.json_files import read_json
from pipeline.training.run_directory import FINETUNE, STAGE
from singer.errors import UserError, require_known

# The end of the file of names beside a .npy of vectors.
ROW_NAMES = ".names.json"
# {key of the configuration: the registry of its values}
NAMES = {
    "cache.codec": ("pipeline.cache.codecs", "CODECS"),
    "refine.cleaner": ("singer.cleaners", "CLEANERS"),
    "refine.normaliser": ("singer.normalisers", "NORMALISERS"),
    "refine.basis": ("singer.subspaces", "BASES"),
    "refine.outlier_form": ("singer.adapter_losses", "OUTLIER_FORMS"),
    "refine.info_form": ("singer.adapter_losses", "INFO_FORMS"),
    "distill.objective": ("singer.objectives", "OBJECTIVES"),
    "distill.projector": ("singer.projectors", "PROJECTORS"),
}
TASKS = ("pipeline.evaluation.tasks", "TASKS")
FORMATS = ("pipeline.students.export_formats", "FORMATS")


def registered(module: str, registry: str) -> tuple[str, ...]:
    """Return the names in a registry, with those that a program has registered, which has then imported the module."""
    known = sys.modules.get(module)
    return names_in_source(module, registry) if known is None else tuple(getattr(known, registry))


@cache
def names_in_source(module: str, registry: str) -> tuple[str, ...]:
    """Return the names in a registry, read from the source of its module, whose import would wait for torch."""
    top, *below = module.split(".")
    place = Path(import_module(top).__path__[0], *below)
    for node in ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == registry:
            return tuple(_names(node.value))
    raise AssertionError(f"{module} has no {registry}")


def _names(value: ast.expr | None) -> Iterable[str]:
    """Yield the keys of a dictionary, or the first arguments of the calls that make its values."""
    if isinstance(value, ast.Dict):
        parts: Iterable[ast.expr | None] = value.keys
    else:
        assert value is not None
        parts = [call.args[0] for call in ast.walk(value) if isinstance(call, ast.Call) and call.args]
    return (part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


def check_command(
    stage: str,
    config: Config | None = None,
    out: Place | None = None,
    mode: Mode = "new",
    *,
    images: Sequence[Spec | None] = (),
    caches: Sequence[Place] = (),
    refiners: Sequence[Path | None] = (),
    inputs: Sequence[Place | None] = (),
) -> None:
    """Check what the options of a command name, and whether the stage may write to `out`.

    images: what names images, None where an option was left out; inputs: further folders and files that the stage
    reads. Raises UserError.
    """
    if config is not None:
        check_settings(stage, config)
        if stage == "run" or (stage == "distill" and mode != "resume"):
            check_start(config)
    for path in refiners:
        if path is not None:
            read_json(path, REFINER_MANIFEST, "finished refiner")
    for place in caches:
        if not is_remote(place):
            read_json(open_store(place), CACHE_MANIFEST, "feature cache")
    found = [path for spec in images if spec is not None for path in resolve(spec)]
    if out is not None and config is not None:
        read = [*caches, *refiners, *inputs, *found]
        if stage == "finetune":
            read.append(config.finetune.teacher_path)
        if stage in ("distill", "run"):
            read += files_of_training(config)
        check_output(out, mode, stage, config, [place for place in read if place is not None])


def files_of_training(config: Config) -> list[Path]:
    """Return the files and folders that a student's training reads, besides caches, refiners and images."""
    named = (config.student.starts_from, config.teacher.weights, config.distill.share_run, config.distill.texts)
    return [place for place in named if place is not None]


def check_kd(config: Config, weights: Path | None) -> None:
    """Raise UserError if `finetune` is given weights of a teacher, and none takes part."""
    if weights is not None and config.finetune.kd == "none":
        raise UserError(
            f"--weights {weights}: no teacher takes part; give --set finetune.kd=soft (or hard), or leave it out"
        )


def check_settings(command: str, config: Config) -> None:
    """Raise UserError if a setting that a command reads names something that does not exist."""
    match command:
        case "cache-teacher":
            check_names(config, "cache")
            check_teacher(config)
        case "plan":
            check_names(config, "cache")
            check_teacher(config)
            _check_source("student.name", config.student.name)
        case "refine":
            check_names(config, "refine")
        case "distill":
            check_names(config, "distill")
            check_student(config)
            if config.distill.share_run is not None:
                check_finished(config.distill.share_run)
        case "finetune":
            if config.finetune.teacher is not None:
                check_model(config.finetune.teacher_path or config.finetune.teacher, config.teacher.weights)
        case "run":
            check_names(config, "cache", "refine", "distill")
            check_teacher(config)
            check_student(config)
            check_block_weights(config)
        case "demo":
            check_block_weights(config)


def check_names(config: Config, *sections: str) -> None:
    """Raise UserError if a key in some sections of the configuration has a name that is not in its registry."""
    for key, registry in NAMES.items():
        section, _, name = key.partition(".")
        if section in sections:
            value = getattr(getattr(config, section), name)
            for one in value if isinstance(value, tuple) else (value,):
                for given in one if isinstance(one, Mapping) else (one,):
                    if given is not None:  # the key has its default
                        require_known(key, given, registered(*registry))


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise UserError if there is no such task of singer evaluate."""
    for task in tasks:
        require_known("--task", task, registered(*TASKS))


def check_format(name: str) -> None:
    """Raise UserError if there is no such format of singer export."""
    require_known("--to", name, registered(*FORMATS))


def check_teacher(config: Config) -> None:
    """Raise UserError if the teacher is a folder or a file that does not exist, or needs a missing package."""
    weights = config.teacher.weights
    _check_source("teacher.name", config.teacher.name)
    if looks_like_path(config.teacher.name):
        raise UserError(
            f"teacher.name: {config.teacher.name} is a path; give local-dir:{config.teacher.name} for a model "
            "folder, or the name of a model with --weights FILE"
        )
    if weights is not None and not weights.exists():
        raise UserError(f"weights {weights}: no such file")


def _check_source(key: str, name: str) -> None:
    """Raise UserError if what a name stands for is known to be missing."""
    folder = local_folder(name)
    config = read_json(folder, CONFIG, "model folder") if folder is not None else {}
    if name.startswith(HF) or is_transformers(config):
        place = name.removeprefix(HF)
        if name.startswith(HF) and (place.count("/") != 1 or place.startswith(("/", ".", "~"))):
            read_json(Path(place).expanduser(), CONFIG, "model of transformers")
        if find_spec("transformers") is None:
            raise UserError(f"{key} {name} needs the package transformers: pip install 'singer-vit[hf]'")
    elif is_function(name):
        module = name.partition(":")[0].partition(".")[0]
        here = Path(module)
        if not (here.is_dir() or here.with_suffix(".py").is_file() or find_spec(module) is not None):
            raise UserError(f"{key} {name}: there is no module {module} in this folder or among the packages")


def check_start(config: Config) -> None:
    """Raise UserError if the weights that the student starts from do not exist; a checkpoint needs none."""
    init, start, weights = config.student.init, config.student.starts_from, config.teacher.weights
    if start is not None and not start.exists():
        raise UserError(f"student.init: no file or folder {init}; known besides: {', '.join(STARTS)}")
    if init == "teacher" and weights is not None and not weights.exists():
        raise UserError(f"weights {weights}: no such file")


def check_student(config: Config) -> None:
    """Raise UserError if the student or its texts do not exist."""
    texts = config.distill.texts
    if texts is not None and not texts.exists():
        raise UserError(f"distill.texts: {texts} does not exist")
    _check_source("student.name", config.student.name)


def check_block_weights(config: Config) -> None:
    """Raise UserError if a chain has another number of weights than of blocks that it refines or caches."""
    blocks = config.refine.blocks or config.cache.blocks
    if blocks is not None and config.distill.blocks is None:
        config.distill.weights_of(blocks)


def check_model(model: Path | str, weights: Path | None) -> None:
    """Raise UserError if a model to evaluate is a path at which there is none; names are not looked up."""
    folder = Path(model)
    _check_source("model", str(model))
    if weights is not None and not weights.exists():
        raise UserError(f"weights {weights}: no such file")
    if not folder.exists():
        if looks_like_path(str(model)):
            raise UserError(f"{model} does not exist")
    elif weights is not None:
        raise UserError(f"--weights {weights} is for a model given by name; the folder {model} has its own")
    elif not (folder / STUDENT_FOLDER).is_dir() and not (folder / CONFIG).is_file():
        if not (folder / PROVENANCE).is_file():
            raise UserError(f"{model} is not a model: it has no {CONFIG}; give a run, a timm folder or a timm name")
        stage = read_json(folder, PROVENANCE, "output of singer").get("stage")
        if stage in (STAGE, FINETUNE):
            raise UserError(f"{model} is not a finished run: repeat its {stage} command with --resume")
        raise UserError(
            f"{model} was written by singer {stage}; evaluate takes a run of singer distill or finetune, its export "
            "--to timm or hf, or a model"
        )


def check_finished(run: Path) -> None:
    """Raise UserError if there is no finished run of singer distill or finetune."""
    read_json(run, RUN_RESULT, "finished run")


def check_folder(option: str, folder: Path) -> None:
    """Raise UserError if a file is where an option wants a folder, or one above it."""
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{option} {folder}: {place} is a file; give another folder")
            return


def check_writable(option: str, folder: Path) -> None:
    """Raise UserError if an option's folder is none, or this user may not write to it."""
    check_folder(option, folder)
    if not is_writable(folder):
        raise UserError(f"{option} {folder}: {existing(folder)} cannot be written to; give another folder")


def check_page(out: Path, overwrite: bool) -> None:
    """Raise UserError if no page may be written to `out`; nothing is changed."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: a report is one file; give a name that ends in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    check_writable("--out", out.parent)
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists; replace it with --overwrite, or give another --out")
    if f'content="{GENERATOR}"'.encode() not in out.read_bytes()[:4096]:
        raise UserError(f"{out} was not written by {GENERATOR} and is left alone; give another --out")


def check_chain(
    config: Config,
    photos: str | Path | Sequence[str],
    out: Path,
    mode: Mode,
    hours: float | None,
    disk_gb: float | None,
) -> dict[str, object]:
    """Return what a chain was given, for later runs to compare.

    Raises UserError if it cannot be used, or if the chain in `out` was started with something else.
    """
    for option, most in (("hours", hours), ("disk-gb", disk_gb)):
        if most is not None and not most > 0:
            raise UserError(f"--{option} {most:g} must be above 0")
    specs = [str(photos)] if isinstance(photos, str | Path) else [str(spec) for spec in photos]
    check_command("run", config, out, mode, images=[specs])
    if config.distill.share_run is not None:
        raise UserError("distill.share_run: no run was trained from the cache that this makes; use singer distill")
    if config.export.output != "pooled":
        raise UserError("export.output: this exports whole models; leave it out, and use singer export for tokens")
    if config.student.name == "vit" and config.student.dim is None:
        raise UserError("give --student NAME: a timm model, or vit with student.dim, student.depth and student.heads")
    given: dict[str, Any] = {
        "photos": " ".join(specs),
        "teacher": config.teacher.name,
        "hours": hours,
        "disk-gb": disk_gb,
    }
    done = read_json(out, STEPS, "chain") if mode == "resume" and (out / STEPS).exists() else {}
    before = done.get(GIVEN, given)
    for name, value in given.items():
        if before.get(name) != value and (name == "photos" or chain_has_begun(out)):
            raise UserError(
                f"{out} cannot be continued: it was started with {name} {before.get(name)}, not {value}; repeat its "
                "command or use --overwrite"
            )
    return given


def check_ranked(sets: Iterable[str], plain: bool, names: Sequence[str]) -> None:
    """Raise UserError if --set gives students a shape that none of singer rank-students has.

    plain: whether plain ViTs of a budget are tried; names: the models that are, too.
    """
    unread = {"student.name": "name models with --student"}
    if "vit" not in names:
        unread |= dict.fromkeys(("student.dim", "student.depth", "student.heads"), "it is for --student vit")
        if not plain:
            unread["student.mlp_ratio"] = "it is for --student vit and for --parameters"
    for key in (item.partition("=")[0] for item in sets):
        if key in unread:
            raise UserError(f"--set {key} changes nothing here: {unread[key]}; leave it out")


def check_embedding(out: Path, features: str | None, overwrite: bool, tokens: str | None = None) -> None:
    """Raise UserError if singer embed cannot write such features to `out`. tokens: those of the option, if it is given.

    A configuration may have both kinds of tokens, for other commands; then the first is embedded.
    """
    if tokens not in (None, "block", "norm"):
        raise UserError(f"--tokens {tokens}: a file holds vectors of one kind; take block or norm")
    files, kinds = registered("pipeline.stages.embed", "FORMATS"), registered("pipeline.stages.embed", "FEATURES")
    if features is not None:
        require_known("--features", features, kinds)
    if out.suffix not in files:
        raise UserError(f"--out {out}: give a file that ends in one of {', '.join(files)}")
    if out.suffix == ".csv" and features == "dense":
        raise UserError(f"--out {out}: dense features do not fit a table of text; give a .npy or a .parquet")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"--out {out} needs pyarrow: pip install 'singer-vit[parquet]', or give a .npy")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    check_writable("--out", out.parent)
    beside = [out.with_suffix(ROW_NAMES)] if out.suffix == ".npy" else []
    for file in (out, *beside):
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists; replace it with --overwrite, or give another --out")
