"""Probes of a frozen student on labelled shards: linear and k-NN classification, on CLS and on the mean patch.

`singer evaluate RUN --train 'train-*.tar' --test 'val-*.tar'`. Nothing is selected on the test shards: the linear
probe's penalty is chosen on a split of the training shards.
"""

import hashlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pipeline.config import Config, EvaluateConfig
from pipeline.distill import STUDENT
from pipeline.models import Vit, load_saved
from pipeline.outputs import write_json
from pipeline.prefetch import prefetch
from pipeline.prepare import CLASSES
from pipeline.progress import meter
from pipeline.shards import ImageFile, Images, index_shards, require_labels
from pipeline.views import apply_view, crop_view, normalise
from singer.probes import knn_scores, topk_percent
from singer.vit import block_outputs, depth

_FIT_SHARE = 0.8
_ITERATIONS = 1000

# {"cls": {"top1": .., "top5": ..}, "mean_patch": {..}}, in percent
Accuracies = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvaluateResult:
    """Accuracies (%) of both probes; a model without CLS has only mean_patch."""

    model: Path
    linear: Accuracies
    knn: Accuracies
    classes: int
    train_images: int
    test_images: int
    seconds: float
    written: Path | None


def evaluate(config: Config, model: Path, train: str | Sequence[str], test: str | Sequence[str]) -> EvaluateResult:
    """Probe a run (its student) or a folder in timm's layout. For a run the figures are also stored in it."""
    settings = config.evaluate
    start = time.perf_counter()
    folder = model / STUDENT if (model / STUDENT).is_dir() else model
    if not folder.exists():
        raise ValueError(f"{model} does not exist; evaluate takes a run of singer distill or a timm model folder")
    shards = {"--train": index_shards(train), "--test": index_shards(test)}
    for option, images in shards.items():
        require_labels(images, option)
    check_classes(*shards.values())
    vit = load_saved(folder, settings.image_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit.model.to(device)
    train_features, test_features = (features(vit, images, settings, device) for images in shards.values())
    train_labels, test_labels = (torch.from_numpy(images.labels) for images in shards.values())
    classes = int(train_labels.max()) + 1
    if int(test_labels.max()) >= classes:
        raise ValueError(f"--test has label {int(test_labels.max())}, but --train only 0 to {classes - 1}")

    linear: Accuracies = {}
    knn: Accuracies = {}
    for name, x in train_features.items():
        scores = linear_scores(x, train_labels, test_features[name], classes, settings)
        linear[name] = _accuracy(scores, test_labels)
        scores = knn_scores(x, train_labels, test_features[name], classes, settings.neighbours, settings.temperature)
        knn[name] = _accuracy(scores, test_labels)
    result = EvaluateResult(
        model=model,
        linear=linear,
        knn=knn,
        classes=classes,
        train_images=len(train_labels),
        test_images=len(test_labels),
        seconds=time.perf_counter() - start,
        written=_result_file(model, shards, config) if folder != model else None,
    )
    if result.written is not None:
        write_json(
            result.written,
            {
                **asdict(result),
                "model": None,
                "written": None,
                "train": [p.name for p in shards["--train"].paths],
                "test": [p.name for p in shards["--test"].paths],
                "config": settings.model_dump(mode="json"),
            },
        )
    return result


def check_classes(train: Images, test: Images) -> None:
    """Raise ValueError if both sets name their classes (in a classes.json beside the shards) and differ."""
    files = [images.paths[0].with_name(CLASSES) for images in (train, test)]
    if all(f.is_file() for f in files) and files[0].read_bytes() != files[1].read_bytes():
        raise ValueError(
            f"{files[0]} and {files[1]} number classes differently; prepare the second with "
            f"--set prepare.classes={files[0]}"
        )


@torch.inference_mode()
def features(vit: Vit, images: Images, settings: EvaluateConfig, device: torch.device) -> dict[str, Tensor]:
    """{"cls": (n, d), "mean_patch": (n, d)} of the last block, on the CPU."""
    last = depth(vit.model) - 1
    batches = [
        np.arange(i, min(i + settings.batch_size, len(images))) for i in range(0, len(images), settings.batch_size)
    ]
    collected: dict[str, list[Tensor]] = {"cls": [], "mean_patch": []} if vit.has_cls else {"mean_patch": []}
    with ImageFile(images) as files, meter("features", len(images), "images") as m:

        def load(numbers: np.ndarray) -> Tensor:
            views = []
            for number in numbers:
                image = files.read(int(number))
                views.append(apply_view(image, crop_view(settings.crop, image.size), vit.image_size))
            return torch.from_numpy(np.stack(views))

        for pixels in prefetch(load, batches, settings.workers, m):
            x = block_outputs(vit.model, normalise(pixels, vit.mean, vit.std, device), [last])[last]
            if settings.tokens == "norm":
                # Models that pool before their norm have it as fc_norm.
                x = vit.model.fc_norm(vit.model.norm(x))
            collected["mean_patch"].append(x[:, vit.prefix :].mean(1).float().cpu())
            if vit.has_cls:
                collected["cls"].append(x[:, 0].float().cpu())
            m.advance(len(pixels))
    return {name: torch.cat(parts) for name, parts in collected.items()}


def linear_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int, settings: EvaluateConfig) -> Tensor:
    """Class scores (m, classes) of a logistic regression on standardised features (n, d), (m, d).

    Its penalty is the one of settings.strengths that is best on a held-out fifth of the training images.
    """
    x, y = train.numpy(), labels.numpy()
    strength = settings.strengths[0]
    if len(settings.strengths) > 1:
        fit, held_out = train_test_split(np.arange(len(y)), train_size=_FIT_SHARE, random_state=settings.seed)
        right = [_logistic(x[fit], y[fit], c).score(x[held_out], y[held_out]) for c in settings.strengths]
        strength = settings.strengths[int(np.argmax(right))]
    probe = _logistic(x, y, strength)
    decision = probe.decision_function(test.numpy())
    if decision.ndim == 1:  # two classes: one score, for the second
        decision = np.stack([-decision, decision], axis=1)
    # Label numbers that no training image has score lowest.
    scores = torch.full((len(test), classes), -torch.inf)
    scores[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(decision).float()
    return scores


def _logistic(x: np.ndarray, y: np.ndarray, strength: float) -> Pipeline:
    if len(np.unique(y)) < 2:
        raise ValueError("--train has images of one class only; a classifier needs two")
    with warnings.catch_warnings():
        # Out of iterations is good enough: accuracy has settled long before the gradient has.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS)).fit(x, y)


def _accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    return {f"top{k}": topk_percent(scores, labels, k) for k in (1, 5)}


def _result_file(model: Path, shards: dict[str, Images], config: Config) -> Path:
    """evaluate-<hash>.json: one for each pair of shard sets and settings; repeating a command replaces its own."""
    what: list[Any] = [images.place_hash() for images in shards.values()]
    digest = hashlib.sha256(repr([what, config.evaluate.model_dump_json()]).encode()).hexdigest()
    return model / f"evaluate-{digest[:8]}.json"
