"""Muon's own time: a step of this product's optimiser beside timm's, on the same weights and gradients.

    python benchmarks/muon_speed.py [--rounds 5]

It builds students with random weights, and takes steps on random gradients, in interleaved rounds; medians, in
processor milliseconds on a CPU, in milliseconds on a GPU. On a CPU with bfloat16 units, the ratio is smaller.
"""

import argparse
import statistics
import time

import timm
import timm.optim
import torch
from setting import DEVICE, line
from torch import nn

from pipeline.config import load_config
from pipeline.training.optimisers import decay_groups, new_optimiser

STUDENTS = {
    "ViT of width 96, 4 blocks": ("vit_tiny_patch16_224", {"embed_dim": 96, "depth": 4, "num_heads": 3}),
    "ViT-Ti/16": ("vit_tiny_patch16_224", {}),
    "ViT-S/16": ("vit_small_patch16_224", {}),
}


def seconds(optimiser: torch.optim.Optimizer) -> float:
    """Return the time of a step."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    start = clock()
    optimiser.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    settings = load_config().distill
    print(f"{DEVICE}, {torch.get_num_threads()} threads\n")
    print(line(["student", "AdamW, ms", "timm's Muon, ms", "ours, ms", "ratio"]) + "\n|---|---|---|---|---|")
    for name, (model, more) in STUDENTS.items():
        student = nn.ModuleDict({"student": timm.create_model(model, num_classes=0, **more)}).to(DEVICE)
        for p in student.parameters():
            p.grad = torch.randn_like(p)
        groups = decay_groups(student, 1.0)
        for group in groups:
            group["use_fallback"] = group["weight_decay"] == 0
        kinds = [
            new_optimiser(student, settings.model_copy(update={"optimizer": "adamw"}), DEVICE),
            timm.optim.Muon(groups, nesterov=True, betas=(0.9, 0.999)),
            new_optimiser(student, settings, DEVICE),
        ]
        times: list[list[float]] = [[seconds(kind) for kind in kinds] for _ in range(options.rounds + 1)]
        # The first round makes the states.
        adamw, timms, ours = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
        print(line([name, f"{adamw:.1f}", f"{timms:.1f}", f"{ours:.1f}", f"{timms / ours:.1f}"]), flush=True)


if __name__ == "__main__":
    main()
