"""Before stage 1: a folder of images -> WebDataset shards.

`singer prepare IMAGES --out SHARDS`. Sub-folders are classes (ImageFolder); a flat folder has no labels. A mask or a
depth map lies beside its image as NAME.seg.png or NAME.depth.png. Images are shuffled, so that every shard holds all
classes; encoded bytes are kept as they are.
"""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pipeline.config import Config
from pipeline.outputs import Mode, check_output, claimed_output, write_json
from pipeline.progress import meter, say
from pipeline.shards import open_image, to_rgb

KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
# Lossless, but not what webdataset users expect in shards: stored as PNG.
CONVERTED = (".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
BESIDE = (".seg.png", ".depth.png")
CLASSES = "classes.json"
STAGE = "prepare"
# Whatever a file is called, no other decoder sees it: some run interpreters.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


@dataclass(frozen=True)
class PrepareResult:
    """What was written. classes: names in the order of their labels; skipped: files that are no readable images."""

    out: Path
    shards: list[Path]
    images: int
    classes: list[str]
    skipped: list[Path]


def prepare(config: Config, images: Path, out: Path, mode: Mode = "new") -> PrepareResult:
    """Write the images below a folder as shards OUT/NAME-000000.tar. Raises ValueError for what the user can mend."""
    settings = config.prepare
    if not images.is_dir():
        raise ValueError(f"{images} is no folder of images")
    check_output(out, mode, STAGE, config, [images, *filter(None, [settings.classes])])
    files, classes = list_images(images)
    if settings.classes is not None:
        classes = known_classes(settings.classes, classes)
    keys = [file_key(images, file) for file in files]
    check_keys(keys, files)
    order = np.random.default_rng(settings.seed).permutation(len(files))

    skipped: list[Path] = []
    written = 0
    with claimed_output(out, mode, STAGE, config, settings.seed), meter("prepare", len(files), "images") as m:
        # Shards appear in OUT when all are whole: half a data set must not look like one.
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        pattern = str(partial / f"{out.name.replace('%', '_')}-%06d.tar")
        # No clock in the headers: the same images give the same bytes.
        with webdataset.ShardWriter(pattern, maxcount=settings.shard_images, mtime=0, verbose=0) as writer:
            for number in order:
                file = files[number]
                try:
                    sample = read_sample(file)
                except ValueError as error:
                    if settings.on_error == "fail":
                        raise ValueError(f"{error}; remove it, or set prepare.on_error=skip") from None
                    say(f"skipped: {error}")
                    skipped.append(file)
                    continue
                if classes:
                    sample["cls"] = str(classes.index(file.relative_to(images).parts[0])).encode()
                writer.write({"__key__": keys[number], **sample})
                written += 1
                m.advance(1)
        if not written:
            raise ValueError(f"none of the {len(files)} images below {images} can be read")
        if classes:
            write_json(out / CLASSES, classes)
        for shard in sorted(partial.glob("*.tar")):
            shard.rename(out / shard.name)
        partial.rmdir()
    return PrepareResult(out, sorted(out.glob("*.tar")), written, classes, skipped)


def list_images(folder: Path) -> tuple[list[Path], list[str]]:
    """Image files below a folder, sorted, and class names: its sub-folders, if every image lies in one.

    Hidden files and folders are passed over.
    """
    known = (*KEPT, *CONVERTED)
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in known and f.is_file())
    found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    beside = [f for f in found if f.name.lower().endswith(BESIDE)]
    files = [f for f in found if not f.name.lower().endswith(BESIDE)]
    if not files:
        raise ValueError(f"no images ({', '.join(known)}) below {folder}")
    stems = {f.with_suffix("") for f in files}
    for file in beside:
        if file.with_suffix("").with_suffix("") not in stems:
            raise ValueError(f"{file} has no image beside it")
    loose = [f for f in files if f.parent == folder]
    if len(loose) == len(files):
        return files, []
    if loose:
        raise ValueError(f"{folder} mixes class folders and loose images such as {loose[0].name}; move one of the two")
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    empty = set(classes) - {f.relative_to(folder).parts[0] for f in files}
    if empty:
        # Left out, it would shift the numbers of all classes behind it.
        raise ValueError(f"class folder {folder / min(empty)} holds no images; remove it, or give prepare.classes")
    return files, classes


def known_classes(file: Path, present: list[str]) -> list[str]:
    """The class names of another split. Raises ValueError if a class here is none of them."""
    try:
        classes = json.loads(file.read_text())
    except (OSError, ValueError):
        raise ValueError(f"prepare.classes: {file} is no classes.json of singer prepare") from None
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise ValueError(f"prepare.classes: {file} has no class {unknown[0]!r}")
    return [str(name) for name in classes]


def file_key(folder: Path, file: Path) -> str:
    """The key of an image in its shard: its relative path without extension. A key ends at its first dot."""
    relative = file.relative_to(folder)
    return "/".join(part.replace(".", "_") for part in (*relative.parts[:-1], relative.stem))


def check_keys(keys: list[str], files: list[Path]) -> None:
    first: dict[str, Path] = {}
    for key, file in zip(keys, files, strict=True):
        if key in first:
            raise ValueError(f"{first[key]} and {file} would have the same key {key!r}; rename one")
        first[key] = file


def read_sample(file: Path) -> dict[str, bytes]:
    """The members of an image: itself, and the mask and depth map beside it. Raises ValueError if one is unreadable."""
    data = file.read_bytes()
    extension = KEPT.get(file.suffix.lower(), "png")
    image = _decoded(data, file)
    if file.suffix.lower() in CONVERTED:
        data = _png(to_rgb(image))
    elif image.format not in ("JPEG", "PNG", "WEBP"):
        raise ValueError(f"{file} is a {image.format} under a wrong extension")
    sample = {extension: data}
    for name, beside in _beside(file):
        _decoded(beside.read_bytes(), beside)
        sample[name] = beside.read_bytes()
    return sample


def _beside(file: Path) -> Iterator[tuple[str, Path]]:
    for name in BESIDE:
        path = file.with_name(f"{file.stem}{name}")
        if path.is_file():
            yield name.removeprefix("."), path


def _decoded(data: bytes, file: Path) -> Image.Image:
    try:
        image = open_image(data, str(file), FORMATS)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be decoded: {error}") from None
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
