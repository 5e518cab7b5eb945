"""A real chain at the size of ImageNet-1k and at a tenth of it, to see whether a cost grows faster than the images.

    python benchmarks/scale.py --work FOLDER --images 128117
    python benchmarks/scale.py --work FOLDER --images 1281167
    python benchmarks/scale.py --work FOLDER --index-only 14197122
    python benchmarks/scale.py --work FOLDER --table

It makes tars of 1,000 tiny JPEGs each, and a teacher of a few thousand weights. Then it runs the command line on them,
stage by stage: plan, cache-teacher (two blocks), open, refine, distill (one epoch), verify, inspect. Zarr shards have
about as many records as those of ViT-L at 224 pixels, so that there are as many files. cache-teacher and distill are
killed by SIGKILL at a random image, and resumed. --index-only lists the images in the tars of so many images, and opens
a cache of so many records in shards of 710. Every stage starts with a limit of 1,024 open files.

Seconds count from the moment at which Python has imported everything. Stages that are done are skipped, so that the
same command continues where it was interrupted. --table prints the measurements as a Markdown table with the ratios of
the two largest sizes. --delete removes a size's data, but not its figures. --fork is for a test: it starts stages
without importing everything again, and the peaks of memory are then those of all of singer.
"""

import argparse
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TAR_IMAGES, LABELS, SIDE = 1000, 1000, 16
DIGITS, BLOCK = 8, tarfile.BLOCKSIZE
# The number of tar blocks that hold a picture.
PICTURE = 2
OPEN_FILES = 1024
# The teacher: 101 tokens of width 16 in float16 are 3.2 kB a record and block, 324 records a shard of 1 MB.
TEACHER = {"embed_dim": 16, "depth": 3, "num_heads": 1, "mlp_ratio": 2, "patch_size": 4, "img_size": 40}
TEACHER_SETS = ("cache.blocks=[1,2]", "cache.codec=float16", "cache.shard_mb=1")
STUDENT_SETS = (
    "student.dim=8", "student.depth=2", "student.heads=1", "student.patch_size=4", "distill.epochs=1",
    "distill.trackers=[]",
    # A checkpoint after every 50 steps, because this run of minutes stands for one of hours.
    "distill.checkpoint_minutes=0.001",
)  # fmt: skip
# The shape of the cache that is only opened.
SHARD_RECORDS, TOKENS, WIDTH = 710, 5, 8
# {stage: the event that ends the wait for its first batch}
STAGES = {
    "plan": "index",
    "cache-teacher": "cache",
    "open": "read",
    "refine": "read",
    "distill": "distill",
    "verify": "verify",
    "inspect": "read",
}
KILLED = ("cache-teacher", "distill")
INDEX_STAGES = {"index": "index", "open": "read"}
WATCHED, IMPORTED, SECONDS_TO_SAVE = "watched", "imported", 1.0


def main() -> None:
    """Parse the options and run what they ask for, or a watched command."""
    if sys.argv[1:2] == [WATCHED]:
        watched(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data and the figures")
    parser.add_argument("--images", type=int, help="run the chain at this size")
    parser.add_argument("--index-only", type=int, help="index and open alone at this size")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images at which stages are killed")
    parser.add_argument("--delete", action="store_true", help="remove tars, cache and runs of a size that is done")
    parser.add_argument("--fork", action="store_true", help="fork stages from this process, for a test")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    options = parser.parse_args()
    if options.images is not None:
        chain(options.work / f"{options.images}", options.images, options.seed, options.fork)
    if options.index_only is not None:
        index_and_open(options.work / f"index-{options.index_only}", options.index_only, options.fork)
    if options.delete:
        for size in (options.images, options.index_only and f"index-{options.index_only}"):
            for place in (p for p in (options.work / str(size)).glob("*") if p.name != "legs"):
                shutil.rmtree(place)
    if options.table:
        print_tables(options.work)


def chain(folder: Path, images: int, seed: int, fork: bool) -> None:
    """Run all stages at one size, and kill some of them once."""
    legs = Legs(folder / "legs", start_fork if fork else start_process)
    if all(legs.finished(stage) for stage in STAGES):
        return
    write_tars(folder / "shards", images, labelled=True)
    if not (folder / "teacher").exists():
        legs.prepare(["teacher", str(folder / "teacher.new")])
        (folder / "teacher.new").rename(folder / "teacher")
    rng = random.Random(seed)
    for stage in STAGES:
        kill = round(images * rng.uniform(0.3, 0.7)) if stage in KILLED else None
        while not legs.finished(stage):
            killed = any(leg.ended == "killed" for leg in legs.of(stage))
            legs.run(stage, arguments(folder, stage, images), None if killed else kill)


def arguments(folder: Path, stage: str, images: int) -> list[str]:
    """Return the command of a stage, which continues its output if that exists."""
    shards, cache = f"--shards={folder / 'shards' / '*.tar'}", str(folder / "cache")
    teacher = ["--teacher", f"local-dir:{folder / 'teacher'}"]
    teacher_sets = [f"--set={s}" for s in TEACHER_SETS]
    # Enough steps for a kill and checkpoints at any size.
    batch = max(1, min(256, images // 40))
    command = {
        "plan": ["cache", "plan", shards, *teacher, "--out", cache, "--seconds", "5", *teacher_sets],
        "cache-teacher": ["cache-teacher", shards, *teacher, "--out", cache, *teacher_sets],
        "open": ["open", cache],
        "refine": ["refine", "--cache", cache, "--out", str(folder / "adapters")],
        "distill": ["distill", "--cache", cache, "--refiner", str(folder / "adapters"), "--out", str(folder / "run"),
                    "--batch-size", str(batch), *(f"--set={s}" for s in STUDENT_SETS)],
        "verify": ["cache", "verify", cache, *teacher],
        "inspect": ["inspect", cache, "--refiner", str(folder / "adapters"), "--out", str(folder / "inspect")],
    }[stage]  # fmt: skip
    outputs = {
        "cache-teacher": ("cache", "--resume"),
        "refine": ("adapters", "--resume"),
        "distill": ("run", "--resume"),
        "inspect": ("inspect", "--overwrite"),
    }
    output, how = outputs.get(stage, ("", ""))
    return [*command, how] if output and (folder / output).exists() else command


def index_and_open(folder: Path, images: int, fork: bool) -> None:
    """List the images of so many tars, and open a cache of so many records."""
    legs = Legs(folder / "legs", start_fork if fork else start_process)
    if not legs.finished("index"):
        write_tars(folder / "shards", images, labelled=False)
        legs.run("index", ["index", str(folder / "shards" / "*.tar")])
    if not legs.finished("open"):
        if not (folder / "cache").exists():
            shutil.rmtree(folder / "cache.new", ignore_errors=True)
            legs.prepare(["synthetic", str(folder / "cache.new"), str(images)])
            (folder / "cache.new").rename(folder / "cache")
        legs.run("open", ["open", str(folder / "cache")])


def write_tars(folder: Path, images: int, labelled: bool) -> None:
    """Write shards of 1,000 images each, unless they exist.

    labelled: whether each image has a .cls and its own picture; otherwise every shard has the same pictures under other
    keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start, parts = time.monotonic(), range(0, images, TAR_IMAGES)
    same = pictures(0, min(images, TAR_IMAGES)) if not labelled else None
    for first in parts:
        path, count = folder / f"train-{first // TAR_IMAGES:06d}.tar", min(TAR_IMAGES, images - first)
        if path.exists():
            continue
        numbers = np.arange(first, first + count)
        data, sizes = (a[:count] for a in same) if same is not None else pictures(first, count)
        pieces = [headers(numbers, ".jpg", sizes), data]
        if labelled:
            label = np.zeros((count, BLOCK), np.uint8)
            label[:, :3] = digits(numbers % LABELS, 3, 10)
            pieces += [headers(numbers, ".cls", np.full(count, 3)), label]
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            np.concatenate(pieces, axis=1).tofile(file)
            file.write(bytes(2 * BLOCK))
        unfinished.rename(path)
    print(f"{images} images in {len(parts)} tars: {time.monotonic() - start:.0f} s", flush=True)


def pictures(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return JPEGs (n, bytes) uint8, with zeros at the end, and their sizes; each label has a colour, with noise."""
    rng = np.random.default_rng(first)
    out, sizes = np.zeros((count, PICTURE * BLOCK), np.uint8), np.zeros(count, np.int64)
    colours = np.random.default_rng(0).integers(0, 200, (LABELS, 1, 1, 3))
    noise = rng.integers(0, 56, (count, SIDE // 4, SIDE // 4, 3)).repeat(4, 1).repeat(4, 2)
    pixels = (colours[np.arange(first, first + count) % LABELS] + noise).astype(np.uint8)
    for row, picture in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=50)
        data = buffer.getvalue()
        out[row, : len(data)], sizes[row] = np.frombuffer(data, np.uint8), len(data)
    return out, sizes


def headers(numbers: np.ndarray, extension: str, sizes: np.ndarray) -> np.ndarray:
    """Return the tar headers (n, 512) uint8 of the files NUMBER{extension}."""
    template = tarfile.TarInfo("0" * DIGITS + extension).tobuf(tarfile.USTAR_FORMAT)
    out = np.tile(np.frombuffer(template, np.uint8), (len(numbers), 1))
    out[:, :DIGITS] = digits(numbers, DIGITS, 10)
    out[:, 124:135] = digits(sizes, 11, 8)
    # In the sum, the field of the checksum counts as blanks.
    out[:, 148:156] = ord(" ")
    out[:, 148:154] = digits(out.sum(1, dtype=np.int64), 6, 8)
    out[:, 154] = 0
    return out


def digits(numbers: np.ndarray, count: int, base: int) -> np.ndarray:
    """Return the ASCII digits (n, count) uint8 of numbers, with leading zeros."""
    return (numbers[:, None] // base ** np.arange(count)[::-1] % base + ord("0")).astype(np.uint8)


@dataclass
class Leg:
    """One process of a stage, up to its end, its kill, or the end of this script.

    ended: done, killed, or "" if this script was interrupted; seconds: wall time; processor: seconds of all cores;
    memory: the peak, in MB; own: the largest part of it that was seen without a file; files: most open descriptors;
    maps: most mapped regions; kill_at: in images; events: {name: [seconds to the first, seconds to the last, count]},
    where the count of IMPORTED is in seconds of processor. All seconds count from the start of the process.
    """

    ended: str = ""
    seconds: float = 0.0
    processor: float = 0.0
    memory: float = 0.0
    own: float = 0.0
    files: int = 0
    maps: int = 0
    kill_at: int | None = None
    events: dict[str, list[float]] = field(default_factory=dict)

    @property
    def imported(self) -> tuple[float, float]:
        """Return the seconds of wall time and of processor until everything was imported."""
        clock, _, processor = self.events.get(IMPORTED, [0.0, 0.0, 0.0])
        return clock, processor


class Legs:
    """The legs of all stages at one size, each in a JSON file."""

    def __init__(self, folder: Path, start: "Start | None" = None) -> None:
        self.folder, self.start = folder, start or start_process
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, command: list[str]) -> None:
        """Run a command of this script without measuring it."""
        if os.waitpid(self.start([os.devnull, "", *command], sys.stdout), 0)[1]:
            sys.exit(f"{' '.join(command)} failed")

    def of(self, stage: str) -> list[Leg]:
        """Return the legs of a stage, in their order."""
        files = sorted(self.folder.glob(f"{stage}.[0-9][0-9][0-9].json"))
        return [Leg(**json.loads(file.read_text())) for file in files]

    def finished(self, stage: str) -> bool:
        """Return whether a stage is done."""
        return any(leg.ended == "done" for leg in self.of(stage))

    def run(self, stage: str, command: list[str], kill_at: int | None = None) -> None:
        """Run a stage to its end or its kill; end this script if it fails."""
        name = f"{stage}.{len(self.of(stage)):03d}"
        file, events, said = (self.folder / f"{name}.{ending}" for ending in ("json", "events", "txt"))
        leg, start = Leg(kill_at=kill_at), time.time()
        events.write_bytes(b"")
        kill = "" if kill_at is None else f"{STAGES[stage]}:{kill_at}"
        with said.open("w") as out:
            process = self.start([str(events), kill, *command], out)
        saved = 0.0
        try:
            while (ended := os.wait4(process, os.WNOHANG))[0] == 0:
                sample(process, leg)
                if time.time() - saved > SECONDS_TO_SAVE:
                    leg.seconds, leg.events, saved = time.time() - start, read_events(events, start), time.time()
                    save(file, leg)
                time.sleep(0.05)
        except BaseException:
            os.kill(process, signal.SIGKILL)
            raise
        _, status, usage = ended
        code = os.waitstatus_to_exitcode(status)
        leg.seconds, leg.processor = time.time() - start, usage.ru_utime + usage.ru_stime
        # This value is exact, but only that of the largest process.
        leg.memory = max(leg.memory, usage.ru_maxrss / 1e3)
        leg.events = read_events(events, start)
        killed = kill_at is not None and code == -signal.SIGKILL
        if code and not killed:
            file.unlink(missing_ok=True)
            sys.exit(f"{' '.join(command)}\nfailed with exit code {code}:\n{said.read_text()[-2000:]}")
        leg.ended = "killed" if killed else "done"
        save(file, leg)
        print(f"{name}: {leg.ended}, {leg.seconds:.0f} s, {leg.memory:.0f} MB, {leg.files} files", flush=True)


Start = Callable[[list[str], TextIO], int]
"""A function that starts `watched` with some arguments, with its messages in a file, and returns the process."""


def start_process(args: list[str], out: TextIO) -> int:
    """Start `watched` in a new Python."""
    # Popen would wait for the process itself, but os.wait4 has to.
    streams = [(os.POSIX_SPAWN_DUP2, out.fileno(), stream) for stream in (1, 2)]
    return os.posix_spawn(sys.executable, [sys.executable, __file__, WATCHED, *args], os.environ, file_actions=streams)


def start_fork(args: list[str], out: TextIO) -> int:
    """Start `watched` in a fork of this process."""
    import_all()
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        watched(args)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def import_all() -> None:
    """Import all that the stages import."""
    sys.path.insert(0, str(ROOT))
    for name in ("cache_teacher", "distill", "inspect", "refine", "verify"):
        importlib.import_module(f"pipeline.stages.{name}")
    importlib.import_module("pipeline.planning.plan")


def save(file: Path, leg: Leg) -> None:
    """Write a leg to its file, as a whole."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(asdict(leg)))
    new.rename(file)


def sample(pid: int, leg: Leg) -> None:
    """Measure a process and its children from outside, through /proc."""
    memory = own = processor = 0.0
    for process in tree(pid):
        try:
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            if "VmHWM" not in status:
                continue
            memory += int(status["VmHWM"].split()[0]) * 1024 / 1e6
            own += int(status["RssAnon"].split()[0]) * 1024 / 1e6
            times = (process / "stat").read_text().rpartition(")")[2].split()
            processor += (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
            leg.files = max(leg.files, len(os.listdir(process / "fd")))  # noqa: PTH208 (no objects are needed)
            leg.maps = max(leg.maps, (process / "maps").read_bytes().count(b"\n"))
        except OSError:  # the process has ended
            continue
    leg.memory, leg.own, leg.processor = (max(leg.memory, memory), max(leg.own, own), max(leg.processor, processor))


def tree(pid: int) -> Iterator[Path]:
    """Yield the folders in /proc of a process and of all its descendants."""
    process = Path("/proc") / str(pid)
    yield process
    for children in process.glob("task/*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from tree(int(child))


def read_events(file: Path, start: float) -> dict[str, list[float]]:
    """Return {name: [seconds from `start` to the first event, seconds to the last, count]}."""
    found: dict[str, list[float]] = {}
    for line in file.read_text().splitlines():
        name, count, at = line.split("\t")
        first = found.setdefault(name, [float(at) - start, 0.0, 0])
        first[1], first[2] = float(at) - start, first[2] + float(count)
    return found


def watched(args: Sequence[str]) -> None:
    """Run a command of singer, or one of this script, and write a line to a file for every batch that it has done.

    args: the file; EVENT:COUNT at which the process kills itself, or ""; and the command.
    """
    import ctypes
    import resource

    events, kill, *command = args
    # The process ends when this script ends.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    import_all()
    import cli
    from pipeline.cache.reader import Cache
    from pipeline.runtime.progress import Meter

    victim, _, limit = kill.partition(":")
    file = os.open(events, os.O_WRONLY | os.O_APPEND)
    done = 0.0

    def happened(name: str, count: float) -> None:
        nonlocal done
        os.write(file, f"{name}\t{count}\t{time.time():.3f}\n".encode())
        if name == victim:
            done += count
            if done >= int(limit):
                os.kill(os.getpid(), signal.SIGKILL)

    happened(IMPORTED, time.process_time())
    advance, read = Meter.advance, Cache.read

    def advanced(meter: Meter, count: int, note: str = "") -> None:
        advance(meter, count, note)
        happened(meter._what, count)

    def was_read(cache: Cache, records: Any) -> Any:
        found = read(cache, records)
        happened("read", len(records))
        return found

    Meter.advance, Cache.read = advanced, was_read  # type: ignore[method-assign, assignment]
    own: dict[str, Callable[..., None]] = {
        "index": lambda spec: list_images(spec, happened),
        "open": open_cache,
        "teacher": make_teacher,
        "synthetic": make_synthetic,
    }
    if command[0] in own:
        own[command[0]](*command[1:])
    else:
        sys.argv = ["singer", *command]
        cli.main()


def list_images(spec: str, happened: Callable[[str, float], None]) -> None:
    """List the images of shards."""
    from pipeline.data import index_images

    happened("index", len(index_images(spec)))


def open_cache(place: str) -> None:
    """Open a cache and its index, and read a shuffled batch."""
    from pipeline.cache.reader import Cache
    from pipeline.data.sampler import EpochOrder

    cache = Cache(place)
    assert len(cache.index) == len(cache)
    cache.read(EpochOrder(len(cache), 0, 0).stretch(0, 256))


def make_teacher(folder: str) -> None:
    """Make a random teacher with an artifact."""
    import timm
    import torch

    from pipeline.models.backbone import Backbone, save_backbone

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=5, **TEACHER).eval()
    with torch.no_grad():
        model.pos_embed[0, 5, 3] += 60.0
    shutil.rmtree(folder, ignore_errors=True)
    backbone = Backbone(model, name, {"num_classes": 5, **TEACHER}, int(TEACHER["img_size"]), (0.5,) * 3, (0.5,) * 3)
    save_backbone(backbone, model.state_dict(), Path(folder))
    print(f"a teacher of {sum(p.numel() for p in model.parameters())} weights", flush=True)


def make_synthetic(folder: str, records: str) -> None:
    """Write a cache of one block; all its shards hold the same features."""
    from read_speed import synthetic_manifest, write_synthetic

    start = time.monotonic()
    record_bytes = TOKENS * WIDTH * 2
    manifest = synthetic_manifest("float16", TOKENS, WIDTH, int(records), shard_bytes=SHARD_RECORDS * record_bytes)
    write_synthetic(Path(folder), manifest)
    print(
        f"a cache of {records} records in {manifest.zarr_shards} shards: {time.monotonic() - start:.0f} s", flush=True
    )


def print_tables(work: Path) -> None:
    """Print the tables of all sizes in a folder."""
    sizes = sorted(int(f.name) for f in work.iterdir() if f.name.isdigit())
    if sizes:
        print_table({size: Legs(work / str(size) / "legs") for size in sizes[-2:]}, STAGES)
    for size in sizes:
        legs = Legs(work / str(size) / "legs")
        for stage in filter(legs.finished, KILLED):
            print(f"\n{size:,} images, {stage}: {twice(legs.of(stage), stage, size)}")
    for size in sorted(int(f.name.removeprefix("index-")) for f in work.glob("index-*")):
        print()
        print_table({size: Legs(work / f"index-{size}" / "legs")}, INDEX_STAGES)


def print_table(sizes: dict[int, Legs], stages: dict[str, str]) -> None:
    """Print a row for each stage: the sum over its legs, and the ratios of the larger to the smaller size."""
    names = ("s", "processor, s", "images/s", "peak, MB (own)", "open files", "s to the first batch")
    head = ["stage", *(f"{size:,}: {name}" for size in sizes for name in names)]
    if len(sizes) > 1:
        small, large = sizes
        head += [f"{large / small:.1f} times the images: {name}" for name in ("s", "processor", "peak (own)")]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for stage, event in stages.items():
        row, found = [stage], []
        for size, legs in sizes.items():
            of_stage = legs.of(stage)
            if not legs.finished(stage):
                row += [""] * len(names)
                continue
            seconds = sum(leg.seconds - leg.imported[0] for leg in of_stage)
            processor = sum(leg.processor - leg.imported[1] for leg in of_stage)
            memory, own, files = (max(getattr(leg, n) for leg in of_stage) for n in ("memory", "own", "files"))
            found.append((seconds, processor, memory, own))
            waits = [leg.events[event][0] - leg.imported[0] for leg in of_stage if event in leg.events]
            row += [f"{seconds:.1f}", f"{processor:.1f}", f"{size / seconds:.0f}", f"{memory:.0f} ({own:.0f})"]
            row += [f"{files}", ", ".join(f"{wait:.1f}" for wait in waits)]
        if len(found) == 2:
            time_, processor, memory, own = (b / a for a, b in zip(*found, strict=True))
            row += [f"{time_:.2f}", f"{processor:.2f}", f"{memory:.2f} ({own:.2f})"]
        elif len(sizes) > 1:
            row += [""] * 3
        print(f"| {' | '.join(row)} |")


def twice(legs: Sequence[Leg], stage: str, images: int) -> str:
    """Return, in words, how many images a stage did again after it was killed and resumed."""
    done = [int(leg.events.get(STAGES[stage], [0, 0, 0])[2]) for leg in legs]
    again = sum(done) - images
    ways = ", ".join(f"{n:,} ({leg.ended or 'interrupted'})" for n, leg in zip(done, legs, strict=True))
    return f"{ways}; {again:,} twice ({again / images:.2%})"


if __name__ == "__main__":
    main()
