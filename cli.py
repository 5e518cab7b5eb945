"""The command line: options and messages only.

Run it as `singer ...` or `accelerate launch cli.py ...`. `pipeline` imports a stage when it is called, and commands
check their options before, so that neither help nor an error about an option waits for torch.
"""

import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import pipeline
from pipeline.runtime.error_kinds import FULL
from pipeline.runtime.failures import report_failure
from pipeline.runtime.interrupts import ending_signals, report_full_disk, report_interrupt
from pipeline.runtime.logs import be_verbose, on_console
from singer.errors import UserError

if TYPE_CHECKING:
    from pipeline.outputs.folder import Mode

VERBOSE = "--verbose"


class Commands(TyperGroup):
    """A group of commands that takes --verbose anywhere, and says how to go on after a signal or on a full disk."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after --verbose is moved to the front, and `~` is expanded where no shell does it."""
        words = [re.sub("^(--[a-z-]+=)~(?=/|$)", lambda start: start[1] + str(Path.home()), w) for w in args]
        return super().parse_args(ctx, sorted(words, key=lambda word: word != VERBOSE))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with ending_signals(lambda: self._options(ctx)):
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as interrupt:
                raise typer.Exit(report_interrupt(interrupt, self._options(ctx))) from None
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise typer.Exit(report_full_disk(error, self._options(ctx))) from None

    def _options(self, ctx: Any) -> list[str]:
        """Return the options of the command that is called."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        return [word for option in (command.params if command else ()) for word in option.opts]


app = typer.Typer(
    name="singer",
    cls=Commands,
    help="Distil large Vision Transformers into small ones from a feature cache, without their artifact tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Plan, look at and verify feature caches.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

LocalCopyOption = Annotated[Path | None, typer.Option(help="Folder to which Zarr shards are copied when first read.")]
ConfigOption = Annotated[str | None, typer.Option("--config", help="A YAML file, or the name of a bundled recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON object.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="A model of timm, hf:USER/NAME of transformers, or package.module:function of your own."),
]
WeightsOption = Annotated[Path | None, typer.Option(help="Local .safetensors or .pth; else timm fetches them.")]
ModelWeightsOption = Annotated[Path | None, typer.Option(help="For a model given by name; else timm fetches them.")]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(metavar="N|HxW", help="Pixels: 224, or 224x448 (height x width); default: the teacher's own."),
]
BlocksOption = Annotated[str | None, typer.Option(help="0-based, such as 8,11; -1 is the last.")]
ViewsOption = Annotated[int | None, typer.Option(help="Views of each image; see the section views.")]
CODEC_HELP = "float16, bfloat16, int8, int4, int3, int2 or int1."
CodecOption = Annotated[str | None, typer.Option(help=CODEC_HELP)]
SeedOption = Annotated[int | None, typer.Option(help="Seed.")]
UnreadableOption = Annotated[str | None, typer.Option(help="What to do with unreadable images: fail or skip.")]
ImagesOption = Annotated[
    list[str],
    typer.Option(
        "--images",
        "--shards",
        help="A folder of images or shards, file, list, table, glob or URL; may be repeated.",
    ),
]
MovedOption = Annotated[
    list[str] | None, typer.Option("--images", "--shards", help="Where the cached images are, if they moved.")
]
LAYOUT_HELP = "folder (default), or a data set such as imagenet-1k or ade20k, as it is distributed."
TASK_HELP = (
    "classification (default), segmentation, depth, retrieval, domain-shift or head (the model's); may be repeated."
)
REFINER_HELP = "A refiner of stage 2, or none; one for each --cache, in their order. Default: raw targets."
STUDENT_HELP = "Any model that can be a teacher, or vit with student.dim, depth and heads."
IMAGES_HELP = "Folders of images (sub-folders are classes), shards, lists, tables, globs or URLs."


def refiner_option(help: str) -> Any:
    """Return the option --refiner; its former name --adapters works, too."""
    return typer.Option("--refiner", "--adapters", help=help)


def _print_version(wanted: bool) -> None:
    """Print the version and end, before any command runs."""
    if wanted:
        from pipeline.runtime.machine import versions

        print(f"singer {versions(['singer'])['singer']}")
        raise typer.Exit


@app.callback()
def every_command(
    verbose: Annotated[
        bool, typer.Option(VERBOSE, help="Show details, the messages of libraries, and whole tracebacks.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Apply the options that every command has."""
    if verbose:
        be_verbose()


@app.command()
def run(
    photos: Annotated[list[str], typer.Argument(help=IMAGES_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for everything that the run makes.")],
    teacher: TeacherOption = None,
    student: Annotated[str | None, typer.Option(help=STUDENT_HELP)] = None,
    weights: Annotated[Path | None, typer.Option(help="The teacher's .safetensors or .pth; else timm's.")] = None,
    hours: Annotated[float | None, typer.Option(help="How long all may take.")] = None,
    disk_gb: Annotated[float | None, typer.Option(help="How large the cache may become, in GB.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="So many GPUs of this machine share the work.")] = None,
    on_error: UnreadableOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go from images or shards to a student, a report and a model for timm: plan, and then every stage."""
    from pipeline.checks import check_chain

    options = {
        "teacher.name": teacher,
        "teacher.weights": weights,
        "student.name": student,
        "data.on_error": on_error,
    }
    tree, mode = pipeline.load_config(config, sets, options), output_mode(resume, overwrite)
    check_chain(tree, photos, out, mode, hours, disk_gb)
    if gpus is not None:
        from pipeline.runtime.launch import on_gpus

        on_gpus(Path(__file__), gpus)

    _report(pipeline.run(tree, photos, out, mode, hours=hours, disk_gb=disk_gb), as_json)


@app.command()
def prepare(
    images: Annotated[list[str], typer.Argument(help="Folders of images (sub-folders are classes), lists, tables.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP)] = None,
    split: Annotated[str | None, typer.Option(help="The split, for a layout that has several.")] = None,
    on_error: UnreadableOption = None,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack images (with NAME.seg.png / NAME.depth.png beside them) into WebDataset shards."""
    options = {"prepare.layout": layout, "prepare.split": split, "data.on_error": on_error}
    tree = pipeline.load_config(config, sets, options)
    # It waits for no torch before it writes.
    _report(pipeline.prepare(tree, images, out, output_mode(False, overwrite)), as_json)


@app.command("cache-teacher")
def cache_teacher(
    images: ImagesOption,
    out: Annotated[str, typer.Option(help="Folder or URL (s3://, gs://) for the cache.")],
    teacher: TeacherOption = None,
    weights: WeightsOption = None,
    image_size: ImageSizeOption = None,
    blocks: BlocksOption = None,
    views: ViewsOption = None,
    codec: CodecOption = None,
    precision: Annotated[str | None, typer.Option(help="The teacher's: no (float32), bf16 or fp16.")] = None,
    on_error: UnreadableOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    append: Annotated[bool, typer.Option("--append", help="Add what the cache in --out lacks.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher once and store the features of chosen blocks (stage 1)."""
    from pipeline.checks import check_command

    options = {
        "teacher.name": teacher,
        "teacher.weights": weights,
        "teacher.image_size": image_size,
        "cache.blocks": None if blocks is None else blocks.split(","),
        "views.count": views,
        "cache.codec": codec,
        "cache.precision": precision,
        "data.on_error": on_error,
    }
    tree, mode = pipeline.load_config(config, sets, options), output_mode(resume, overwrite, append)
    check_command("cache-teacher", tree, out, mode, images=[images], inputs=[tree.teacher.weights])

    _report(pipeline.cache_teacher(tree, images, out, mode), as_json)


@app.command()
def refine(
    cache: Annotated[str, typer.Option(help="A cache of stage 1: folder or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for the refiner.")],
    variant: Annotated[str | None, typer.Option(help="singer, paper or official; it sets the keys of refine.")] = None,
    cleaner: Annotated[str | None, typer.Option(help="gated-adapter, neighbour, clip ... or none.")] = None,
    normaliser: Annotated[str | None, typer.Option(help="standardize, layernorm, phi-s ... or none.")] = None,
    rank: Annotated[str | None, typer.Option(help="For adapters: their rank, or auto.")] = None,
    steps: Annotated[int | None, typer.Option(help="For adapters: at most this many steps.")] = None,
    seed: SeedOption = None,
    local_copy: LocalCopyOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a refiner that removes artifacts and keeps information, from the cache alone (stage 2)."""
    from pipeline.checks import check_command

    options = {
        "refine.variant": variant,
        "refine.cleaner": cleaner,
        "refine.normaliser": normaliser,
        "refine.rank": int(rank) if rank is not None and rank.isdigit() else rank,
        "refine.steps": steps,
        "refine.seed": seed,
        "refine.local_copy": local_copy,
    }
    tree, mode = pipeline.load_config(config, sets, options), output_mode(resume, overwrite)
    check_command("refine", tree, out, mode, caches=[cache])

    _report(pipeline.refine(tree, cache, out, mode), as_json)


@app.command()
def inspect(
    cache: Annotated[str, typer.Argument(help="A cache of stage 1: folder or URL.")],
    refiner: Annotated[Path | None, refiner_option("A refiner of stage 2 to judge.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for inspect.html and inspect.json.")] = None,
    images: MovedOption = None,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure norms and artifacts of a cache's features, and what a refiner changes."""
    from pipeline.checks import check_command

    tree, mode = pipeline.load_config(config, sets), output_mode(False, overwrite)
    check_command("inspect", tree, out, mode, caches=[cache], refiners=[refiner])

    _report(pipeline.inspect(tree, cache, refiner, out, mode, images), as_json)


@app.command()
def distill(
    cache: Annotated[list[str], typer.Option(help="A cache of stage 1: folder or URL; repeat for more teachers.")],
    out: Annotated[Path, typer.Option(help="Folder for the run.")],
    refiner: Annotated[list[Path] | None, refiner_option(REFINER_HELP)] = None,
    images: MovedOption = None,
    weights: Annotated[Path | None, typer.Option(help="The teacher's weights, from which students start.")] = None,
    student: Annotated[str | None, typer.Option(help="Any model that can be a teacher, or vit.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the cache.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records in a step, over all processes.")] = None,
    lr: Annotated[str | None, typer.Option(help="Peak learning rate, or auto.")] = None,
    precision: Annotated[str | None, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = None,
    seed: SeedOption = None,
    local_copy: LocalCopyOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student on the refined targets (stage 3)."""
    from pipeline.checks import check_command

    options = {
        "teacher.weights": weights,
        "student.name": student,
        "distill.epochs": epochs,
        "distill.batch_size": batch_size,
        "distill.lr": lr,
        "distill.precision": precision,
        "distill.seed": seed,
        "distill.local_copy": local_copy,
    }
    tree, mode = pipeline.load_config(config, sets, options), output_mode(resume, overwrite)
    refiners = None if refiner is None else [None if str(path) == "none" else path for path in refiner]
    check_command("distill", tree, out, mode, caches=cache, refiners=refiners or (), images=[images])

    _report(pipeline.distill(tree, cache, out, refiners, images, mode), as_json)


@app.command()
def finetune(
    run: Annotated[Path, typer.Argument(help="A finished run of stage 3.")],
    train: Annotated[list[str], typer.Option(help="Labelled images to learn from, as --images.")],
    out: Annotated[Path, typer.Option(help="Folder for the fine-tuned run.")],
    test: Annotated[list[str] | None, typer.Option(help="Labelled images to test on, once, at the end.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the teacher of finetune.kd, if they moved.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = None,
    seed: SeedOption = None,
    on_error: UnreadableOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a distilled student as a classifier, with labels (after stage 3)."""
    from pipeline.checks import check_command, check_finished, check_kd

    options = {
        "teacher.weights": weights,
        "finetune.epochs": epochs,
        "finetune.batch_size": batch_size,
        "finetune.lr": lr,
        "finetune.precision": precision,
        "finetune.seed": seed,
        "data.on_error": on_error,
    }
    tree, mode = pipeline.load_config(config, sets, options), output_mode(resume, overwrite)
    check_kd(tree, weights)
    check_finished(run)
    check_command("finetune", tree, out, mode, images=[train, test], inputs=[run])

    _report(pipeline.finetune(tree, run, train, out, test, mode), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run of stage 3, a timm model folder, or the name of a timm model.")],
    test: Annotated[list[str], typer.Option(help="Labelled images that the probes are tested on, as --images.")],
    train: Annotated[list[str] | None, typer.Option(help="Labelled images to learn from; not for retrieval.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=TASK_HELP)] = None,
    weights: ModelWeightsOption = None,
    tokens: Annotated[str | None, typer.Option(help="block (raw), norm or both (default).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; default: the run.")] = None,
    on_error: UnreadableOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Probe a frozen model: a student, a teacher, or any timm model."""
    from pipeline.checks import check_command, check_model, check_tasks

    options = {"evaluate.tokens": tokens, "data.on_error": on_error}
    tree, tasks = pipeline.load_config(config, sets, options), task or ["classification"]
    check_tasks(tasks)
    check_model(model, weights)
    check_command("evaluate", tree, images=[train, test])
    from pipeline.reports.result_text import without_top5

    results = pipeline.evaluate_tasks(tree, model, train, test, tasks, out, weights)
    figures = {name: dataclasses.asdict(result) for name, result in results.items()}
    figures = figures if as_json else {name: without_top5(value) for name, value in figures.items()}
    _report(figures if len(figures) > 1 else next(iter(figures.values())), as_json)


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="A run of stage 3, a timm model folder, or the name of a timm model.")],
    images: Annotated[list[str], typer.Argument(help=IMAGES_HELP)],
    out: Annotated[Path, typer.Option(help="FILE.npy (with FILE.names.json beside it), FILE.parquet or FILE.csv.")],
    features: Annotated[
        str | None, typer.Option(help="cls, mean (of the patches) or dense; default: cls if there is one.")
    ] = None,
    weights: ModelWeightsOption = None,
    tokens: Annotated[str | None, typer.Option(help="block (raw, default) or norm.")] = None,
    on_error: UnreadableOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write names and feature vectors of images to one file."""
    from pipeline.checks import check_command, check_embedding, check_model

    check_embedding(out, features, overwrite, tokens)
    tree = pipeline.load_config(config, sets, {"evaluate.tokens": tokens, "data.on_error": on_error})
    check_model(model, weights)
    check_command("embed", images=[images])

    _report(pipeline.embed(tree, model, images, out, features, weights, overwrite), as_json)


@app.command()
def rank(
    cache: Annotated[list[str], typer.Argument(help="Caches of stage 1, each with one teacher or more.")],
    images: Annotated[int, typer.Option(min=3, help="Images of each cache that are compared.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Rank cached teachers by how well their features fit the labels of the images; nothing is trained."""
    from pipeline.checks import check_command

    check_command("rank", caches=cache)

    _report(pipeline.rank(cache, images), as_json)


@app.command("rank-students")
def rank_students(
    cache: Annotated[str, typer.Argument(help="A cache of stage 1.")],
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Size of plain ViTs, in parameters; within a tenth.")
    ] = None,
    student: Annotated[list[str] | None, typer.Option(help="A model as a student; may be repeated.")] = None,
    images: MovedOption = None,
    batch: Annotated[int, typer.Option(min=2, help="Images that are compared.")] = 64,
    starts: Annotated[int, typer.Option(min=1, help="How often each student is initialised.")] = 3,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank untrained students of a size by how near their relations are to the teacher's; nothing is trained."""
    from pipeline.checks import check_command, check_ranked

    tree = pipeline.load_config(config, sets)
    check_ranked(sets or (), parameters is not None, student or ())
    check_command("rank-students", tree, caches=[cache], images=[images])

    _report(pipeline.rank_students(tree, cache, parameters, student or (), batch, starts, images), as_json)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep's YAML file, or the name of a bundled one.")],
    cache: Annotated[list[str], typer.Option(help="A cache of stage 1: folder or URL; repeat for more teachers.")],
    out: Annotated[Path, typer.Option(help="Folder for refiners, runs and the leaderboard.")],
    train: Annotated[list[str] | None, typer.Option(help="Labelled images that the probes learn from.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Labelled images that they are tested on.")] = None,
    images: MovedOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each GPU.")] = None,
    on_error: UnreadableOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train, probe and rank many students from one cache."""
    from pipeline.checks import check_command
    from pipeline.sweeps.file import find_sweep, read_plan

    mode = output_mode(resume, overwrite)
    base = read_plan(find_sweep(file), on_error).base
    check_command("sweep", base, out, mode, caches=cache, images=[train, test, images])

    result = pipeline.sweep(
        file, cache, out, mode, train=train, test=test, images=images, workers=workers, on_error=on_error
    )
    value = dataclasses.asdict(result)
    if not as_json:  # the runs that failed were told, and the error names them
        del value["failed"], value["defects"]
    _report(value, as_json)
    result.check()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Runs of stage 3 from one cache, or a sweep.")],
    out: Annotated[Path, typer.Option(help="The page to write: FILE.html.")],
    cache: Annotated[str | None, typer.Option(help="Where the runs' cache is, if it moved.")] = None,
    refiner: Annotated[list[Path] | None, refiner_option("Where their refiners are, if they moved.")] = None,
    images: MovedOption = None,
    teacher_probes: Annotated[Path | None, typer.Option(help="The folder of singer evaluate TEACHER --out.")] = None,
    student: Annotated[list[str] | None, typer.Option(help="package.module:function of a student of your own.")] = None,
    records: Annotated[int, typer.Option(min=1, help="Norms are measured on so many records.")] = 256,
    title: Annotated[str, typer.Option(help="The page's title.")] = "Students of one teacher",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page about students of one cache: leaderboard, pictures of their features, curves, costs."""
    from pipeline.checks import check_command, check_page
    from pipeline.training.run_directory import find_runs

    check_page(out, overwrite)
    find_runs(runs, quiet=True)
    check_command("report", caches=[cache] if cache else (), refiners=refiner or (), images=[images])

    result = pipeline.report(
        runs, out, cache=cache, refiners=refiner or (), images=images, teacher_probes=teacher_probes,
        students=student or (), records=records, overwrite=overwrite, title=title,
    )  # fmt: skip
    _report(result, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A finished run of stage 3.")],
    to: Annotated[str, typer.Option(help="timm, hf, onnx or torch-export.")],
    out: Annotated[Path, typer.Option(help="Folder for the export.")],
    output: Annotated[
        str | None, typer.Option(help="pooled, or tokens: the raw last block (onnx, torch-export).")
    ] = None,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the student alone, with a model card, in a format that other tools load."""
    from pipeline.checks import check_command, check_finished, check_format

    tree, mode = pipeline.load_config(config, sets, {"export.output": output}), output_mode(False, overwrite)
    check_format(to)
    check_finished(run)
    check_command("export", tree, out, mode, inputs=[run])

    _report(pipeline.export(tree, run, out, to, mode), as_json)


@cache_app.command("info")
def cache_info(
    cache: Annotated[str, typer.Argument(help="A cache, complete or not: folder or URL.")],
    as_json: JsonOption = False,
) -> None:
    """Print what a cache holds: teachers, data, blocks, codec and its errors, size."""
    from pipeline.checks import check_command

    check_command("info", caches=[cache])

    _report(pipeline.cache_info(cache), as_json)


@cache_app.command("plan")
def cache_plan(
    images: ImagesOption,
    teacher: TeacherOption = None,
    weights: WeightsOption = None,
    image_size: ImageSizeOption = None,
    blocks: BlocksOption = None,
    codec: CodecOption = None,
    views: ViewsOption = None,
    out: Annotated[str | None, typer.Option(help="Where the cache would be; this disk is measured.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long caching is measured; 0: only bytes.")] = 20.0,
    on_error: UnreadableOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a cache would cost: bytes, hours, what fits the disk, and for how many students it pays off.

    It writes a temporary folder to the disk of --out, at most a tenth of what is free there, and removes it.
    """
    from pipeline.checks import check_command

    options = {
        "teacher.name": teacher,
        "teacher.weights": weights,
        "teacher.image_size": image_size,
        "cache.blocks": None if blocks is None else blocks.split(","),
        "cache.codec": codec,
        "views.count": views,
        "data.on_error": on_error,
    }
    tree = pipeline.load_config(config, sets, options)
    check_command("plan", tree, images=[images])
    from pipeline.reports.result_text import unmeasured

    value = dataclasses.asdict(pipeline.plan(tree, images, out, seconds))
    nothing_fits = value["best_fit"] is None and value["free_bytes"] is not None
    if not as_json:
        value = unmeasured(value) | ({"best_fit": None} if nothing_fits else {})
    _report(value, as_json)


@cache_app.command("verify")
def cache_verify(
    cache: Annotated[str, typer.Argument(help="A cache, complete or not: folder or URL.")],
    teacher: Annotated[str | None, typer.Option(help="Teacher or variant to compare with; default: the first.")] = None,
    weights: WeightsOption = None,
    images: MovedOption = None,
    sample: Annotated[int, typer.Option(min=1, help="Records that the teacher computes again.")] = 64,
    repair: Annotated[bool, typer.Option("--repair", help="Compute damaged and missing Zarr shards again.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every file with its checksum; with --teacher or --weights, compare a sample with new features, too."""
    from pipeline.checks import check_command, check_teacher

    tree = pipeline.load_config(config, sets, {"teacher.name": teacher, "teacher.weights": weights})
    live = teacher is not None or weights is not None
    if live or repair:
        check_teacher(tree)
    check_command("verify", tree, caches=[cache], images=[images])

    result = pipeline.verify(tree, cache, live=live, images=images, sample=sample, repair=repair)
    _report(result, as_json)
    result.check()


@app.command("config")
def print_config(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Print every key of the configuration with its value, type and meaning, as YAML that --config reads."""
    from pipeline.config.reference import as_markdown, as_yaml

    if markdown and (config or sets):
        raise typer.BadParameter("the page has the defaults; leave out --config and --set, or --markdown")
    print(as_markdown() if markdown else as_yaml(pipeline.load_config(config, sets)), end="")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole chain offline, on the digits of scikit-learn, up to a report.html."""
    from pipeline.checks import check_command

    tree, mode = pipeline.load_config(config or "demo", sets), output_mode(False, overwrite)
    check_command("demo", tree, out, mode)

    _report(pipeline.demo(tree, out, mode), as_json)


def output_mode(resume: bool, overwrite: bool, append: bool = False) -> "Mode":
    """Return the mode that the options choose. Raises UserError if there are several."""
    modes: dict[Mode, bool] = {"resume": resume, "overwrite": overwrite, "append": append}
    chosen = [mode for mode, given in modes.items() if given]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    return chosen[0] if chosen else "new"


def _report(result: Any, as_json: bool) -> None:
    """Print a result as one JSON object or as lines of figures; only the first process prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    value = result if isinstance(result, dict) else dataclasses.asdict(result)
    if as_json:
        print(json.dumps(value, default=str), flush=True)
        return
    from pipeline.reports.result_text import as_lines

    print("\n".join(as_lines(value)), flush=True)


def run_with_messages(command: Callable[[], object]) -> None:
    """Run a command; if it fails, print the error and exit.

    An error that the user can fix is one line on stderr and exit code 2; a defect of the program is exit code 1.
    """
    # Names of files may have letters that the terminal's encoding lacks; results are not lost for that.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    with on_console():
        try:
            command()
        except Exception as error:
            sys.exit(report_failure(error))


def main() -> None:
    """Run the command line with the arguments of the process."""
    run_with_messages(app)


if __name__ == "__main__":
    main()
