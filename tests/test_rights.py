"""What a user may not read or write is told in one line, before work that would be lost."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_images, run_singer, world_config

from pipeline.data.images import read_classes
from pipeline.data.specs import resolve
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.storage.file_locks import exclusive
from singer.errors import UserError


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the system say that this user may not write to a path, or read it; tests may run as root, who may."""
    forbidden: dict[Path, int] = {}
    access, open_ = os.access, Path.open

    def has_access(path: Any, mode: int) -> bool:
        return not mode & forbidden.get(Path(path), 0) and access(path, mode)

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        if path in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *args, **options)

    monkeypatch.setattr(os, "access", has_access)
    monkeypatch.setattr(Path, "open", opened)
    return lambda path, mode=os.W_OK: forbidden.update({path: mode})


@pytest.mark.parametrize(
    "words",
    [
        "prepare W/images/train --out R/x",
        "cache-teacher --images W/train --out R/a/x",
        "refine --cache W/cache --out R/x",
        "distill --cache W/cache --out R/x",
        "inspect W/cache --out R/x",
        "evaluate W/teacher --train W/train --test W/test --out R/x",
        "embed W/teacher W/test --out R/x.npy",
        "report W/cache --out R/x.html",
        "run W/images/train --out R/x --student vit_tiny_patch16_224",
        "demo --out R/x",
    ],
)
def test_outputs_where_the_user_may_not_write(
    words: str,
    world: Path,
    tmp_path: Path,
    forbid: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No stage begins, and the line names the folder, not a hidden file in it."""
    place = tmp_path / "other"
    place.mkdir()
    forbid(place)
    monkeypatch.setattr("pipeline.stages.evaluate.open_model", None)
    monkeypatch.setattr("pipeline.stages.embed.open_model", None)
    monkeypatch.setattr("pipeline.stages.inspect.Cache", None)
    given = [word.replace("W/", f"{world}/").replace("R/", f"{place}/") for word in words.split()]
    assert run_singer(monkeypatch, *given) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(rf"{place} cannot be written to; (change its permissions, or )?give another folder$", line)
    assert not list(place.iterdir())


def test_a_link_that_leads_to_itself(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert run_singer(monkeypatch, "refine", "--cache", world / "cache", "--out", tmp_path / "loop") == 2
    assert "error: a link leads to itself" in capfd.readouterr().err


def test_a_volume_and_the_lock_of_another_user(tmp_path: Path, forbid: Callable[..., None]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".run.lock").touch()
    forbid(tmp_path / "there" / ".run.lock")
    with (
        pytest.raises(UserError, match=r"there/\.run\.lock is the lock of another user's run; remove it"),
        exclusive(tmp_path / "there" / "run"),
    ):
        pass
    forbid(tmp_path)
    with (
        pytest.raises(UserError, match="lies there; give a folder inside it, such as .*/mine/run"),
        exclusive(tmp_path / "mine"),
    ):
        pass
    with exclusive(tmp_path / "there" / "other"):
        pass


def test_a_finished_refiner_that_can_only_be_read_is_told(
    world: Path, config_file: Path, forbid: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(world)
    forbid(world / "adapters")
    words = ["refine", "--cache", world / "cache", "--out", world / "adapters", "--config", config_file]
    assert run_singer(monkeypatch, *words, "--resume") == 0
    assert run_singer(monkeypatch, *words, "--overwrite") == 2


def test_images_that_may_not_be_read(world: Path, tmp_path: Path, forbid: Callable[..., None]) -> None:
    """They count as broken images, which --on-error skip leaves out; a folder says that it cannot be read."""
    images = tmp_path / "images"
    draw_images(images, 2, 6)
    forbid(images / "class1" / "3.png")
    with pytest.raises(UserError, match=r"class1/3\.png: Permission denied; .*--on-error skip"):
        cache_teacher(world_config(world), images, tmp_path / "fails")
    assert cache_teacher(world_config(world, "data.on_error=skip"), images, tmp_path / "skips").skipped == 1
    (tmp_path / "classes.json").write_text("[]")
    forbid(tmp_path / "classes.json")
    with pytest.raises(UserError, match=r"classes\.json cannot be read: Permission denied"):
        read_classes(tmp_path / "classes.json")
    forbid(images, os.R_OK)
    with pytest.raises(UserError, match="the folder .*images/ cannot be read: Permission denied"):
        resolve(f"{images}/*.png")
