"""The command line: options and messages only. Run as `singer ...` or `accelerate launch cli.py ...`."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="singer",
    help="Distil large Vision Transformers into small ones from a feature cache, without their artifact tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cache_app = typer.Typer(help="Look at feature caches.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

ConfigOption = Annotated[str | None, typer.Option("--config", help="A YAML file, or the name of a bundled recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON object.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]


@app.command()
def prepare(
    images: Annotated[Path, typer.Argument(help="A folder of images; sub-folders are classes.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    on_error: Annotated[str | None, typer.Option(help="fail or skip: what to do with unreadable images.")] = None,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a folder of images (with NAME.seg.png / NAME.depth.png beside them) into WebDataset shards."""
    from pipeline.config import load_config
    from pipeline.outputs import output_mode
    from pipeline.prepare import prepare as run

    tree = load_config(config, sets or (), {"prepare.on_error": on_error})
    _report(run(tree, images, out, output_mode(False, overwrite)), as_json)


@app.command("cache-teacher")
def cache_teacher(
    shards: Annotated[list[str], typer.Option(help="Glob, brace range or file; may be repeated.")],
    out: Annotated[str, typer.Option(help="Folder or URL (s3://, gs://) for the cache.")],
    teacher: Annotated[str | None, typer.Option(help="A timm VisionTransformer.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local .safetensors or .pth; else timm fetches them.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels; default: the teacher's own.")] = None,
    blocks: Annotated[str | None, typer.Option(help="0-based, such as 8,11; -1 is the last.")] = None,
    views: Annotated[int | None, typer.Option(help="Views an image; see also the section views.")] = None,
    codec: Annotated[str | None, typer.Option(help="float16, bfloat16, int8, int4, int3 or int2.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the teacher: no (float32), bf16 or fp16.")] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    append: Annotated[bool, typer.Option("--append", help="Add what the cache in --out lacks of all this.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: run the teacher once and store the features of chosen blocks."""
    from pipeline.cache_teacher import cache_teacher as run
    from pipeline.config import load_config
    from pipeline.outputs import output_mode

    options = {
        "teacher.name": teacher,
        "teacher.weights": weights,
        "teacher.image_size": image_size,
        "cache.blocks": None if blocks is None else blocks.split(","),
        "views.count": views,
        "cache.codec": codec,
        "cache.precision": precision,
    }
    mode = output_mode(resume, overwrite, append)
    _report(run(load_config(config, sets or (), options), shards, out, mode), as_json)


@app.command()
def refine(
    cache: Annotated[str, typer.Option(help="A cache of stage 1: folder or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for the refiner.")],
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: fit adapters that remove artifacts and keep information, on the cache alone."""
    from pipeline.config import load_config
    from pipeline.outputs import output_mode
    from pipeline.refine import refine as run

    options = {"refine.rank": rank, "refine.steps": steps, "refine.seed": seed}
    mode = output_mode(resume, overwrite)
    _report(run(load_config(config, sets or (), options), cache, out, mode), as_json)


@app.command()
def distill(
    cache: Annotated[str, typer.Option(help="A cache of stage 1: folder or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for the run.")],
    adapters: Annotated[Path | None, typer.Option(help="A refiner of stage 2; without it: raw targets.")] = None,
    shards: Annotated[list[str] | None, typer.Option(help="Where the cached shards lie now, if moved.")] = None,
    student: Annotated[str | None, typer.Option(help="A timm VisionTransformer, or vit.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the cache.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records a step over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 3: train a student on the refined targets."""
    from pipeline.config import load_config
    from pipeline.distill import distill as run
    from pipeline.outputs import output_mode

    options = {
        "student.name": student,
        "distill.epochs": epochs,
        "distill.batch_size": batch_size,
        "distill.lr": lr,
        "distill.precision": precision,
        "distill.seed": seed,
    }
    mode = output_mode(resume, overwrite)
    _report(run(load_config(config, sets or (), options), cache, out, adapters, shards, mode), as_json)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run of stage 3, or a timm model folder.")],
    train: Annotated[list[str], typer.Option(help="Labelled shards that the probes learn from.")],
    test: Annotated[list[str], typer.Option(help="Labelled shards that they are tested on.")],
    tokens: Annotated[str | None, typer.Option(help="block (raw last block) or norm.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Probe a frozen student: linear and k-NN classification."""
    from pipeline.config import load_config
    from pipeline.evaluate import evaluate as run

    tree = load_config(config, sets or (), {"evaluate.tokens": tokens})
    _report(run(tree, model, train, test), as_json)


@cache_app.command("info")
def cache_info(
    cache: Annotated[str, typer.Argument(help="A cache, complete or not: folder or URL.")],
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a cache holds: teacher, data, blocks, codec, size."""
    from pipeline.cache.info import cache_info as run
    from pipeline.config import load_config

    load_config(config, sets or ())
    _report(run(cache), as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """The whole chain, offline, on digits that scikit-learn brings; ends in a report.html."""
    from pipeline.config import load_config
    from pipeline.demo import demo as run
    from pipeline.outputs import output_mode

    _report(run(load_config(config or "demo", sets or ()), out, output_mode(False, overwrite)), as_json)


def _report(result: Any, as_json: bool) -> None:
    """Print a stage's result: one JSON object, or a line a figure. Only the first process speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    value = dataclasses.asdict(result)
    if as_json:
        print(json.dumps(value, default=str), flush=True)
        return
    for name, field in value.items():
        print(f"{name}: {_text(field)}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(
            f"{k} {_text(v)}" if not isinstance(v, dict) else f"{k} ({_text(v)})" for k, v in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "none" if value is None else str(value)


def run_with_messages(command: Callable[[], object]) -> None:
    """Whatever the user can mend is one line on stderr and exit code 2."""
    try:
        command()
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{place}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    run_with_messages(app)


if __name__ == "__main__":
    main()
