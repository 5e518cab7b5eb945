"""Tables with a column of images: parquet and arrow files, as Hugging Face `datasets` writes them."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.image_keys import distinct_names
from pipeline.data.images import Skipped
from pipeline.data.source_listing import ChangedImage, SourceListing
from pipeline.data.sources.kind import Kind, Options, Samples, numbered
from singer.errors import UserError

SUFFIXES = (".parquet", ".arrow")
_LABELS = ("label", "labels", "class", "cls", "fine_label")
# Each thread keeps this many groups of rows: neighbours are mostly read one after the other.
_KEPT = 2


def arrow() -> Any:
    """Import pyarrow. Raises UserError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet and arrow files need pyarrow: pip install 'singer-vit[parquet]'") from None
    return pyarrow


class _Table:
    """A parquet or arrow file as groups of rows. Raises UserError that names the file if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path, self._pa = path, arrow()
        try:
            if path.suffix.lower() == ".parquet":
                self._file = self._pa.parquet.ParquetFile(path, memory_map=True)
                self.schema = self._file.schema_arrow
                groups = range(self._file.num_row_groups)
                counts = [self._file.metadata.row_group(group).num_rows for group in groups]
            else:
                self._file, self._batches = None, self._batches_of(path)
                self.schema = self._batches[0].schema if self._batches else self._pa.schema([])
                counts = [len(batch) for batch in self._batches]
        except (self._pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from None
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def _batches_of(self, path: Path) -> list[Any]:
        source = self._pa.memory_map(str(path))
        try:
            return list(self._pa.ipc.open_stream(source))
        except self._pa.ArrowInvalid:
            source.seek(0)
            file = self._pa.ipc.open_file(source)
            return [file.get_batch(number) for number in range(file.num_record_batches)]

    def column(self, group: int, name: str) -> Any:
        """Return a column of a group of rows."""
        try:
            rows = self._batches[group] if self._file is None else self._file.read_row_group(group, columns=[name])
            column = rows.column(name)
        except (self._pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is damaged: {' '.join(str(error).split())}") from None
        return self._pa.chunked_array([column]) if isinstance(column, self._pa.Array) else column

    def images(self, group: int, name: str) -> Any:
        """Return the encoded images of a group of rows; null where there are none."""
        column = self.column(group, name)
        return self._pa.compute.struct_field(column, "bytes") if self._pa.types.is_struct(column.type) else column

    def features(self) -> dict[str, Any]:
        """Return what Hugging Face `datasets` says about the columns."""
        try:
            return dict(json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"])
        except (KeyError, ValueError, TypeError):
            return {}

    def image_column(self, chosen: str | None) -> str:
        """Return the name of the column of images. Raises UserError if there is none, or if there are several."""
        types = self._pa.types

        def holds_bytes(kind: Any) -> bool:
            if types.is_struct(kind):
                return bool(kind.get_field_index("bytes") >= 0)
            return bool(types.is_binary(kind) or types.is_large_binary(kind))

        found = [field.name for field in self.schema if holds_bytes(field.type)]
        if chosen is not None:
            if chosen not in found:
                raise UserError(f"data.image_key: {self.path} has no column {chosen!r} of images; it has {found}")
            return chosen
        features = self.features()
        named = [n for n in found if isinstance(features.get(n), dict) and features[n].get("_type") == "Image"] or found
        if len(named) != 1:
            remedy = f"; choose one with --set data.image_key={named[0]}" if named else self._without_images()
            raise UserError(f"{self.path} has {len(named)} columns of images ({', '.join(named) or 'none'}){remedy}")
        return str(named[0])

    def _without_images(self) -> str:
        """Return what to do about a table without images: it may hold their paths."""
        texts = [field.name for field in self.schema if field.type in (self._pa.string(), self._pa.large_string())]
        return f"; if {texts[0]!r} holds paths, write them to a list (.csv or .jsonl)" if texts else ""

    def labels(self) -> tuple[list[int], list[str]]:
        """Return the label of each row, and the names of the classes if they are known."""
        features = self.features()
        own = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
        names = [name for name in (*own, *_LABELS) if name in self.schema.names]
        if not names:
            return [-1] * int(self.starts[-1]), []
        values = [v for group in range(len(self.starts) - 1) for v in self.column(group, names[0]).to_pylist()]
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, str | int | float | None)]
        wrong += [v for v in values if isinstance(v, float) and v == v and not v.is_integer()]
        if wrong:
            raise UserError(
                f"{self.path}: the column {names[0]!r} holds no class numbers or names: {str(wrong[0])[:40]}"
            )
        labels, classes = numbered(values, str(self.path))
        return labels, classes or list(map(str, features.get(names[0], {}).get("names") or ()))


class TableReader:
    """Reads images by the number of their row; of all readers of a process, few have their file open."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._own = path, threading.Lock(), threading.local()
        self._table: _Table | None = None

    def read(self, file: str, offset: int, size: int, most: int, where: str) -> bytes:
        """Return the bytes of an image, or its first `most`. Raises UserError if they cannot be read."""
        with self._lock:
            table = self._table = self._table or _Table(self._path)
        self._keep()
        group = int(np.searchsorted(table.starts, offset, side="right")) - 1
        if group + 1 >= len(table.starts):
            raise UserError(f"{where}: the table has only {table.starts[-1]} rows; it has changed")
        value = self._group(table, group, file)[offset - int(table.starts[group])].as_py()
        if value is None or len(value) != size:
            raise ChangedImage(f"{where}: row {offset} has changed since it was listed")
        return bytes(value[:most])

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._table, self._own = None, threading.local()
        with _opened_lock:
            _opened.pop(self, None)

    def _keep(self) -> None:
        """Close the file that was read from longest ago, if too many are open."""
        with _opened_lock:
            _opened[self] = None
            _opened.move_to_end(self)
            oldest = next(iter(_opened)) if len(_opened) > _MOST_OPEN else None
        if oldest is not None:
            oldest.close()

    def _group(self, table: _Table, group: int, column: str) -> Any:
        kept: OrderedDict[tuple[int, str], Any] = self._own.__dict__.setdefault("groups", OrderedDict())
        if (group, column) not in kept:
            kept[group, column] = table.images(group, column)
            if len(kept) > _KEPT:
                kept.popitem(last=False)
        return kept[group, column]


# The readers whose files are open, the last that was used at the end.
_MOST_OPEN = 32
_opened: OrderedDict[TableReader, None] = OrderedDict()
_opened_lock = threading.Lock()


def _list(path: Path, options: Options) -> SourceListing:
    table = _Table(path)
    column = table.image_column(options.image_key)
    labels, classes = table.labels()
    count = int(table.starts[-1])
    digits = max(6, len(str(count)))
    (stem,) = distinct_names([path])
    keys = [f"{stem}/{row:0{digits}d}" for row in range(count)]
    samples = Samples(keys, labels, list(range(count)), files=[column] * count)
    for group in range(len(table.starts) - 1):
        for length in _lengths(table, group, column):
            if not length:
                row = len(samples.sizes)
                samples.defects.append((row, samples.keys[row], f"(row {row}) has no bytes of an image"))
            samples.sizes.append(length)
    return samples.listing(path.stat().st_size, classes)


def _lengths(table: _Table, group: int, column: str) -> Iterator[int]:
    lengths = arrow().compute.binary_length(table.images(group, column))
    return (length or 0 for length in lengths.to_pylist())


def _beside(
    path: Path, extension: str, keys: Sequence[str], files: Sequence[str], offsets: np.ndarray
) -> tuple[None, np.ndarray, np.ndarray]:
    reason = f"has no .{extension}: tables have no maps; use folders or shards"
    raise UserError(str(Skipped(str(path), keys[0], reason)))


TABLE = Kind("table", lambda path: path.suffix.lower() in SUFFIXES, _list, TableReader, _beside)
