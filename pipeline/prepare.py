"""Before stage 1: a folder of images -> WebDataset shards.

`singer prepare IMAGES --out SHARDS`. Sub-folders are classes (ImageFolder); a flat folder has no labels. A mask or a
depth map lies beside its image as NAME.seg.png or NAME.depth.png. Images are shuffled, so that every shard holds all
classes; encoded bytes are kept as they are.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pipeline.config import Config
from pipeline.outputs import Mode, check_output, claim_output, write_json
from pipeline.progress import meter, say
from pipeline.shards import to_rgb

KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
# Lossless, but not what webdataset users expect in shards: stored as PNG.
CONVERTED = (".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
BESIDE = ("seg.png", "depth.png")
CLASSES = "classes.json"


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
    if mode == "resume":
        raise ValueError("prepare cannot resume; use --overwrite")
    if not images.is_dir():
        raise ValueError(f"{images} is no folder of images")
    if out.resolve() == images.resolve() or images.resolve() in out.resolve().parents:
        raise ValueError(f"--out {out} lies within the images; give another folder")
    check_output(out, mode)
    files, classes = list_images(images)
    keys = [file_key(images, file) for file in files]
    check_keys(keys, files)
    claim_output(out, mode, "prepare", config, settings.seed)

    skipped: list[Path] = []
    written = 0
    order = np.random.default_rng(settings.seed).permutation(len(files))
    pattern = str(out / f"{out.name.replace('%', '_')}-%06d.tar")
    with (
        meter("prepare", len(files), "images") as m,
        # No clock in the headers: the same images give the same bytes.
        webdataset.ShardWriter(pattern, maxcount=settings.shard_images, mtime=0, verbose=0) as writer,
    ):
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
    return PrepareResult(out, sorted(out.glob("*.tar")), written, classes, skipped)


def list_images(folder: Path) -> tuple[list[Path], list[str]]:
    """Image files below a folder, sorted, and class names: of its sub-folders, if every image lies in one."""
    known = (*KEPT, *CONVERTED)
    files = sorted(
        f
        for f in folder.rglob("*")
        if f.suffix.lower() in known and f.is_file() and not f.name.lower().endswith(BESIDE)
    )
    if not files:
        raise ValueError(f"no images ({', '.join(known)}) below {folder}")
    in_classes = [len(f.relative_to(folder).parts) > 1 for f in files]
    if any(in_classes) and not all(in_classes):
        stray = files[in_classes.index(False)]
        raise ValueError(f"{folder} mixes class folders and loose images such as {stray.name}; move one of the two")
    return files, sorted({f.relative_to(folder).parts[0] for f in files}) if all(in_classes) else []


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
        path = file.with_name(f"{file.stem}.{name}")
        if path.is_file():
            yield name, path


def _decoded(data: bytes, file: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be decoded: {error}") from None
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
