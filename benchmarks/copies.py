"""What averaging a teacher's features over shifted and mirrored copies (teacher.copies) removes.

    python benchmarks/copies.py --teacher FILE --shards 'tinyimagenet50-train-000[01].tar' [--images 200]

FILE holds the weights of timm's vit_tiny_patch16_224, which sees 128 px. Images are resized to 144 px, and two views of
128 px are cut out of each, one patch down and to the right of each other, so that 7 x 7 patches show the same pixels.
It prints a row for each block and number of copies: the share of the patch tokens above the threshold of the plain
features, and the largest norm over the median; then the noise between the two views, half of the mean squared distance
of the patches that show the same, in percent of the variance of the features: of all of them, and of those that are
artifacts in neither plain view.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.extract import Extractor
from pipeline.cache.view_reader import copies_of
from pipeline.config import load_config
from pipeline.data import ImageFile, index_images
from pipeline.data.views import apply_view, crop_view
from pipeline.runtime.devices import this_process
from pipeline.teachers.teacher import load_teacher
from singer.artifacts import norm_summary, patch_norms, robust_threshold

SIZE, PATCH, BLOCKS, BATCH = 128, 16, (8, 11), 50
GRID = SIZE // PATCH


def features(extract: Extractor, views: Tensor, keys: Sequence[str], number: int) -> dict[int, Tensor]:
    """Return {block: patches (n, rows, columns, d)} of views (n, SIZE, SIZE, 3) uint8, the `number`th of each image."""
    parts = []
    for start in range(0, len(views), BATCH):
        views_of = ((key, number) for key in keys[start : start + BATCH])
        copies = copies_of(0, views_of, extract.copying) if extract.copying else None
        parts.append(extract.features(views[start : start + BATCH], BLOCKS, copies))
    prefix = extract.teacher.prefix_tokens
    return {b: torch.cat([p[b][:, prefix:] for p in parts]).unflatten(1, (GRID, GRID)) for b in BLOCKS}


def noise(one: Tensor, other: Tensor, chosen: Tensor) -> float:
    """Return half of the mean squared distance of chosen tokens in percent of their variance. Tokens: (..., d)."""
    a, b = one[chosen], other[chosen]
    both = torch.cat([a, b])
    return 50 * float((a - b).square().sum(-1).mean() / (both - both.mean(0)).square().sum(-1).mean())


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--copies", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    listed = index_images(options.shards)
    chosen = np.linspace(0, len(listed) - 1, options.images).astype(int).tolist()
    keys, whole = [listed.keys[n] for n in chosen], []
    with ImageFile(listed) as files:
        for image in map(files.read, chosen):
            whole.append(apply_view(image, crop_view(1.0, image.size), SIZE + PATCH))
    pictures = torch.from_numpy(np.stack(whole))
    views = pictures[:, :-PATCH, :-PATCH], pictures[:, PATCH:, PATCH:]
    print(
        "| block | copies | artifacts, % | largest / median norm | noise, % | of clean tokens, % |\n" + "|---" * 6 + "|"
    )
    plain: dict[int, tuple[float, Tensor]] = {}
    for count in [1, *options.copies]:
        sets = ["teacher.name=vit_tiny_patch16_224", f"teacher.weights={options.teacher}", f"teacher.image_size={SIZE}"]
        config = load_config(sets=[*sets, f"teacher.copies={count}", "cache.precision=no"])
        extract = Extractor(config, load_teacher(config.teacher), this_process().device)
        first, second = (features(extract, view.contiguous(), keys, n) for n, view in enumerate(views))
        for block in BLOCKS:
            a, b = first[block][:, 1:, 1:], second[block][:, :-1, :-1]
            norms = patch_norms(first[block].flatten(1, 2), 0)
            if count == 1:
                threshold = robust_threshold(norms, config.refine.threshold_k)
                plain[block] = threshold, (a.norm(dim=-1) <= threshold) & (b.norm(dim=-1) <= threshold)
            threshold, clean = plain[block]
            found = norm_summary(norms, threshold)
            figures = found["max_over_median"], noise(a, b, torch.ones_like(clean)), noise(a, b, clean)
            cells = " | ".join(f"{x:.1f}" for x in figures)
            print(f"| {block} | {count} | {found['artifact_percent']:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
