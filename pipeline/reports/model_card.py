"""The model card of an exported student: its shape, origin, loading and caveats."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

from pipeline.config import Config
from pipeline.evaluation.classification import Accuracies
from pipeline.models.backbone import Backbone
from pipeline.models.names import HF, LOCAL
from pipeline.outputs.provenance import read_inputs, read_versions
from pipeline.runtime.machine import versions
from pipeline.storage.json_files import read_as, read_json
from pipeline.training.distilling.cached_teachers import numbered
from pipeline.training.run_directory import DistillResult, TeacherLink
from pipeline.training.schedule import peak_rate
from singer.backbones import depth, final_norm, patch_size
from singer.sizes import Size

_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
_POOLING = {"token": "the CLS token", "avg": "the mean of the patch tokens", "map": "attention pooling"}


@dataclass(frozen=True)
class ModelCard:
    """The data of a card.

    format: as given to --to; difference: the largest difference between the outputs of export and student; snippet:
    Python code that loads the export; packages: those that wrote it, beside torch and timm.
    """

    format: str
    output: str
    run: Path
    trained: DistillResult
    recipe: Config
    backbone: Backbone
    difference: float
    snippet: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class ClassificationFigures:
    """The fields of an evaluate-*.json that a card shows; config: the section evaluate that it was made with."""

    linear: Accuracies
    knn: Accuracies
    classes: int
    train_images: int
    test_images: int
    config: dict[str, object]


@dataclass(frozen=True)
class HeadFigures:
    """The fields of an evaluate-*.json of the model's own head that a card shows."""

    top1: float
    top5: float
    classes: int
    test_images: int


def write_card(card: ModelCard) -> str:
    """Return the card as Markdown.

    Raises UserError, with the file's name, if a file of the run is missing or damaged.
    """
    run, model = card.run, card.backbone.model
    hashes = read_inputs(run, "finished run")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(_TEMPLATE.read_text()).render(
        card=card,
        backbone=card.backbone,
        trained=card.trained,
        settings=card.recipe.distill,
        tuning=card.recipe.finetune,
        finetuned=card.trained.finetuned,
        labeller=hashes.get("finetune.teacher"),
        tests=read_tests(run) if card.trained.finetuned is not None else [],
        began=began_as(card.recipe),
        teachers=[
            {
                "learned": learned,
                "name": describe_teacher(learned),
                "refiner": describe_refiner(learned, hashes.get(numbered("refiner", number))),
            }
            for number, learned in enumerate(card.trained.teachers, start=1)
        ],
        library="transformers" if card.backbone.architecture.startswith(HF) else "timm",
        depth=depth(model),
        rate=peak_rate(card.recipe.distill, card.backbone.body_width),
        heads=heads(model),
        size=Size.of,
        patch=None if (patch := patch_size(model)) is None else Size.of(patch),
        tokens=card.backbone.prefix + card.backbone.grid[0] * card.backbone.grid[1],
        pooling=_POOLING.get(model.global_pool, f"timm's pooling {model.global_pool!r}")
        if card.backbone.gives_tokens
        else "timm's pooling of the last feature map",
        norm="Norm and head were trained in fine-tuning."
        if card.trained.finetuned is not None
        else describe_norm(model)
        if card.backbone.gives_tokens
        else "The layers of timm after the last stage were not trained.",
        caveats=caveats(card.backbone, card.trained),
        probes=read_probes(run),
        made_with=read_versions(run),
        exported_with=versions(("singer", "torch", "timm", *card.packages)),
    )


def read_probes(run: Path) -> list[ClassificationFigures]:
    """Return the run's classification figures."""
    files = _figures_of(run, "classification")
    return [read_as(file, ClassificationFigures, "result of evaluate") for file in files]


def read_tests(run: Path) -> list[HeadFigures]:
    """Return what the student's own head was measured at."""
    return [read_as(file, HeadFigures, "result of evaluate") for file in _figures_of(run, "head")]


def _figures_of(run: Path, task: str) -> list[Path]:
    files = sorted(run.glob("evaluate-*.json"))
    return [f for f in files if read_json(run, f.name, "result of evaluate").get("task") == task]


def describe_teacher(learned: TeacherLink) -> str:
    """Return the teacher's name, or its architecture if the name is a path on the machine where it was cached."""
    return learned.teacher.architecture if learned.teacher.name.startswith(LOCAL) else learned.teacher.name


def describe_refiner(learned: TeacherLink, file_hash: str | None) -> str:
    """Return the refiner's kind and the hash of its file in words, or "none" for raw features."""
    if learned.refiner_kind is None:
        return "none: raw features (FitNet)"
    what = ", ".join(f"{name} {value}" for name, value in asdict(learned.refiner_kind).items())
    return f"{what}; SHA-256 `{file_hash}`"


def heads(model: Any) -> int | None:
    """Return the number of attention heads of a model of tokens; None if its blocks do not tell."""
    attention = getattr(next(iter(getattr(model, "blocks", ())), None), "attn", None)
    return getattr(attention, "num_heads", None)


def began_as(recipe: Config) -> str:
    """Return what the weights of the student were before its training."""
    if recipe.student.pretrained:
        return "a pretrained model of timm"
    known = {
        "random": "random weights",
        "auto": "weights of the teacher if these fit it, else random weights (`student.init: auto`)",
        "teacher": "weights of the teacher",
    }
    return known.get(recipe.student.init, f"weights of {Path(recipe.student.init).name}")


def describe_norm(model: nn.Module) -> str:
    """Return what the final norm is, in sentences: training uses only raw outputs of blocks and leaves it unchanged."""
    norm = final_norm(model)
    if norm is None:
        return "The model has no final norm."
    plain = all(torch.equal(p, torch.full_like(p, float(n == "weight"))) for n, p in norm.named_parameters())
    if plain:
        return (
            "The final norm was not trained and is still at its initial values (weight 1, bias 0): it standardises "
            "each token over its channels and does nothing else. It is kept, so that the model is an ordinary timm "
            "model."
        )
    return (
        "The final norm was not trained: its weights are those of the pretrained model that the student began as. They "
        "do not fit the features that the norm gets now."
    )


def caveats(backbone: Backbone, trained: DistillResult) -> list[str]:
    """Return sentences about untrained parts that make outputs worthless."""
    found: list[str] = []
    if trained.finetuned is not None:  # the labels reached all that leads to the output
        return found
    last, supervised = depth(backbone.model) - 1, max(b for t in trained.teachers for b in t.matching.values())
    if supervised < last:
        found.append(
            f"no target reached the blocks after block {supervised} (of 0 to {last}): they are untrained, and so is "
            f"the output of the last one; take the output of block {supervised}"
        )
    if backbone.has_cls and not any(t.teacher.class_token for t in trained.teachers):
        found.append("the teacher has no CLS token, so the student's CLS token had no target; use the patch tokens")
    if getattr(backbone.model, "attn_pool", None) is not None:
        found.append("the attention pooling is untrained, and so is the pooled output; use tokens")
    return found
