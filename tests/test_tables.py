"""Images in parquet and arrow files."""

from pathlib import Path

import numpy as np
import pytest
from sources import content, encoded, table, write

from pipeline.data import ImageFile, index_beside, index_images
from singer.errors import UserError

pyarrow = pytest.importorskip("pyarrow")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    data = [encoded(n) for n in range(5)]
    columns = {
        "image": [{"bytes": d, "path": None} for d in data],
        "thumb": [{"bytes": b"x", "path": None}] * 5,
        "label": [1, 0, -1, None, 1],
    }
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    file = table(tmp_path / f"t.{suffix}", columns, hf=features)
    for spec in (str(file), str(tmp_path)):
        images = index_images(spec)
        assert [images.labels.tolist(), images.classes] == [[1, 0, -1, -1, 1], ("dog", "cat")]
        assert list(images.keys)[:2] == ["t/000000", "t/000001"]
        assert [read for _, read in content(images.select(np.array([4, 0, 3, 1, 2]))).values()] == [
            data[n] for n in (4, 0, 3, 1, 2)
        ]
    with ImageFile(images) as files:
        assert files.dimensions(2) == (8, 6) and files.encoded(1, 4)[0] == data[1][:4]
    with pytest.raises(UserError, match=r"t\.\w+: sample 't/000000' has no \.seg\.png: tables have no maps"):
        index_beside(images, "seg.png")
    plain = table(tmp_path / f"u.{suffix}", {k: columns[k] for k in ("image", "thumb")})
    with pytest.raises(UserError, match=r"has 2 columns of images .*; choose one with --set data.image_key=image"):
        index_images(str(plain))
    assert index_images(str(plain), image_key="thumb").size.tolist() == [1] * 5
    with pytest.raises(UserError, match=r"data.image_key: .* has no column 'x' of images"):
        index_images(str(plain), image_key="x")


def test_tables_with_faults(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", {"img": [b"x", b"", None], "cls": ["b", "a", "b"]})
    with pytest.raises(UserError, match=r"sample 'a/000001' \(row 1\) has no bytes of an image"):
        index_images(str(file))
    other = table(tmp_path / "b.parquet", {"img": [b"y"], "cls": ["c"]})
    images = index_images([str(file), str(other)], "skip")
    assert list(images.keys) == ["a/000000", "b/000000"] and len(images.skipped) == 2
    assert images.labels.tolist() == [1, 2] and images.classes == ("a", "b", "c")
    table(other, {"img": [b"changed"], "cls": ["c"]})
    with ImageFile(images) as files, pytest.raises(UserError, match="row 0 has changed since it was listed"):
        files.encoded(1)
    for name, data in (("c.parquet", b"PAR1 no"), ("c.arrow", b"no")):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a table"):
            index_images(str(write(tmp_path / name, data)))
    with pytest.raises(UserError, match=r"has 0 columns of images \(none\)$"):
        index_images(str(table(tmp_path / "d.parquet", {"x": [1]})))
    with pytest.raises(UserError, match=r"0 columns of images \(none\); if 'p' holds paths, write them to a list"):
        index_images(str(table(tmp_path / "d.parquet", {"p": ["a.png"]})))
    floats = table(tmp_path / "f.parquet", {"i": [b"x", b"y", b"z"], "label": [3.0, float("nan"), None]})
    assert index_images(str(floats)).labels.tolist() == [3, -1, -1]
    with pytest.raises(UserError, match="'label' holds no class numbers or names: 1.5"):
        index_images(str(table(tmp_path / "e.parquet", {"i": [b"x"], "label": [1.5]})))


def test_many_tables_are_open_a_few_at_a_time(tmp_path: Path) -> None:
    for n in range(80):
        table(tmp_path / f"{n:02}.parquet", {"image": [encoded(n), encoded(n + 1)]})
    images = index_images(sorted(map(str, tmp_path.glob("*.parquet"))))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ImageFile(images) as files:
        for number in (*range(160), 0):
            assert files.encoded(number)[0] == encoded(number // 2 + number % 2)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 40


def test_without_pyarrow_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow: pip install 'singer-vit\[parquet\]'"):
        index_images(str(write(tmp_path / "a.parquet", b"")))
