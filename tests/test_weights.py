"""Weights as people have them: content decides, wrappings are taken off, and what was done is said."""

import argparse
import json
import urllib.error
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import config_with, make_vit, seeded
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.models.weights import describe_size, read_weights
from pipeline.teachers.teacher import load_teacher
from singer.errors import UserError

NAME = "vit_tiny_patch16_224"


def state(seed: int = 0) -> dict[str, Tensor]:
    return dict(make_vit(seed=seed).model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


WRAPPINGS: dict[str, Any] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model with arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "nested": lambda s: {"model": {"state_dict": s}},
    "data parallel": lambda s: {"state_dict": prefixed("module.", s)},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "pytorch-lightning_version": "2.0"},
    "dino": lambda s: {"teacher": prefixed("module.backbone.", s) | {"module.head.mlp.weight": torch.zeros(2)}},
    "masked autoencoder": lambda s: {"model": prefixed("encoder.", s) | {"decoder.weight": torch.zeros(2)}},
    "clip": lambda s: prefixed("visual.trunk.", s) | {"logit_scale": torch.zeros(())},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappings(name: str, tmp_path: Path) -> None:
    s = state()
    torch.save(WRAPPINGS[name](s), tmp_path / "w.bin")
    assert same(read_weights(tmp_path / "w.bin", set(s)), s)


@pytest.mark.parametrize("suffix", ["safetensors", "SAFETENSORS", "bin", "pth", ""])
@pytest.mark.parametrize("form", ["safetensors", "torch", "old torch"])
def test_content_decides(form: str, suffix: str, tmp_path: Path) -> None:
    s, file = state(), tmp_path / f"w.{suffix}"
    if form == "safetensors":
        safetensors.torch.save_file(s, file)
    else:
        torch.save(s, file, _use_new_zipfile_serialization=form == "torch")
    assert same(read_weights(file, set(s)), s)


@pytest.mark.parametrize(
    ("plain", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("student", "teacher")]
)
def test_averaged_weights(plain: str, averaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, mean, file = state(0), state(1), tmp_path / "w.pth"
    torch.save({plain: now, averaged: mean}, file)
    assert same(read_weights(file, set(now)), mean)
    assert f"took '{averaged}', and not '{plain}' (teacher.averaged=false takes that)" in capsys.readouterr().err
    assert same(read_weights(file, set(now), averaged=False), now)
    assert f"took '{plain}', and not '{averaged}' (teacher.averaged=true takes that)" in capsys.readouterr().err


def test_what_is_stripped_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s, file = state(), tmp_path / "w.pth"
    torch.save({"model": prefixed("module.", s) | {"queue": torch.zeros(3)}, "epoch": 1}, file)
    assert same(read_weights(file, set(s)), s)
    assert f"weights {file}: took 'model'; stripped 'module.' and left out 1 tensors" in capsys.readouterr().err


def test_shards(tmp_path: Path) -> None:
    s = state()
    names = sorted(s)
    for number, part in enumerate((names[::2], names[1::2])):
        safetensors.torch.save_file({name: s[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    where = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert same(read_weights(index, set(s)), s)
    assert same(read_weights(tmp_path, set(s)), s)
    index.write_text(json.dumps({"weight_map": where | {"more": "part-0.safetensors"}}))
    with pytest.raises(UserError, match="its shards lack 'more'"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": where | {"more": "../outside.safetensors"}}))
    with pytest.raises(UserError, match="no index of sharded safetensors"):
        read_weights(index)
    (tmp_path / "part-1.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match="part-1.safetensors is missing"):
        read_weights(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a pointer of git-lfs"),
        (b"<!DOCTYPE html>\n<html></html>", "a saved web page"),
        (b'{"architecture": "x"}', "JSON, but no index of sharded safetensors"),
        (b"\x00" * 100, "cannot be read: neither safetensors nor a file of torch.save"),
        (b"import torch\n", "cannot be read: neither safetensors nor a file of torch.save"),
        (b"", "the file is empty"),
    ],
)
def test_what_is_no_weights(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.safetensors")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder without safetensors"):
        read_weights(tmp_path)


def test_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no state dict of tensors was found; it has 'epoch', 'optimizer'"):
        read_weights(tmp_path / "w.pth")


def test_a_mismatch_names_models_that_fit(tmp_path: Path) -> None:
    torch.manual_seed(seeded(0))
    file = tmp_path / "w.safetensors"
    model = make_vit(embed_dim=192, depth=12, num_heads=3, patch_size=16, img_size=224).model
    safetensors.torch.save_file(model.state_dict(), file)
    assert describe_size(model.state_dict()) == (192, 12, 16)
    config = config_with("teacher.name=vit_small_patch16_224", f"teacher.weights={file}", "teacher.image_size=224")
    with pytest.raises(
        UserError, match=r"192 wide and have 12 blocks and patches of 16 pixels, as .*vit_tiny_patch16_224"
    ):
        load_teacher(config.teacher)


# Why a model is not there


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nFor url: somewhere", response=response)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def not_here(cause: Exception) -> Exception:
    return caused(LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub"), cause)


MISSING = "weights of teacher.name vit_tiny_patch16_224 were not fetched: "
REFUSED = "weights of teacher.name vit_tiny_patch16_224 were not loaded: "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (not_here(OfflineModeIsEnabled("offline mode is enabled")), MISSING + "no network (OfflineModeIsEnabled: "),
        (not_here(ConnectionError("Name or service not known")), MISSING + "no network (ConnectionError: Name or "),
        (not_here(TimeoutError("timed out")), MISSING + "no network (TimeoutError: timed out)"),
        (urllib.error.URLError("unreachable"), MISSING + "no network (URLError: <urlopen error unreachable>)"),
        (not_here(answered(503)), MISSING + "the server answered 503: 503 Client Error."),
        (answered(403, GatedRepoError), MISSING + "the server answered 403 (access is not granted): "),
        (answered(404), MISSING + "the server answered 404 (no such model or file): "),
        (urllib.error.HTTPError("u", 404, "Not Found", Message(), None), MISSING + "the server answered 404 (no such"),
        (FileNotFoundError(2, "No such file or directory", "w.bin"), REFUSED + "[Errno 2] No such file"),
        (RuntimeError("No pretrained weights exist for it."), REFUSED + "No pretrained weights exist for it."),
        (
            RuntimeError("Error(s) in loading state_dict for X:\n\tsize mismatch for head.weight: 1 and 2."),
            REFUSED + "size mismatch for head.weight: 1 and 2.",
        ),
    ],
)
def test_the_cause_is_kept(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    create = timm.create_model

    def fails(name: str, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            raise error
        return create(name, **kwargs)

    monkeypatch.setattr("pipeline.models.loading.timm.create_model", fails)
    with pytest.raises(UserError) as caught:
        load_teacher(TeacherConfig(name="vit_tiny_patch16_224"))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("; give a local file with --weights FILE (teacher.weights)")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [AttributeError("no 'blocks'"), NameError("x"), TypeError("'NoneType' is not iterable"), OSError(28, "disk full")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("given", [True, False], ids=["file", "fetched"])
def test_a_defect_is_none_of_the_networks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, given: bool
) -> None:
    """Of timm, or a disk that is full: as it is, with its own traceback."""
    create = timm.create_model
    safetensors.torch.save_file(create("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")

    def fails(name: str, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            raise error
        return create(name, **kwargs)

    monkeypatch.setattr("pipeline.models.loading.timm.create_model", fails)
    weights = tmp_path / "w.safetensors" if given else None
    with pytest.raises(type(error)) as caught:
        load_teacher(TeacherConfig(name="vit_tiny_patch16_224", weights=weights))
    assert caught.value is error
