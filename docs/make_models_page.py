"""Make docs/models.md: one small model of every family of timm, as a teacher and as a student.

    python docs/make_models_page.py [--only FAMILY ...]

Each model is built with random weights, and small where its family allows it. It goes through the real stages on a few
images: as a teacher through cache-teacher, refine and distill; as a student through distill, and an export to timm that
is read back and compared. Another one takes images that are not square, and is saved, read back and compared. It takes
about half an hour.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from pipeline.cache.reader import Cache
from pipeline.config import Config, load_config
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.loading import create_model, load_saved
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.export import export
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine
from singer.backbones import block_outputs, depth
from singer.errors import UserError

PAGE = Path(__file__).with_name("models.md")
HEAD = """# Models

What a model can do decides, and not its class: a teacher or a student is any timm model that gives the tokens or
the feature maps of its blocks, [a model of transformers, or your own](own-models.md). This page is made by a program.
It takes one small model of every family of timm {version}, with random weights, through the real stages on a few
images:

<!-- not run: takes half an hour -->
```bash
python docs/make_models_page.py
```

- **tokens**: the prefix tokens of a model of tokens; "maps" for a model whose stages count as blocks.
- **teacher**: `cache-teacher`, `refine` (cleaner `neighbour`) and `distill` ran.
- **suffix**: the blocks after a cached one can be rebuilt and give the model's own output. Only the adapters of
  `refine`, the objectives `relation` and `logits`, and some figures of `inspect` need it.
- **student**: it was trained for some steps, exported to timm, and gave the same outputs there.
- **2 : 3**: it takes images of 64 x 96, 56 x 84 or 224 x 336 pixels. Every block has the tokens of its grid, and the
  saved model gives the same outputs.

| family | model | class | tokens | teacher | suffix | student | 2 : 3 |
|---|---|---|---|---|---|---|---|
"""
# Tried in this order; families differ in what makes a model small.
SMALL: list[dict[str, Any]] = [{"embed_dim": 48, "depth": 4, "num_heads": 2}, {"embed_dim": 48, "depth": 4}, {}]
_LARGEST = 90  # million parameters of a student, as it is in timm
SIZES = (64, 56, None)  # pixels; None: the model's own
COMMON = [
    "cache.blocks=[-2,-1]", "cache.workers=1", "refine.cleaner=neighbour", "distill.epochs=1", "distill.batch_size=8",
    "distill.workers=1", "distill.trackers=[]",
]  # fmt: skip
VIT = ["student.name=vit", "student.dim=24", "student.depth=2", "student.heads=2", "student.patch_size=8"]


def main() -> None:
    """Try all families and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="families to try; the page is printed and not written")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for family in only or timm.list_modules():
            rows.append(row(family, world))
            print(rows[-1], file=sys.stderr, flush=True)
    page = HEAD.format(version=timm.__version__) + "\n".join(rows) + "\n"
    if only:
        print(page)
    else:
        PAGE.write_text(page)


class World:
    """A few images in a shard, and the cache of a tiny ViT for students to learn from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        (root / "images").mkdir()
        for n in range(16):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "images" / f"{n}.png")
        quietly(prepare, load_config(), root / "images", root / "shards")
        self.shards = str(root / "shards" / "*.tar")
        teacher = create_model("vit_tiny_patch16_224", 32, SMALL[0] | {"patch_size": 8}, None, False, "model")
        self.cache(teacher, "vit")

    def config(self, name: str, *sets: str) -> Config:
        """Return the configuration of a saved teacher."""
        return load_config(sets=[f"teacher.name=local-dir:{self.root / name / 'model'}", *COMMON, *sets])

    def cache(self, model: Backbone, name: str, *sets: str) -> Cache:
        """Cache a teacher and fit a refiner to it."""
        save_backbone(model, model.model.state_dict(), self.root / name / "model")
        config = self.config(name, f"teacher.image_size={model.image_size}", *sets)
        quietly(cache_teacher, config, self.shards, self.root / name / "cache")
        quietly(refine, config, self.root / name / "cache", self.root / name / "refiner")
        return Cache(self.root / name / "cache")


def quietly(stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a stage without its progress."""
    with contextlib.redirect_stderr(io.StringIO()):
        return stage(*args, **kwargs)


def row(family: str, world: World) -> str:
    """Try one family; return its row of the table."""
    names = timm.list_models(module=family)
    tiny = ("nano", "atto", "tiny", "small", "18", "b0", "xxs", "_s")
    name = min(names, key=lambda n: (not any(word in n for word in tiny), len(n), n))
    try:
        model = build(name)
    except Exception as error:  # each family raises errors of its own types
        return f"| {family} | `{name}` | | | not built: {short(error)} | | | |"
    others = model.prefix - model.has_cls
    parts = ["CLS"] * model.has_cls + [f"{others} other"] * (others > 0)
    tokens = " + ".join(parts) or "no prefix" if model.gives_tokens else "maps"
    teacher, suffix = as_teacher(model, world, name)
    if teacher != "yes":  # some families work only at the size that they were made for
        torch.manual_seed(0)
        model = create_model(name, None, {}, None, False, "model")
        teacher, suffix = as_teacher(model, world, f"{name}-whole")
    cells = [family, f"`{name}`", type(model.model).__name__, tokens, teacher, suffix, as_student(name, world)]
    cells.append(as_rectangle(name))
    return f"| {' | '.join(cells)} |"


def build(name: str) -> Backbone:
    """Build a model as small as its family allows."""
    failed: Exception = UserError("not tried")
    for args in SMALL:
        for size in SIZES:
            try:
                torch.manual_seed(0)
                model = create_model(name, size, args, None, False, "model")
                model.model.eval()
                if model.layout[-1][1] != (0, 0):
                    return model
            except Exception as error:  # each family raises errors of its own types
                failed = error
    raise failed


def as_teacher(model: Backbone, world: World, name: str) -> tuple[str, str]:
    """Return whether the model works as a teacher, and whether it has a suffix."""
    try:
        cache = world.cache(model, name)
        out = world.root / name
        quietly(distill, world.config(name, *VIT), out / "cache", out / "run", out / "refiner")
    except Exception as error:  # each family raises errors of its own types
        return f"no: {short(error)}", ""
    return "yes", "yes" if cache.has_suffix else "no"


def as_student(name: str, world: World) -> str:
    """Return whether timm's model of that name works as a student."""
    with torch.device("meta"):
        millions = sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters()) / 1e6
    if millions > _LARGEST:
        return f"not tried: {millions:.0f} million parameters"
    failed: Exception = UserError("not tried")
    for number, size in enumerate((64, 224, None)):
        out = world.root / f"{name}-student-{number}"
        config = world.config("vit", f"student.name={name}", f"student.image_size={size or 'null'}")
        try:
            quietly(distill, config, world.root / "vit" / "cache", out / "run", world.root / "vit" / "refiner")
            quietly(export, config, out / "run", out / "timm", "timm")
            return "yes"
        except Exception as error:  # each family raises errors of its own types
            failed = error
    return f"no: {short(failed)}"


def as_rectangle(name: str) -> str:
    """Return whether timm's model of that name takes images that are not square."""
    failed: Exception = UserError("not tried")
    for size in (64, 96), (56, 84), (224, 336):
        for args in SMALL:
            try:
                torch.manual_seed(0)
                model = create_model(name, size, args, None, False, "model")
                check_same(model, torch.randn(1, 3, *size))
                return "yes"
            except Exception as error:  # each family raises errors of its own types
                failed = error
    return f"no: {short(failed)}"


@torch.no_grad()
def check_same(model: Backbone, images: torch.Tensor) -> None:
    """Raise UserError if a block has another grid than it should, or the saved model gives other outputs."""
    blocks = range(depth(model.model.eval()))
    outputs = block_outputs(model.model, images, blocks)
    for block, (width, (rows, columns)) in enumerate(model.layout):
        if not rows or outputs[block].shape[1:] != (model.prefix + rows * columns, width):
            raise UserError(f"block {block} gives {tuple(outputs[block].shape)} for {rows} x {columns}")
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(model, model.model.state_dict(), Path(folder))
        again = block_outputs(load_saved(Path(folder)).model, images, blocks)
    if not all(torch.allclose(outputs[b], again[b], atol=1e-5) for b in blocks):
        raise UserError("the saved model gives other outputs")


def short(error: Exception) -> str:
    """Return the first line of an error, shortened, as text of a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:90].replace("|", "/")


if __name__ == "__main__":
    main()
