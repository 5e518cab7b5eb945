"""The samples of a tar, grouped as in the webdataset library; only headers and labels are read."""

import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.formats import IMAGE_EXTENSIONS
from pipeline.data.source_listing import NO_LABEL
from pipeline.data.tar_members import Defect, Member, members_of
from pipeline.data.walk import HIDDEN, UNNAMED, suffix_of

LABEL_EXTENSION = "cls"
# Masks and depth maps are beside images, and are none.
MAPS = ("seg.png", "depth.png")
_LABEL_BYTES = 32
# {how a compressed file begins: what unpacks it}. LZMA begins with its properties and the size of its dictionary, and a
# tar whose first member is called "]" with zeros after it.
_COMPRESSED = {
    rb"\x1f\x8b": "gunzip", rb"\x28\xb5\x2f\xfd": "zstd -d", rb"BZh": "bunzip2", rb"\xfd7zXZ\0": "unxz",
    rb"\x04\x22\x4d\x18": "lz4 -d", rb"\]\0\0(?!\0\0)": "unlzma", rb"LZIP": "lzip -d", rb"\x1f\x9d": "uncompress",
}  # fmt: skip
# Key and extensions, split as in the webdataset library; importing it would load torch into every reader of tars.
_SAMPLE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
# Names are unsafe that are empty, absolute, not UTF-8 (tarfile turns that into surrogates), or have `..`, a backslash
# or a control character.
UNSAFE = re.compile(r"^(?:/|\Z)|(?:^|/)\.\.(?:/|\Z)|[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass
class Sample:
    """The members with one key, by extension.

    members: those that matter; images: those that may be the image, also with dots in their extension; labels: texts of
    .cls, and of names such as .v2.cls, by extension; repeated: extensions that occur twice; other: an extension that is
    none of these.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    images: dict[str, Member] = field(default_factory=dict)
    labels: dict[str, bytes] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    other: str = ""
    defect: str | None = None

    def has(self, extension: str) -> bool:
        """Return whether a member with this extension would be one too many."""
        another = extension in IMAGE_EXTENSIONS and not self.images.keys().isdisjoint(IMAGE_EXTENSIONS)
        return another or extension in self.members or extension in self.images


class TarSamples:
    """Groups the members of a tar, one after the other. The members of a sample need not follow one another.

    image_key: see DataConfig; also: further extensions that matter; left_out: {kind: how many files belong to no
    sample}, see walk. If a sample would get a second member of one kind, that member begins another sample
    with the same key; only a repetition that follows directly is a defect of the first sample.
    """

    def __init__(self, image_key: str | None, also: tuple[str, ...]) -> None:
        self.all: list[Sample] = []
        self.left_out: Counter[str] = Counter()
        self.scattered = False
        self._by_key: dict[str, Sample] = {}
        self._wanted = {LABEL_EXTENSION, *also}
        self._image = image_key and image_key.lower().removeprefix(".")
        # A key that begins with a dot is the end of names: then a key ends there, and not at its first dot.
        ends = [image_key, f".{LABEL_EXTENSION}", *(f".{name}" for name in {*MAPS, *also})] if image_key else []
        self._ends = tuple(sorted(ends, key=len, reverse=True)) if image_key and image_key.startswith(".") else ()

    def add(self, member: Member, file: int) -> None:
        """Add a member of the tar that is open as `file`."""
        unsafe = UNSAFE.search(member.name) is not None
        parts = self._parts(member.name)
        if parts is None and not unsafe:
            if member.regular:
                self.left_out[kind_of_name(member.name)] += 1
            return
        key, extension = parts or (member.name, "")
        is_label = extension.rpartition(".")[2] == LABEL_EXTENSION
        matters = extension in self._wanted or is_label or self._is_image(extension)
        if not (matters or member.regular or unsafe):
            return  # a folder with a dot in its name, mostly
        sample = self._sample(key, extension)
        if unsafe:
            sample.defect = f"has the unsafe name {member.name!r}"
        elif extension in sample.members or extension in sample.images:
            sample.repeated.append(extension)
        elif extension in self._wanted or is_label:
            sample.members[extension] = member
            if is_label and member.regular and member.size <= _LABEL_BYTES:
                sample.labels[extension] = os.pread(file, member.size, member.offset)
        elif matters:
            sample.images[extension] = member
        else:
            sample.other = extension

    def _is_image(self, extension: str) -> bool:
        usual = extension.rpartition(".")[2] in IMAGE_EXTENSIONS and not extension.endswith(MAPS)
        return usual or extension == self._image

    def _sample(self, key: str, extension: str) -> Sample:
        """Return the sample to which a member belongs, a new one if need be."""
        if self.all and self.all[-1].key == key:
            return self.all[-1]
        sample = self._by_key.get(key)
        if sample is None or sample.has(extension):
            sample = self._by_key[key] = Sample(key)
            self.all.append(sample)
        else:
            self.scattered = True
        return sample

    def _parts(self, name: str) -> tuple[str, str] | None:
        """Split a name into key and extension; None if it belongs to no sample."""
        if name.startswith(".", name.rfind("/") + 1):
            return None  # hidden; tars of macOS have such a file beside every image
        end = next((end for end in self._ends if name.lower().endswith(end)), None)
        if end is not None:
            return name[: -len(end)], end[1:]
        named = _SAMPLE.match(name)
        return None if named is None or self._ends else (named[1], named[2].lower())

    def damaged(self) -> None:
        """Mark the samples that may have lost members, because the rest of the tar cannot be read."""
        for sample in self.all if self.scattered else self.all[-1:]:
            if sample is self.all[-1] or LABEL_EXTENSION not in sample.members:
                sample.defect = "may have lost members: the shard is damaged after it"


def read_samples(path: Path, *also: str, image_key: str | None = None) -> tuple[TarSamples, str | None]:
    """Read the samples of a shard, and what is wrong with it as a whole. also: further extensions that matter."""
    samples = TarSamples(image_key, also)
    try:
        with path.open("rb", buffering=0) as file:
            start = os.pread(file.fileno(), 6, 0)
            command = next((command for magic, command in _COMPRESSED.items() if re.match(magic, start)), None)
            if command is not None:
                # Given a name, it would refuse a suffix that it does not know, such as .tar.
                how = f"{command} < {shlex.quote(str(path))} > {shlex.quote(str(_unpacked(path)))}"
                raise Defect(f"is compressed, but images are read by their place; unpack it: {how}")
            for member in members_of(file.fileno()):
                samples.add(member, file.fileno())
    except (Defect, OSError) as error:
        samples.damaged()
        return samples, str(error) if isinstance(error, Defect) else f"cannot be read: {error.strerror}"
    return samples, None


def _unpacked(path: Path) -> Path:
    """Return the name that a compressed tar gets when it is unpacked, which is another one than its own."""
    stem = path.with_suffix(".unpacked") if path.suffix.lower() == ".tar" else path.with_suffix("")
    return stem if stem.suffix.lower() == ".tar" else Path(f"{stem}.tar")


def kind_of_name(name: str) -> str:
    """Return the kind of a file that belongs to no sample, as walk counts it."""
    return HIDDEN if name.startswith(".", name.rfind("/") + 1) else suffix_of(name) or UNNAMED


def contents(sample: Sample, image_key: str | None = None) -> tuple[int, Member]:
    """Return label and image of a sample. Raises Defect if there is no usable image or label."""
    if sample.defect is not None:
        raise Defect(sample.defect)
    extension = image_extension(sample, image_key)
    image = sample.images[extension]
    if not image.regular:
        raise Defect("has an image that is not a regular file")
    if not image.size:
        raise Defect("has an empty image")
    # The image of .v2.png may have its label in .v2.cls: a key ends at its first dot.
    named = f"{extension.rpartition('.')[0]}.{LABEL_EXTENSION}"
    label = LABEL_EXTENSION if LABEL_EXTENSION in sample.members else named
    if label not in sample.members:
        return NO_LABEL, image
    if label not in sample.labels:
        raise Defect("has a label that is not a class number: its .cls is too long, or no regular file")
    text = sample.labels[label].strip()
    if text == str(NO_LABEL).encode():
        return NO_LABEL, image
    if not text.isdigit() or int(text) >= 2**31:
        raise Defect(f"has a label that is not a class number: {text[:20]!r}")
    return int(text), image


def image_extension(sample: Sample, image_key: str | None) -> str:
    """Return the extension of the image: the given one, else an ordinary one, else the only one with dots in it.

    Raises Defect if there is none, or if there are several with dots.
    """
    found = sample.images
    if image_key is not None:
        wanted = image_key.lower().removeprefix(".")
        if wanted not in found:
            raise Defect(f"has no .{wanted} (data.image_key); it has {', '.join(found) or 'no image'}")
        return wanted
    ordinary = [extension for extension in IMAGE_EXTENSIONS if extension in found]
    chosen = ordinary or list(found)
    if not chosen:
        chosen_by = f"--set {shlex.quote(f'data.image_key={sample.other}')}"
        also = f"; if .{sample.other} is the image, say so: {chosen_by}" if sample.other else ""
        raise Defect(f"has no image ({', '.join(IMAGE_EXTENSIONS)}){also}")
    if len(chosen) > 1 and not ordinary:
        field, end = (shlex.quote(f"data.image_key={key}") for key in (chosen[0], f".{chosen[0].rpartition('.')[2]}"))
        raise Defect(
            f"has several images ({', '.join(found)}), since a key ends at its first dot; name the image with "
            f"--set {field}, or let keys end at the last dot with --set {end}"
        )
    return chosen[0]
