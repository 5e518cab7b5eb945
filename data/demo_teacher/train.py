"""Train the demo's teacher: a tiny timm ViT that reads handwritten digits and has high-norm artifact tokens.

Run from the repository root: `python data/demo_teacher/train.py`. It writes `config.json` and
`model.safetensors` beside this file, so that
`timm.create_model("local-dir:data/demo_teacher", pretrained=True)` gives the model.

The artifacts are PLANTED. Large ViTs grow them by themselves; a ViT this small, trained for minutes, did not
(README.md says what was tried). Three phases:
1. classification, on the patches with the most ink and the four corners only: attention over few tokens finds
   the digit much sooner, and a step costs a third;
2. classification, on all patches, as the model is used;
3. classification plus `artifact_loss`: two opposite corner patches, which hardly ever say anything about the
   digit, are drawn to one learned direction at many times the usual norm, from one block on, and all other
   patch tokens are kept near their usual norm.

Teachers with artifacts of another kind, on which cleaners can be tried, come from --places, --directions, --ratio and
--registers; give them another folder (--out).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from pipeline.chains.digits import digit_images  # noqa: E402

SIZE, PATCH = 64, 8
GRID = SIZE // PATCH
CORNERS = [0, GRID - 1, GRID * (GRID - 1), GRID * GRID - 1]
MODEL_ARGS: dict[str, Any] = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 64, "depth": 6, "num_heads": 2}
ARCHITECTURE = "vit_tiny_patch16_224"
MEAN, STD = 0.275, 0.2  # the paper's grey goes to about 0, so that background patches enter with little norm


def load_split(split: str, copies: int) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 (N, 3, H, W), and their labels."""
    items = [(np.asarray(image), label) for _, image, label in digit_images(split, copies, SIZE)]
    images = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in items])


def normalise(images: Tensor) -> Tensor:
    """uint8 images to the teacher's input."""
    return (images.float() / 255 - MEAN) / STD


def build_model(args: dict[str, Any]) -> VisionTransformer:
    """Make the untrained teacher: wider initial weights and sine/cosine positions, for a quicker start."""
    model: VisionTransformer = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=10, **args)
    for name, weight in model.blocks.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            weight.data *= 2.5
    quarter = model.embed_dim // 4
    frequency = 1.5 / (3 * GRID) ** (torch.arange(quarter) / quarter)
    angle = torch.arange(GRID)[:, None] * frequency
    axis = 0.3 * torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    model.pos_embed.data[0, -GRID * GRID :] = torch.cat([rows, columns], -1).reshape(GRID * GRID, -1)
    return model


def patch_ink(x: Tensor) -> Tensor:
    """Brightest value of every patch (B, N): high where a stroke passes."""
    return F.max_pool2d(x.mean(1), PATCH).flatten(1)


def artifact_places(x: Tensor, places: list[int]) -> Tensor:
    """Which patches become artifacts, (B, N) bool: those at some places, unless the digit reaches them."""
    ink = patch_ink(x)
    planted = torch.zeros_like(ink, dtype=torch.bool)
    planted[:, places] = True
    return planted & (ink < 1)


def artifact_loss(
    blocks: list[Tensor], places: Tensor, directions: Tensor, usual: list[float], first: int, ratio: float
) -> Tensor:
    """Draw the patches at `places` to their direction at `ratio` x the usual norm from block `first` on.

    Neighbouring patches have different ones of the `directions`, (k, d). `usual` holds each block's median norm
    before planting: against the current median, all patches would grow together. Every other patch is kept below 1.5
    times the usual norm.
    """
    total = blocks[0].new_zeros(())
    for depth, output in enumerate(blocks):
        patches = output[:, -GRID * GRID :]
        norms = patches.norm(dim=-1) / usual[depth]
        excess = F.relu(norms - 1.5).square()
        if depth < first:
            total = total + excess.mean()
            continue
        own = directions[torch.arange(GRID * GRID) % len(directions)].expand(len(patches), -1, -1)
        cosine = F.cosine_similarity(patches[places], own[places], dim=-1)
        size = (norms[places] / ratio).log().square()
        total = total + size.mean() + (1 - cosine).mean() + excess[~places].mean()
    return total / len(blocks)


def run_blocks(model: VisionTransformer, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits and each block's raw output, on all tokens or on the CLS token and the patches `kept` (B, K)."""
    tokens = model._pos_embed(model.patch_embed(x))
    if kept is not None:
        prefix = model.num_prefix_tokens
        index = torch.cat([torch.arange(prefix).expand(len(kept), -1), kept + prefix], 1)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    outputs = []
    for block in model.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    return model.forward_head(model.norm(tokens)), outputs


@torch.no_grad()
def report(model: VisionTransformer, split: str, images: Tensor, labels: Tensor) -> list[float]:
    """Print accuracy and each block's norms and artifacts, and return the median norms."""
    model.eval()
    logits, blocks, medians = [], [], []
    for batch in normalise(images).split(100):
        batch_logits, outputs = run_blocks(model, batch)
        logits.append(batch_logits)
        blocks.append(torch.stack(outputs))
    model.train()
    print("block  median    max  max/median  artifacts  their median  cosine  CLS norm  at (row, column)")
    for depth, output in enumerate(torch.cat(blocks, 1)):
        patches = output[:, -GRID * GRID :]
        norms = patches.norm(dim=-1)
        median = norms.median()
        medians.append(median.item())
        found = norms > median + 6 * 1.4826 * (norms - median).abs().median()
        largest, share = norms.max().item(), found.float().mean().item()
        line = f"{depth:5d} {median:7.1f} {largest:6.1f} {largest / median:11.1f} {share:10.2%}"
        if found.sum() > 1:
            unit = F.normalize(patches[found], dim=-1)
            count = len(unit)
            cosine = (unit.sum(0).square().sum() - count) / (count * (count - 1))
            top = found.sum(0).topk(4)
            spots = [
                f"({p // GRID}, {p % GRID}) {n}" for p, n in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            line += f" {norms[found].median():13.1f} {cosine:7.3f} {output[:, 0].norm(dim=-1).mean():9.1f}"
            line += f"  {'; '.join(spots)}"
        print(line)
    accuracy = (torch.cat(logits).argmax(1) == labels).float().mean().item()
    print(f"{split} accuracy {accuracy:.3f}", flush=True)
    return medians


def save(model: VisionTransformer, args: dict[str, Any], folder: Path) -> None:
    """Write timm's local-dir format."""
    config: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": model.num_features,
        "global_pool": "token",
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": 10, "input_size": [3, SIZE, SIZE], "fixed_input_size": True, "pool_size": None,
            "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic",
            "mean": [MEAN] * 3, "std": [STD] * 3,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Train the teacher and store it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few-steps", type=int, default=1800, help="steps of phase 1, on few patches")
    parser.add_argument("--full-steps", type=int, default=300, help="steps of phase 2, on all patches")
    parser.add_argument("--plant-steps", type=int, default=1100, help="steps of phase 3; 0 plants nothing")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--copies", type=int, default=16, help="images drawn of each training digit")
    parser.add_argument("--few", type=int, default=16, help="patches kept in phase 1, beside the corners")
    parser.add_argument("--block", type=int, default=3, help="first block (0-based) whose output has them")
    parser.add_argument("--ratio", type=float, default=12, help="their norm over the median")
    parser.add_argument(
        "--places", type=int, nargs="+", default=[CORNERS[0], CORNERS[3]], help="patches that have them"
    )
    parser.add_argument("--directions", type=int, default=1, help="how many directions they have")
    parser.add_argument("--registers", type=int, default=0, help="register tokens of the teacher")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    images, labels = load_split("train", args.copies)
    test = load_split("test", 1)
    model_args = MODEL_ARGS | ({"reg_tokens": args.registers} if args.registers else {})
    model = build_model(model_args).train()
    directions = nn.Parameter(torch.randn(args.directions, model.embed_dim))
    optimiser = torch.optim.Adam([*model.parameters(), directions], lr=args.lr)
    planting_from = args.few_steps + args.full_steps
    total = planting_from + args.plant_steps
    usual: list[float] = []
    start, losses = time.time(), []
    for step in range(total):
        few, plant = step < args.few_steps, step >= planting_from
        if args.plant_steps and step == planting_from:
            print("before planting:")
            usual = report(model, "train", images[::32], labels[::32])
            report(model, "test", *test)
        # Warm up, hold, and fall to zero over the last 400 steps.
        rate = args.lr * min(1, (step + 1) / 100, (total - step) / 400)
        for group in optimiser.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(images), (64 if few else 32,), generator=draw)
        x, y = normalise(images[chosen]), labels[chosen]
        kept = None
        if few:
            ink = patch_ink(x) + 0.05 * torch.rand(len(x), GRID * GRID, generator=draw)
            ink[:, CORNERS] += 100
            kept = ink.topk(args.few + 4, dim=1).indices
        logits, blocks = run_blocks(model, x, kept)
        classify = loss = F.cross_entropy(logits, y)
        planted = 0.0
        if plant:
            places = artifact_places(x, args.places)
            extra = artifact_loss(blocks, places, directions, usual, args.block, args.ratio)
            planted, loss = extra.item(), classify + extra
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(classify.item())
        if (step + 1) % 200 == 0:
            print(
                f"step {step + 1} of {total}, {time.time() - start:.0f} s: "
                f"loss {np.mean(losses[-200:]):.3f}, planting {planted:.3f}",
                flush=True,
            )
    report(model, "test", *test)
    save(model, model_args, args.out)


if __name__ == "__main__":
    main()
