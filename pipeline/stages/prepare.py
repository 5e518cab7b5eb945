"""Before stage 1: pack images into WebDataset shards.

Run it with `singer prepare IMAGES --out SHARDS`; IMAGES are a folder, several of them, lists or tables.
Sub-folders are classes (ImageFolder); a flat folder has no labels. A mask or a depth map is beside its image as
NAME.seg.png or NAME.depth.png. pipeline/data/importers/ holds the layouts of known data sets. Images are shuffled, so
that every shard holds all classes; encoded bytes are kept as they are.
"""

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Config
from pipeline.data import Spec, decode, decode_rgb, named_errors, resolve
from pipeline.data.decoder_warnings import watched_decoders
from pipeline.data.entries import Convert, Entry, Listing
from pipeline.data.formats import FORMATS, KEPT, format_of
from pipeline.data.image_keys import file_keys
from pipeline.data.images import CLASSES, read_classes
from pipeline.data.importers import list_layout
from pipeline.data.importers.image_sources import list_sources
from pipeline.data.sources import kind_of
from pipeline.data.sources.class_folders import check_filled
from pipeline.data.sources.tables import TABLE
from pipeline.data.walk import as_text, printable
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.runtime.progress import meter, say
from pipeline.storage import naming
from pipeline.storage.json_files import write_json
from singer.errors import UserError

STAGE = "prepare"
_PARTIAL = ".partial"
# The layout of prepare.layout that is no known data set.
_FOLDER = "folder"


@dataclass(frozen=True)
class PrepareResult:
    """The shards that were written.

    classes: names in the order of their labels; skipped: files that are not readable images; left_out: {kind: how many
    other files are in the folder}, where a kind is a suffix, or one of the names in data/walk.py;
    shard_images: at most in a shard.
    """

    out: Path
    shards: list[Path]
    images: int
    classes: list[str]
    skipped: list[Path]
    left_out: dict[str, int]
    shard_images: int


def prepare(config: Config, images: Spec, out: Path, mode: Mode = "new", parts: int = 1) -> PrepareResult:
    """Write images as shards OUT/NAME-000000.tar.

    images: a folder in the layout of prepare.layout; of the layout "folder" also several, lists and tables, see
    data.specs.resolve; parts: small sets get smaller shards than prepare.shard_images, so that there are so many.
    Raises UserError for mistakes that the user can fix.
    """
    settings = config.prepare
    partial = out / _PARTIAL
    if mode == "new" and partial.is_dir():  # what a run left that failed or was killed is not a data set
        mode = "overwrite"
    check_output(out, mode, STAGE, config, [*sources_to_pack(config, images), *filter(None, [settings.classes])])
    listing = list_to_pack(config, images)
    size = max(1, min(settings.shard_images, -(-len(listing.entries) // parts))) if parts > 1 else settings.shard_images
    config = config.changed(prepare={"shard_images": size})
    if settings.classes is not None:
        listing = renumbered(listing, settings.classes)
    else:
        check_filled(listing, ", or give the classes of another split with --set prepare.classes=FILE")
    with claimed_output(out, mode, STAGE, config, settings.seed), watched_decoders():
        # Shards appear in OUT only when all are complete: a part of a data set must not look like the whole.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        folder, name = str(partial).replace("%", "%%"), out.name.replace("%", "_")
        written, skipped = pack(config, listing, f"{folder}/{name}-%06d.tar")
        if not written:
            raise UserError(f"none of the {len(listing.entries)} images of {images} can be read")
        if listing.classes:
            write_json(out / CLASSES, listing.classes)
        for shard in sorted(partial.glob("*.tar")):
            shard.rename(out / shard.name)
        partial.rmdir()
    return PrepareResult(
        out, sorted(out.glob("*.tar")), written, listing.classes, skipped, dict(listing.left_out), size
    )


def sources_to_pack(config: Config, images: Spec) -> list[Path]:
    """Return what holds the images: one folder, or lists, tables and folders. Raises UserError if there is none."""
    folder = Path(images) if isinstance(images, str | Path) else Path(*images) if len(images) == 1 else None
    if config.prepare.layout != _FOLDER and (folder is None or not folder.is_dir()):
        raise UserError(f"--layout {config.prepare.layout}: {images} is not the folder of a data set")
    if folder is None or not folder.is_dir():
        return resolve(images)
    found = resolve(images) if config.prepare.layout == _FOLDER else [folder]
    return found if kind_of(found[0]) is TABLE else [folder]


def list_to_pack(config: Config, images: Spec) -> Listing:
    """List the images to pack, with their keys. Raises UserError as the layout does."""
    settings, paths = config.prepare, sources_to_pack(config, images)
    if len(paths) > 1 or not paths[0].is_dir():
        if settings.split is not None:
            raise UserError(f"--split {settings.split}: lists, tables and several folders have no splits; leave it out")
        return list_sources(config, paths)
    listing = list_layout(settings.layout, paths[0], settings.split)
    if listing.left_out:
        say(f"left out: {as_text(listing.left_out)}")
    names = [str(Path(entry.file).relative_to(paths[0])) for entry in listing.entries]
    entries = [replace(entry, key=key) for entry, key in zip(listing.entries, file_keys(names), strict=True)]
    return replace(listing, entries=entries)


def pack(config: Config, listing: Listing, pattern: str) -> tuple[int, list[Path]]:
    """Write the images of a listing as shards; return how many there are, and the files that are not readable images.

    pattern: the path of a shard, with %06d for its number. Raises UserError for such a file, unless settings skip it.
    """
    settings, entries = config.prepare, listing.entries
    order = np.random.default_rng(settings.seed).permutation(len(entries))
    skipped: list[Path] = []
    import webdataset  # late, as it waits for torch

    # mtime is fixed, so that the same images give the same bytes.
    writer = webdataset.ShardWriter(pattern, maxcount=settings.shard_images, mtime=0, verbose=0)
    with naming(Path(pattern).parent), writer, meter("prepare", len(entries), "images") as m:
        for number in order.tolist():
            try:
                sample = read_sample(entries[number], listing.convert, config.data.max_pixels)
            except UserError as error:
                if config.data.on_error == "fail":
                    raise UserError(f"{error}; remove it, or skip all such images with --on-error skip") from None
                say(f"skipped: {error}")
                skipped.append(Path(entries[number].file))
                continue
            writer.write({"__key__": entries[number].key, **sample})
            m.advance(1)
    return len(entries) - len(skipped), skipped


def renumbered(listing: Listing, file: Path) -> Listing:
    """Return the listing with the class numbers of another split, which its classes.json gives.

    Labels without names are taken as such numbers. Raises UserError if the other split lacks a class.
    """
    try:
        classes = read_classes(file)
    except UserError:
        raise UserError(f"prepare.classes: {file} is not a classes.json of singer prepare") from None
    unknown = [name for name in listing.classes if name not in classes]
    if unknown:
        raise UserError(f"prepare.classes: {file} has no class {unknown[0]!r}")
    numbers = [classes.index(name) for name in listing.classes] or list(range(len(classes)))
    labels = [entry.label for entry in listing.entries if entry.label is not None]
    if not labels:
        raise UserError(f"prepare.classes: {file} is given, but these images have no classes; leave it out")
    if max(labels) >= len(numbers):
        raise UserError(f"prepare.classes: {file} has {len(classes)} classes, but an image has label {max(labels)}")
    entries = [e if e.label is None else replace(e, label=numbers[e.label]) for e in listing.entries]
    return replace(listing, entries=entries, classes=classes)


def read_sample(entry: Entry, convert: Mapping[str, Convert], max_pixels: int) -> dict[str, bytes]:
    """Return {extension: bytes} of an image: itself, its label, mask and depth map.

    convert: {extension: function that changes such maps}; max_pixels: larger images are refused. Raises UserError if a
    file cannot be read.
    """
    file = Path(entry.file)
    data, where = (_bytes_of(file), printable(file)) if entry.read is None else entry.read()
    with named_errors(where):
        decode_rgb(data, max_pixels=max_pixels)
    sample = {KEPT.get(file.suffix.lower()) or _extension(data): data}
    for name, place in ((name, Path(path)) for name, path in (entry.beside or {}).items()):
        sample[name] = _bytes_of(place)
        pixels = decode(sample[name], printable(place), ("PNG",), max_pixels)
        if name in convert:
            if pixels.mode not in ("L", "P"):
                raise UserError(f"{printable(place)} holds no class numbers of 8 bits")
            sample[name] = _png(Image.fromarray(convert[name](np.asarray(pixels))))
    if entry.label is not None:
        sample["cls"] = str(entry.label).encode()
    return sample


def _extension(data: bytes) -> str:
    """Return the extension in shards of an image without a usual one. Its content decides how it is read."""
    return FORMATS[format_of(data) or "PNG"].extensions[0]


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror}") from None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
