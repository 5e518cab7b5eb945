"""Measure students on images that they are not trained on, after every epoch."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch

from pipeline.data.sampler import BatchIndices
from pipeline.runtime.ranks import current
from pipeline.training.batch import Loader
from pipeline.training.learner import TOKENS
from pipeline.training.student_run import StudentRun
from pipeline.training.to_device import on_device
from singer.metrics import knn_among

# Of k-NN, as evaluate has them by default.
_NEIGHBOURS, _TEMPERATURE = 20, 0.07


@torch.no_grad()
def measure(load: Loader, student_runs: Sequence[StudentRun], device: torch.device) -> list[dict[str, object]]:
    """Return for each student its held_out_loss, and what Learner.figures says. load: the records held out.

    Where there are labels, held_out_knn is the share of the images (%) whose label is that of their neighbours among
    the others. Students see all patches, and are what would be stored: moving averages, where there are some. All
    processes compute the same.
    """
    settings, count = student_runs[0].settings, len(load)
    starts = range(0, count, settings.batch_size)
    shares = [np.arange(start, min(start + settings.batch_size, count)) for start in starts]
    lists = [[BatchIndices(part, np.full(len(part), 1 / count, np.float32))] for part in shares]
    losses = torch.zeros(len(student_runs), dtype=torch.float64, device=device)
    own = [device] if device.type == "cuda" else []
    sums: list[dict[str, torch.Tensor]] = [{} for _ in student_runs]
    tokens: list[list[torch.Tensor]] = [[] for _ in student_runs]
    labels: list[torch.Tensor] = []
    with ExitStack() as averages:
        for run in student_runs:
            run.learner.eval()
            averages.enter_context(run.averaged())
        for number, batch in enumerate(on_device(load(lists, settings.workers), device)):
            labels.append(batch.labels)
            if len(student_runs) > 1:
                batch = student_runs[0].learner.decoded(batch)
            for n, run in enumerate(student_runs):
                # Objectives that draw at random draw the same in every epoch, whoever shares the pass.
                with torch.random.fork_rng(own), current().together():  # split weights are gathered
                    torch.manual_seed(number)
                    found, parts = run.learner(batch)
                current().beat()
                losses[n] += torch.stack(list(found.values())).sum()
                if TOKENS in parts:
                    tokens[n].append(parts.pop(TOKENS).float())
                for name, part in parts.items():
                    sums[n][name] = sums[n].get(name, 0) + part
    for run in student_runs:
        run.learner.train()
    groups, known = torch.from_numpy(load.image_numbers).to(device), torch.cat(labels)
    measured = []
    for run, loss, of_run, seen in zip(student_runs, losses.tolist(), sums, tokens, strict=True):
        figures = {"held_out_loss": loss, **run.learner.figures(of_run)}
        knn = knn_among(torch.cat(seen), known, groups, _NEIGHBOURS, _TEMPERATURE) if seen else None
        measured.append(figures if knn is None else {**figures, "held_out_knn": knn})
    return measured
