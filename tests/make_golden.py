"""Make tests/golden/cache-v4-int4 and its expected numbers anew, for a new version of the format: `make_golden.py`.

It has two segments of everything that the format knows: random views, JPEG, sampled tokens, byte strings. Run it as
`PYTHONPATH=. python tests/make_golden.py` after the old folder was removed; tests/test_cache.py reads what it makes.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from conftest import make_vit, plant_artifacts

from pipeline.cache import Cache, create
from pipeline.config import load_config
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import LOCAL
from pipeline.stages.cache_teacher import cache_teacher

GOLDEN = Path(__file__).with_name("golden") / "cache-v4-int4"
WORK = Path("/tmp/singer-golden")  # its path is in the cache


def main() -> None:
    shutil.copytree(GOLDEN.with_name("train"), WORK / "train")
    os.chdir(WORK)
    teacher = make_vit(embed_dim=8, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=3, global_pool="token")
    plant_artifacts(teacher)
    save_backbone(teacher, teacher.model.state_dict(), Path("teacher"))
    create.MAX_SHARD_RECORDS = 5
    for block, mode in ((1, "new"), (0, "append")):
        config = load_config(sets=[
            f"teacher.name={LOCAL}teacher", f"cache.blocks=[{block}]", "cache.codec=int4", "cache.token_share=0.5",
            "cache.precision=no", "views.kind=random-resized-crop", "views.count=2", "views.flip=0.5",
            "views.pixels=jpeg",
        ])  # fmt: skip
        cache_teacher(config, "train/*.tar", Path(GOLDEN.name), mode)  # type: ignore[arg-type]
    cache, cpu = Cache(Path(GOLDEN.name)), torch.device("cpu")
    records = np.arange(len(cache))
    features, positions = cache.features(records, cpu), cache.read(records).positions
    assert positions is not None
    expected = {f"features.{block}": x for block, x in features.items()} | {
        "positions": positions.contiguous(),
        "logits": cache.suffix().logits(features[1], 1),
        "box": torch.from_numpy(cache.index.box),
        "pixels": cache.pixels(records, 16).contiguous(),
    }
    shutil.copytree(GOLDEN.name, GOLDEN, ignore=shutil.ignore_patterns("singer.log"))
    safetensors.torch.save_file(expected, GOLDEN.with_name(f"{GOLDEN.name}.expected.safetensors"))
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
