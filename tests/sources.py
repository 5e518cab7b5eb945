"""Small images in folders, and what an index reads of them."""

import json
from pathlib import Path

from files import saved
from tars import noise

from pipeline.data import ImageFile, Images


def encoded(seed: int, kind: str = "PNG") -> bytes:
    return saved(noise(8, 6, seed), kind)


def write(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def content(images: Images) -> dict[str, tuple[int, bytes]]:
    with ImageFile(images) as files:
        return {key: (int(images.labels[n]), files.encoded(n)[0]) for n, key in enumerate(images.keys)}


def photos(root: Path, names: str = "cat/a.png cat/b.jpg dog/c.png") -> Path:
    for number, name in enumerate(names.split()):
        write(root / name, encoded(number, "JPEG" if name.endswith("jpg") else "PNG"))
    return root


def table(path: Path, columns: dict[str, object], rows_a_group: int = 2, hf: dict[str, object] | None = None) -> Path:
    import pyarrow.ipc
    import pyarrow.parquet

    made = pyarrow.table(columns)
    if hf is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": hf}})})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(made, path, row_group_size=rows_a_group)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=rows_a_group)
    return path
