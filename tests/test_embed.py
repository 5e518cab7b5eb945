"""`singer embed`: the vectors of evaluate's features, in every format, whole or not at all."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vit, run_singer
from PIL import Image
from pyarrow import parquet

from pipeline.config import Config
from pipeline.data import index_images
from pipeline.evaluation.global_features import features
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_saved
from pipeline.stages.embed import embed
from singer.errors import UserError


def read(file: Path) -> tuple[list[str], np.ndarray]:
    """Names and vectors, without singer."""
    if file.suffix == ".npy":
        return json.loads(file.with_suffix(".names.json").read_text()), np.load(file)
    if file.suffix == ".csv":
        _, *rows = csv.reader(file.read_text().splitlines())
        return [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=np.float32)
    table = parquet.read_table(file)
    shape = json.loads(table.schema.metadata[b"singer.shape"])
    return table["name"].to_pylist(), np.array(table["vector"].to_pylist(), np.float32).reshape(-1, *shape)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize(("kind", "name"), [(None, "cls"), ("mean", "mean_patch")])
def test_vectors_are_the_features_of_evaluate(
    suffix: str, kind: str | None, name: str, world: Path, config: Config, tmp_path: Path
) -> None:
    file = tmp_path / f"new/vectors{suffix}"
    result = embed(config, world / "teacher", world / "test", file, kind)
    images = index_images(f"{world / 'test'}/*.tar")
    expected = features(load_saved(world / "teacher"), images, config.evaluate, torch.device("cpu"))
    for tokens in ("block", "norm"):
        settings = config.changed(evaluate={"tokens": tokens})
        embed(settings, world / "teacher", [f"{world / 'test'}/*.tar"], file, kind, overwrite=True)
        names, vectors = read(file)
        assert names == list(images.keys) and vectors.dtype == np.float32
        assert np.array_equal(vectors, expected[tokens][name].numpy())
    assert (result.images, result.shape, result.tokens) == (40, (24,), "block")
    assert result.names == (file.with_suffix(".names.json") if suffix == ".npy" else None)
    assert {f.name for f in file.parent.iterdir()} == {f.name for f in (file, result.names) if f is not None}


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_dense_features_keep_their_grid(suffix: str, world: Path, config: Config, tmp_path: Path) -> None:
    file = tmp_path / f"dense{suffix}"
    assert embed(config, world / "teacher", world / "test", file, "dense").shape == (4, 4, 24)
    embed(config, world / "teacher", world / "test", tmp_path / "mean.npy", "mean")
    names, vectors = read(file)
    assert vectors.shape == (40, 4, 4, 24) and len(names) == 40
    np.testing.assert_allclose(vectors.mean((1, 2)), np.load(tmp_path / "mean.npy"), rtol=1e-4, atol=1e-5)


def test_no_file_of_others_is_replaced(world: Path, config: Config, tmp_path: Path) -> None:
    """Neither the list that is read, nor a file with the names of other rows."""
    listed = tmp_path / "list.csv"
    listed.write_text("".join(f"{path}\n" for path in sorted((world / "images" / "test").rglob("*.png"))[:3]))
    before = listed.read_bytes()
    with pytest.raises(UserError, match="list.csv is what the images are read from; give another --out"):
        embed(config, world / "teacher", listed, listed, overwrite=True)
    (tmp_path / "a.names.json").write_text("mine")
    with pytest.raises(UserError, match="a.names.json exists; replace it with --overwrite"):
        embed(config, world / "teacher", listed, tmp_path / "a.npy")
    assert listed.read_bytes() == before and (tmp_path / "a.names.json").read_text() == "mine"


def test_a_file_appears_whole_or_not_at_all(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.npy").write_bytes(b"before")
    with pytest.raises(UserError, match="a.npy exists; replace it with --overwrite"):
        embed(config, world / "teacher", world / "test", tmp_path / "a.npy")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.stages.embed.json_bytes", broken)
    with pytest.raises(OSError, match="No space"):
        embed(config, world / "teacher", world / "test", tmp_path / "a.npy", overwrite=True)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {"a.npy": b"before"}
    # A page of a mapped file that finds no place would kill the process.
    monkeypatch.setattr("os.posix_fallocate", broken)
    with pytest.raises(UserError, match=f"which {tmp_path} does not have .No space .*; give --out on a disk"):
        embed(config, world / "teacher", world / "test", tmp_path / "b.npy")
    assert [f.name for f in tmp_path.iterdir()] == ["a.npy"]


def test_the_advice_for_a_broken_image_works(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    words = ["embed", world / "teacher", tmp_path, "--out", tmp_path / "out.npy"]
    assert run_singer(monkeypatch, *words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "broken.jpg" in line
    assert run_singer(monkeypatch, *words, *line.rpartition(" with ")[2].split(), "--json") == 0
    told = capfd.readouterr()
    assert "skipped: image 'broken' in" in told.err and json.loads(told.out.splitlines()[-1])["left_out"] == 1
    assert sorted(read(tmp_path / "out.npy")[0]) == ["a", "b"]
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    assert run_singer(monkeypatch, *words, "--on-error", "skip", "--overwrite") == 2
    assert "none of the 1 images of" in capfd.readouterr().err


def test_without_a_class_token_and_without_pyarrow(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    vit = make_vit(class_token=False, global_pool="avg")
    save_backbone(vit, vit.model.state_dict(), tmp_path / "m")
    assert embed(config, tmp_path / "m", world / "test", tmp_path / "a.csv").features == "mean"
    with pytest.raises(UserError, match="has no class token; take mean or dense"):
        embed(config, tmp_path / "m", world / "test", tmp_path / "b.csv", "cls")
    monkeypatch.setattr("pipeline.checks.find_spec", lambda name: None)
    args = ["embed", tmp_path / "m", world / "test", "--out", tmp_path / "a.parquet"]
    assert run_singer(monkeypatch, *args) == 2
    assert "needs pyarrow: pip install 'singer-vit[parquet]'" in capfd.readouterr().err


def test_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = sorted((world / "test").glob("*.tar"))
    args = ["embed", world / "teacher", *shards, "--out", tmp_path / "a.parquet", "--tokens", "norm", "--json"]
    assert run_singer(monkeypatch, *args) == 0
    value = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert value["images"] == 40 and value["tokens"] == "norm" and len(read(tmp_path / "a.parquet")[0]) == 40
