"""Planning a cache: its figures are those of the cache that is then made."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import shards, world_config

from pipeline.cache.info import cache_info
from pipeline.config import Config
from pipeline.planning.advice import advice
from pipeline.planning.cache_size import PlanOption
from pipeline.planning.plan import PlanResult, plan
from pipeline.runtime.logs import is_log
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.storage.disk import free_bytes
from singer.errors import UserError

VIEWS = ("views.kind=random-resized-crop", "views.count=2", "views.color=[0.1,0,0,0]")


def quick(world: Path, config: Config, **options: Any) -> PlanResult:
    """Bytes alone; tests/test_plan_costs.py is about speed."""
    return plan(config, shards(world), seconds=0, **options)


@pytest.mark.parametrize(
    "sets",
    [
        (),
        pytest.param(("cache.codec=int8",), marks=pytest.mark.slow),
        pytest.param(("cache.codec=int4", *VIEWS), marks=pytest.mark.slow),
        ("cache.codec=int4-plain", "cache.blocks=[0,1,2,3]"),
        pytest.param(("cache.token_share=0.5", "cache.codec=int8"), marks=pytest.mark.slow),
        ("cache.token_share=0.3", *VIEWS),
        ("views.pixels=uint8", "cache.codec=int2"),
        ("views.pixels=jpeg", *VIEWS, "views.pixel_size=48", "cache.codec=int2"),
    ],
    ids=lambda sets: " ".join(sets),
)
def test_bytes_are_those_of_the_cache(sets: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    config = world_config(world, *sets)
    planned = quick(world, config)
    cache_teacher(config, shards(world), tmp_path / "c")
    real = sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file() and not is_log(f.name))
    assert planned.chosen.bytes == pytest.approx(real, rel=0.03)
    (teacher,) = cache_info(tmp_path / "c").teachers
    assert planned.chosen.bytes_per_image == pytest.approx(teacher.feature_bytes / 100, rel=0.03)
    assert planned.tail_bytes == pytest.approx((tmp_path / "c" / "tail.safetensors").stat().st_size, rel=0.05)
    assert planned.chosen.codec == config.cache.codec and planned.chosen.token_share == config.cache.token_share


def test_figures_fit_each_other(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.plan.free_bytes", lambda _: 400_000)
    result = quick(world, world_config(world, *VIEWS, "distill.epochs=3"), out=tmp_path / "somewhere")
    assert (result.images, result.views, result.blocks, result.epochs) == (100, 2, (2, 3), 3)
    options = {(o.codec, o.token_share): o for o in result.options}
    assert len(options) == len(result.options) == 7 * 2
    assert result.chosen == options["float16", 1.0]
    # By bytes and by error, codecs stand in their order.
    ordered = [options[c, 1.0] for c in ("float16", "int8", "int4", "int3", "int2", "int1")]
    assert [o.bytes for o in ordered] == sorted((o.bytes for o in ordered), reverse=True)
    assert [o.error for o in ordered] == sorted(o.error for o in ordered) and 0 < ordered[0].error < 1e-3
    assert all(options[c, 0.5].bytes < options[c, 1.0].bytes for c, _ in options)
    assert [o.fits for o in ordered] == [o.bytes <= 380_000 for o in ordered]
    assert result.best_fit == next(o for o in ordered if o.fits) and not ordered[0].fits


def test_what_fits_is_what_is_said(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One view or block more than said does not fit; as many as said do."""
    monkeypatch.setattr("pipeline.planning.plan.free_bytes", lambda _: 500_000)

    def fits(*sets: str) -> bool | None:
        return quick(world, world_config(world, "cache.codec=int8", "views.flip=0.5", *sets), out=tmp_path).chosen.fits

    option = quick(world, world_config(world, "cache.codec=int8", "views.flip=0.5"), out=tmp_path).chosen
    assert option.max_views is not None and option.max_views > 1
    assert fits(f"views.count={option.max_views}") and not fits(f"views.count={option.max_views + 1}")
    views = "views.count=3"
    option = quick(world, world_config(world, "cache.codec=int8", "views.flip=0.5", views), out=tmp_path).chosen
    assert option.max_blocks == 2
    # These begin at the same block, so that the tail is the same.
    assert fits(views, "cache.blocks=[2,3]")
    assert not fits(views, "cache.blocks=[1,2,3]")


def test_without_a_disk_nothing_is_said_to_fit(world: Path, config: Config, tmp_path: Path) -> None:
    result = quick(world, config)
    assert result.free_bytes is None and result.best_fit is None
    assert {(o.fits, o.max_views, o.max_blocks) for o in result.options} == {(None, None, None)}
    assert free_bytes(tmp_path) > 0
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("passes", "most", "expected"),
    [
        (
            100,
            {"float16": 9, "int8": 18, "int1": 100},
            r"5 random crops of each image in float16: a student makes 100 passes .* \(distill.epochs=20\)",
        ),
        (100, {"float16": 1, "int8": 3, "int4": 6, "int1": 40}, "5 random crops of each image in int4: "),
        (100, {"float16": 0, "int4": 1, "int1": 3}, "3 random crops of each image in int1: .* more views do not fit"),
        (
            40,
            {"float16": 0, "int8": 1, "int1": 9},
            "the centre view of each image in int8: .* 40 passes .* from 48 on$",
        ),
        (
            40,
            {"float16": 0, "int1": 0},
            "one view of each image in int1 is larger than the free disk; take fewer images",
        ),
        (10, {"bfloat16": 1}, "the centre view of each image in bfloat16"),
        (10, {"float16": None}, None),
    ],
)
def test_the_advice_takes_few_bits_before_few_views(
    passes: int, most: dict[str, int | None], expected: str | None
) -> None:
    options = [PlanOption(codec, 1.0, 0.0, 1, 1, None, views, None) for codec, views in most.items()]
    half = [dataclasses.replace(o, token_share=0.5, max_views=99) for o in options if o.max_views is not None]
    found = advice(passes, [*options, *half])
    assert (found is None) == (expected is None) and (expected is None or re.match(expected, found or ""))


def test_mistakes(world: Path) -> None:
    with pytest.raises(UserError, match="cache.codec: unknown 'int7'; known"):
        quick(world, world_config(world, "cache.codec=int7"))
    with pytest.raises(UserError, match="block 7 does not exist"):
        quick(world, world_config(world, "cache.blocks=[7]"))


def test_codecs_out_of_range_are_left_out(world: Path, tmp_path: Path) -> None:
    import torch
    from conftest import make_vit

    from pipeline.models.backbone import save_backbone

    loud = make_vit()
    with torch.no_grad():
        loud.model.pos_embed[0, 5, 3] += 1e5
    save_backbone(loud, loud.model.state_dict(), tmp_path / "loud")
    sets = [f"teacher.name=local-dir:{tmp_path / 'loud'}"]
    with pytest.raises(UserError, match=r"beyond float16 \(65504\); use cache.codec bfloat16"):
        quick(world, world_config(world, *sets))
    result = quick(world, world_config(world, *sets, "cache.codec=bfloat16"))
    assert {o.codec for o in result.options} == {"bfloat16"} and not dataclasses.asdict(result)["best_fit"]
