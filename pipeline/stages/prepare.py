"""Before stage 1: pack a folder of images into WebDataset shards.

Run it with `singer prepare IMAGES --out SHARDS`. Sub-folders are classes (ImageFolder); a flat folder has no labels. A
mask or a depth map is beside its image as NAME.seg.png or NAME.depth.png. pipeline/data/importers/ holds the layouts of
known data sets. Images are shuffled, so that every shard holds all classes; encoded bytes are kept as they are.
"""

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Config
from pipeline.data import open_image, to_rgb
from pipeline.data.images import CLASSES
from pipeline.data.importers import list_layout
from pipeline.data.importers.listing import CONVERTED, KEPT, Convert, Entry, Listing
from pipeline.runtime.progress import meter, say
from pipeline.storage.outputs import Mode, check_output, claimed_output, write_json
from singer.errors import UserError

STAGE = "prepare"
# Only these decoders are used, whatever a file's name is, because some decoders of PIL run interpreters.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


@dataclass(frozen=True)
class PrepareResult:
    """The shards that were written.

    classes: names in the order of their labels; skipped: files that are no readable images.
    """

    out: Path
    shards: list[Path]
    images: int
    classes: list[str]
    skipped: list[Path]


def prepare(config: Config, images: Path, out: Path, mode: Mode = "new") -> PrepareResult:
    """Write the images below a folder as shards OUT/NAME-000000.tar.

    Raises UserError for mistakes that the user can fix.
    """
    settings = config.prepare
    if not images.is_dir():
        raise UserError(f"{images} {'is no folder of images' if images.exists() else 'does not exist'}")
    check_output(out, mode, STAGE, config, [images, *filter(None, [settings.classes])])
    listing = list_layout(settings.layout, images, settings.split)
    if settings.classes is not None:
        listing = renumbered(listing, settings.classes)
    files = [entry.file for entry in listing.entries]
    keys = [file_key(images, file) for file in files]
    check_keys(keys, files)
    order = np.random.default_rng(settings.seed).permutation(len(files))

    skipped: list[Path] = []
    written = 0
    with claimed_output(out, mode, STAGE, config, settings.seed), meter("prepare", len(files), "images") as m:
        # Shards appear in OUT only when all are complete: a part of a data set must not look like the whole.
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        import webdataset  # late, as it waits for torch

        pattern = str(partial / f"{out.name.replace('%', '_')}-%06d.tar")
        # mtime is fixed, so that the same images give the same bytes.
        with webdataset.ShardWriter(pattern, maxcount=settings.shard_images, mtime=0, verbose=0) as writer:
            for number in order:
                entry = listing.entries[number]
                try:
                    sample = read_sample(entry, listing.convert)
                except UserError as error:
                    if settings.on_error == "fail":
                        raise UserError(f"{error}; remove it, or skip all such images with --on-error skip") from None
                    say(f"skipped: {error}")
                    skipped.append(entry.file)
                    continue
                writer.write({"__key__": keys[number], **sample})
                written += 1
                m.advance(1)
        if not written:
            raise UserError(f"none of the {len(files)} images below {images} can be read")
        if listing.classes:
            write_json(out / CLASSES, listing.classes)
        for shard in sorted(partial.glob("*.tar")):
            shard.rename(out / shard.name)
        partial.rmdir()
    return PrepareResult(out, sorted(out.glob("*.tar")), written, listing.classes, skipped)


def renumbered(listing: Listing, file: Path) -> Listing:
    """Return the listing with the class numbers of another split, which its classes.json gives.

    Labels without names are taken as such numbers. Raises UserError if the other split lacks a class.
    """
    try:
        classes = [str(name) for name in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"prepare.classes: {file} is no classes.json of singer prepare") from None
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


def file_key(folder: Path, file: Path) -> str:
    """Return the key of an image in its shard: its relative path without extension and without dots.

    WebDataset ends a key at its first dot.
    """
    relative = file.relative_to(folder)
    return "/".join(part.replace(".", "_") for part in (*relative.parts[:-1], relative.stem))


def check_keys(keys: list[str], files: list[Path]) -> None:
    """Raise UserError if two files have the same key."""
    first: dict[str, Path] = {}
    for key, file in zip(keys, files, strict=True):
        if key in first:
            raise UserError(f"{first[key]} and {file} would have the same key {key!r}; rename one")
        first[key] = file


def read_sample(entry: Entry, convert: Mapping[str, Convert]) -> dict[str, bytes]:
    """Return {extension: bytes} of an image: itself, its label, mask and depth map.

    convert: {extension: function that changes such maps}. Raises UserError if a file cannot be read.
    """
    file = entry.file
    data = file.read_bytes()
    extension = KEPT.get(file.suffix.lower(), "png")
    image = _decoded(data, file)
    if file.suffix.lower() in CONVERTED:
        data = _png(to_rgb(image))
    elif image.format not in ("JPEG", "PNG", "WEBP"):
        raise UserError(f"{file} is a {image.format} with a wrong extension")
    sample = {extension: data}
    for name, place in entry.beside.items():
        sample[name] = place.read_bytes()
        pixels = _decoded(sample[name], place)
        if name in convert:
            if pixels.mode not in ("L", "P"):
                raise UserError(f"{place} holds no class numbers of 8 bits")
            sample[name] = _png(Image.fromarray(convert[name](np.asarray(pixels))))
    if entry.label is not None:
        sample["cls"] = str(entry.label).encode()
    return sample


def _decoded(data: bytes, file: Path) -> Image.Image:
    try:
        image = open_image(data, str(file), FORMATS)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be decoded: {error}") from None
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
