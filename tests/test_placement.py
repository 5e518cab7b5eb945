"""Large teachers: weights of 16 bits, and blocks that are elsewhere until they are needed."""

from pathlib import Path

import pytest
import torch
from conftest import SIZE, make_vit, seeded, world_config

from pipeline.cache.info import cache_info
from pipeline.cache.reader import Cache
from pipeline.models.backbone import weight_hash
from pipeline.models.loading import create_model
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify
from pipeline.teachers.placement import narrow, place_model, weight_bytes
from singer.backbones import block_outputs, count_parameters
from singer.errors import UserError
from singer.suffix import find_suffix

CPU = torch.device("cpu")
SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("offload", ["cpu", "disk", "auto"])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_tiny_patch16_224"])
def test_features_are_the_same_wherever_the_blocks_are(name: str, offload: str) -> None:
    """Bit for bit; so are the weights' hash and the suffix, which need all weights at once."""
    torch.manual_seed(seeded(0))
    model = create_model(name, SIZE, SMALL, None, False, "model")
    model.model.requires_grad_(False).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    before, count = block_outputs(model.model, images, [1, 3]), count_parameters(model.model)
    digest = weight_hash(model.model.state_dict())
    suffix = find_suffix(model.model, name, model.model_args, 1, SIZE)
    place_model(model.model, CPU, offload)  # type: ignore[arg-type]
    away = [name for name, p in model.model.named_parameters() if p.is_meta]
    assert all(n.startswith("blocks.") for n in away) and bool(away) == (offload != "auto")
    for block, tokens in block_outputs(model.model, images, [1, 3]).items():
        assert torch.equal(tokens, before[block])
    assert weight_hash(model.model.state_dict()) == digest and count_parameters(model.model) == count
    again = find_suffix(model.model, name, model.model_args, 1, SIZE)
    assert suffix is not None and again is not None
    assert suffix.keys() == again.keys() and all(torch.equal(suffix[k], again[k]) for k in suffix)


def test_a_cache_from_disk_is_that_from_memory(world: Path, tmp_path: Path) -> None:
    config = world_config(world, "teacher.offload=disk")
    made = cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "c")
    assert made.id == Cache(world / "cache").id
    assert made.bytes == pytest.approx(
        sum(f.stat().st_size for f in (world / "cache").rglob("*") if f.is_file()), rel=0.1
    )


def test_bfloat16_weights(world: Path, tmp_path: Path) -> None:
    """They take half the memory, are another teacher to a cache, have a suffix, and verify computes them so again."""
    config = world_config(world, "teacher.dtype=bfloat16")
    shards = str(world / "train" / "*.tar")
    cache_teacher(config, shards, tmp_path / "c")
    cache, exact = Cache(tmp_path / "c"), Cache(world / "cache")
    assert cache.manifest.teacher.dtype == "bfloat16" and cache.has_suffix
    assert cache.manifest.teacher.digest() != exact.manifest.teacher.digest()
    records = exact.index.image[:8].argsort()
    for block, x in exact.features(records, CPU).items():
        close = torch.nn.functional.cosine_similarity(cache.features(records, CPU)[block], x, dim=-1)
        assert float(close.min()) > 0.98
    assert cache_info(tmp_path / "c").teachers
    checked = verify(world_config(world), tmp_path / "c", live=True, sample=4)
    assert checked.whole


def test_the_rotary_embedding_stays_exact() -> None:
    model = create_model("vit_small_patch16_dinov3", SIZE, SMALL, None, False, "model").model
    whole = weight_bytes(model)
    narrow(model, "bfloat16")
    assert weight_bytes(model) == whole // 2
    assert all(b.dtype == torch.float32 for b in model.rope.buffers() if b.is_floating_point())
    assert block_outputs(model, torch.randn(1, 3, SIZE, SIZE).bfloat16(), [3])[3].dtype == torch.bfloat16


def test_offload_needs_blocks() -> None:
    model = create_model("test_resnet", 32, {}, None, False, "model").model
    with pytest.raises(UserError, match="offload disk needs a model with a list of blocks, and a ResNet has none"):
        place_model(model, CPU, "disk")


def test_a_teacher_that_does_not_fit_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (10_000, 10_000))
    with pytest.raises(UserError, match="weights take .* GB of the GPU are free; take --set teacher.dtype=bfloat16"):
        place_model(make_vit().model, torch.device("cuda"), "none")
