"""`singer inspect`: figures of a cache with planted artifacts, and the page."""

import json
import re
from pathlib import Path

import pytest
from conftest import world_config

from pipeline.config import Config
from pipeline.stages.inspect import inspect
from pipeline.stages.refine import refine
from singer.errors import UserError


def test_cache_alone(world: Path, config: Config) -> None:
    result = inspect(config, world / "cache")
    assert result.refiner is None and result.page is None and result.records == 20
    for figures in result.blocks.values():
        assert figures["artifacts"]["artifact_percent"] == pytest.approx(100 / 16, abs=0.5)
        assert figures["direction"]["channel"] == 3 and figures["direction"]["rank"] < 1.5
        assert figures["loss_share"]["loss"] > 50
        assert figures["norms"]["100 %"] > 5 * figures["norms"]["50 %"]
        assert "drift" not in figures


def test_refiner_and_page(world: Path, trained: Path, config: Config, tmp_path: Path) -> None:
    result = inspect(config, world / "cache", trained, tmp_path / "i")
    for figures in result.blocks.values():
        # As in test_refine.py.
        assert figures["refined"]["artifact_percent"] < 0.8 * figures["artifacts"]["artifact_percent"]
        assert set(figures["drift"]) == {"branch", "next-norm", "final-norm"}
        for reader in figures["drift"].values():
            # In percent of the tokens themselves; how much it is depends on the random teacher.
            assert 0 < reader["clean_l2"] < 100 and reader["artifact_l2"] > 0
        assert figures["loss_share_refined"]["gradient"] < figures["loss_share"]["gradient"]
        assert 0 <= figures["spliced"]["top1"] <= 100
    assert result.page is not None
    page = result.page.read_text()
    assert page.count("data:image/png;base64,") == 3  # norms, and maps of two blocks
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs another file"
    stored = json.loads((tmp_path / "i" / "inspect.json").read_text())
    assert stored["blocks"]["3"]["refined"] == result.blocks[3]["refined"]
    assert (tmp_path / "i" / "provenance.json").exists()
    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        inspect(config, world / "cache", trained, tmp_path / "i")


def test_a_closed_form_moves_artifacts_alone(world: Path, tmp_path: Path) -> None:
    """Readers see clean patches as they were, but for what attention mixes in from artifacts."""
    config = world_config(world, "refine.cleaner=neighbour", "refine.normaliser=none")
    refine(config, world / "cache", tmp_path / "neighbour")
    (*_, last) = inspect(config, world / "cache", tmp_path / "neighbour").blocks.values()
    drift = last["drift"]["final-norm"]
    assert drift["clean_l2"] < 1e-3 < drift["artifact_l2"]


def test_sampled_tokens_have_no_maps(world: Path, tmp_path: Path) -> None:
    from pipeline.stages.cache_teacher import cache_teacher

    config = world_config(world, "cache.token_share=0.5")
    cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "c")
    result = inspect(config, tmp_path / "c", None, tmp_path / "i")
    assert result.page is not None and result.page.read_text().count("data:image/png") == 1


def test_lost_images_are_no_reason_to_stop(world: Path, config: Config, tmp_path: Path) -> None:
    from pipeline.stages.cache_teacher import cache_teacher

    shards = tmp_path / "shards"
    shards.mkdir()
    for file in (world / "train").glob("*.tar"):
        (shards / file.name).write_bytes(file.read_bytes())
    cache_teacher(config, str(shards / "*.tar"), tmp_path / "c")
    for file in shards.iterdir():
        file.unlink()
    assert inspect(config, tmp_path / "c", None, tmp_path / "i").page is not None
