"""Whatever a folder holds, and by whatever route it comes, the images are those of a plain model; the rest is named."""

import csv
import io
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import config_with
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from PIL import Image
from tars import write_tar

from pipeline.data import ImageFile, Images, index_images
from pipeline.data.image_keys import file_keys
from pipeline.data.walk import suffix_of
from pipeline.runtime.logs import on_console
from pipeline.stages.prepare import prepare
from singer.errors import UserError

CLASSES = ("ant", "b c", "d.1", "e\\2")
STEMS = st.text("ab._%é \t\n\\\udcff-", min_size=1, max_size=5).filter(lambda stem: not stem.startswith("."))
IMAGES = st.sampled_from([".png", ".jpg", ".JPEG", ".webp"])
OTHERS = st.sampled_from([".txt", ".mov", "", ".Json"])


def picture(number: int, suffix: str) -> bytes:
    buffer = io.BytesIO()
    kind = {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
    Image.new("RGB", (2 + number % 7, 2 + number // 7), (number % 256, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


class Folders(RuleBasedStateMachine):
    """A folder of classes that grows, and what it holds: images by name, and counts of the rest."""

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="singer-test-"))
        self.root, self.count = self.place / "in", 0
        self.sound: dict[str, bytes] = {}
        self.broken: dict[str, bytes] = {}
        self.empty: set[str] = set()
        self.left_out: Counter[str] = Counter()
        self.root.mkdir()

    def _free(self, name: str) -> bool:
        return not (self.root / name).exists() and not (self.root / name).is_symlink()

    def _write(self, name: str, data: bytes) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_bytes(data)
        self.count += 1

    @rule(folder=st.sampled_from(CLASSES), stem=STEMS, suffix=IMAGES, kind=st.sampled_from("ssssbe"))
    def add_image(self, folder: str, stem: str, suffix: str, kind: str) -> None:
        name = f"{folder}/{stem}{suffix}"
        if name.lower().endswith((".seg.png", ".depth.png")) or not self._free(name):
            return
        data = picture(self.count, suffix) if kind == "s" else b"broken%d" % self.count if kind == "b" else b""
        self._write(name, data)
        if kind == "e":
            self.empty.add(name)
        else:
            (self.sound if kind == "s" else self.broken)[name] = data

    @rule(folder=st.sampled_from(CLASSES), stem=STEMS, suffix=OTHERS)
    def add_other(self, folder: str, stem: str, suffix: str) -> None:
        name = f"{folder}/{stem}{suffix}"
        if suffix_of(name) not in (".png", ".jpg", ".jpeg", ".webp") and self._free(name):
            self._write(name, b"other")
            self.left_out[suffix_of(name) or "without suffix"] += 1

    @rule(folder=st.sampled_from(CLASSES), kind=st.sampled_from(["hidden", "broken links", "looped folders"]))
    def add_odd(self, folder: str, kind: str) -> None:
        (self.root / folder).mkdir(exist_ok=True)
        name = f"{folder}/{'.' * (kind == 'hidden')}odd{self.count}.png"
        if kind == "hidden":
            self._write(name, picture(0, ".png"))
        else:
            (self.root / name).symlink_to(self.root if kind == "looped folders" else self.place / "nothing")
            self.count += 1
        self.left_out[kind] += 1

    @rule()
    def every_route_has_the_same(self) -> None:
        names = {**self.sound, **self.broken}
        classes = sorted(path.name for path in self.root.iterdir())
        filled = {name.partition("/")[0] for name in (*names, *self.empty)}
        with on_console():
            if not filled or filled != set(classes):
                with pytest.raises(UserError, match="holds no images|no images"):
                    index_images(str(self.root), "skip")
            elif names:
                self._compare(classes, names)

    def _compare(self, classes: list[str], names: dict[str, bytes]) -> None:
        expected = {data: classes.index(name.partition("/")[0]) for name, data in names.items()}
        folder = index_images(str(self.root), "skip")
        assert labels(folder) == expected and folder.classes == tuple(classes)
        assert folder.left_out == self.left_out and len(folder.skipped) == len(self.empty)
        assert all("is empty" in skipped.reason for skipped in folder.skipped)
        listed = index_images(str(self._list(sorted(names))), "skip")
        assert {d: listed.classes[n] for d, n in labels(listed).items()} == {d: classes[n] for d, n in expected.items()}
        assert ["does not exist" in skipped.reason for skipped in listed.skipped] == [True]
        tar = index_images(str(self._tar(names, classes)), "skip")
        assert labels(tar) == expected and [skipped.key for skipped in tar.skipped] == ["lonely"]
        if self.sound:
            self._prepared(folder, {data: expected[data] for data in self.sound.values()})

    def _prepared(self, folder: Images, expected: dict[bytes, int]) -> None:
        out = self.place / "out"
        result = prepare(config_with("data.on_error=skip"), self.root, out, "overwrite" if out.exists() else "new")
        packed = index_images(str(out))
        assert labels(packed) == expected and result.left_out == self.left_out
        assert {str(file.relative_to(self.root)) for file in result.skipped} == {*self.broken, *self.empty}
        both = set(packed.keys)
        assert [key for key in folder.keys if key in both] == list(packed.keys)

    def _list(self, names: list[str]) -> Path:
        with (self.place / "list.csv").open("w", newline="", errors="surrogateescape") as file:
            rows = [("image", "label"), *((f"in/{name}", name.partition("/")[0]) for name in [*names, "ant/gone.png"])]
            csv.writer(file, lineterminator="\n").writerows(rows)
        return self.place / "list.csv"

    def _tar(self, names: dict[str, bytes], classes: list[str]) -> Path:
        """All images, then all labels in another order, and a label that has no image."""
        keys = dict(zip(sorted(names), file_keys(sorted(names)), strict=True))
        members = [(f"{keys[name]}{suffix_of(name)}", data) for name, data in names.items()]
        members += [(f"{keys[n]}.cls", b"%d" % classes.index(n.partition("/")[0])) for n in sorted(names)]
        return write_tar(self.place / "t.tar", [*members, ("lonely.cls", b"1")])

    def teardown(self) -> None:
        self.every_route_has_the_same()
        shutil.rmtree(self.place, ignore_errors=True)


def labels(images: Images) -> dict[bytes, int]:
    """{content: label}; every image has a content of its own."""
    with ImageFile(images) as files:
        found = {files.encoded(n)[0]: int(label) for n, label in enumerate(images.labels.tolist())}
    assert len(found) == len(images)
    return found


TestFolders = Folders.TestCase
TestFolders.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
