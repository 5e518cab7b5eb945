"""The fault campaign: kills at random moments, mutated archives, flipped bits.

    python benchmarks/faults.py [--kills 100] [--mutations 200] [--flips 50] [--seed 0]

It shows that no record is lost or stored twice, and that all damage is found. It needs no weights, because it makes
random images and a random teacher in a temporary folder. Kills are SIGKILL to all processes of a caching run, or to one
of its ranks, at random moments; the next run, with another number of processes, continues with --resume. Every finished
cache must have the same bytes as an uninterrupted one.
"""

import argparse
import collections
import io
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import cli
from pipeline.config import load_config
from pipeline.data import index_images
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.runtime.logs import is_log
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.prepare import prepare
from pipeline.stages.verify import verify
from singer.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mutate import mutations
from validating import validate_images

IMAGES = 192
WORLDS = (1, 2, 3)
# Files that describe the run and not its result.
_OF_THE_RUN = ("provenance.json",)
SETS = (
    "teacher.image_size=64",
    "cache.blocks=[1,3]",
    "cache.codec=int4",
    "cache.batch_size=4",
    "cache.workers=1",
    "cache.shard_mb=1",
    "views.kind=random-resized-crop",
    "views.pixels=jpeg",
)


def main() -> None:
    """Parse the options and run the three campaigns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--mutations", type=int, default=200)
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Accelerate would choose another number for several processes, and sums in another order round differently.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_world(root)
        print(f"seed {options.seed}", flush=True)
        kill_campaign(root, options.kills, random.Random(options.seed))
        mutation_campaign(root, options.mutations, options.seed)
        flip_campaign(root, options.flips, random.Random(options.seed))


def build_world(root: Path) -> None:
    """Make images in shards, and a teacher with a forward pass that takes long enough to be killed in."""
    args = {"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 8, "img_size": 64, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    backbone = Backbone(model, "vit_tiny_patch16_224", args, 64, (0.5,) * 3, (0.5,) * 3)
    save_backbone(backbone, model.state_dict(), root / "teacher")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = root / "images" / f"class{number % 4}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)).save(place)
    prepare(load_config(sets=["prepare.shard_images=50"]), root / "images", root / "train")


def settings(root: Path) -> list[str]:
    """Return the settings of all runs, as --set takes them."""
    return [f"teacher.name=local-dir:{root / 'teacher'}", *SETS]


def kill_campaign(root: Path, kills: int, rng: random.Random) -> None:
    """Kill and resume caching runs, and check that every finished cache equals an uninterrupted one.

    Print at which moments the runs were killed.
    """
    from pipeline.cache import create

    create.MAX_SHARD_RECORDS = 4
    whole = root / "whole"
    start = time.monotonic()
    run_processes(root, whole, 1, [])
    alone = time.monotonic() - start
    a_shard = alone / (IMAGES // 4)
    expected = contents(whole)
    fell: collections.Counter[str] = collections.Counter()
    finished, done, caches = 0, 0, 0
    while done < kills:
        out = root / f"killed-{caches}"
        caches += 1
        while not finished_at(out) and done < kills:
            world = rng.choice(WORLDS)
            extra = ["--resume"] if out.exists() else []
            before = shards_done(out)
            # Some kills come while a run starts and indexes its images; most come after some more shards are done.
            early = rng.random() < 0.15
            more = 0 if early else rng.randrange(1, 12)
            delay = rng.uniform(0, alone if early else 2 * a_shard)
            victim = rng.randrange(world) if rng.random() < 0.3 else None
            killed = run_processes(root, out, world, extra, Kill(before + more, delay, victim))
            if not killed:
                fell["after the end (not counted)"] += 1
                continue
            done += 1
            after = shards_done(out)
            if not (out / "manifest.json").exists():
                fell["before the manifest"] += 1
            else:
                fell["while shards were written" if after > before else "before another shard was done"] += 1
        run_processes(root, out, rng.choice(WORLDS), ["--resume"])
        found = contents(out)
        different = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
        assert not different, f"cache {out} differs from an uninterrupted one in {different[:5]}"
        finished += 1
    print(f"kills: {done}, on {caches} caches; each of the {finished} finished ones equals the uninterrupted one")
    for where, count in fell.most_common():
        print(f"  {where}: {count}")
    sys.stdout.flush()


@dataclass(frozen=True)
class Kill:
    """A kill, `delay` seconds after the journal has `shards` entries, of one rank or, if `rank` is None, of all."""

    shards: int
    delay: float
    rank: int | None


def run_processes(root: Path, out: Path, world: int, extra: list[str], kill: Kill | None = None) -> bool:
    """Do a caching run with `world` processes, and return whether it was killed before its end.

    The processes are forked from this one, which has imported everything, so that imports take no time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [fork(rank, world, port, root, out, extra) for rank in range(world)]
    victims = processes if kill is None or kill.rank is None else [processes[kill.rank]]
    deadline: float | None = None
    running = set(processes)
    failed = False
    while running:
        for process in list(running):
            pid, status = os.waitpid(process, os.WNOHANG)
            if pid:
                running.discard(process)
                failed |= status != 0
        if kill is not None and deadline is None and shards_done(out) >= kill.shards:
            deadline = time.monotonic() + kill.delay
        if deadline is not None and time.monotonic() > deadline and running:
            for process in running & set(victims):
                os.kill(process, signal.SIGKILL)
            # The other ranks wait for the lost one, or fail; a launcher would stop them, too.
            deadline, victims = time.monotonic() + 1, processes
            failed = True
        time.sleep(0.005)
    if kill is None:
        assert not failed, f"a run into {out} failed"
    return failed


def fork(rank: int, world: int, port: int, root: Path, out: Path, extra: list[str]) -> int:
    """Start one rank of a caching run in a forked process, and return the process."""
    process = os.fork()
    if process:
        return process
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if extra != ["--loud"]:
        os.dup2(quiet, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sets = [f"--set={s}" for s in settings(root)]
    sys.argv = ["singer", "cache-teacher", f"--shards={root / 'train' / '*.tar'}", f"--out={out}", *sets, *extra]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        code = 1
    os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Return {name: bytes} of the files of a cache, without those that describe the run."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in _OF_THE_RUN and not is_log(f.name))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def shards_done(out: Path) -> int:
    """Return how many shards the journal of a cache lists."""
    return len(list((out / "journal").glob("*.json")))


def finished_at(out: Path) -> bool:
    """Return whether a cache has all its shards."""
    return shards_done(out) == IMAGES // 4


def mutation_campaign(root: Path, count: int, seed: int) -> None:
    """Index mutated archives, and check that every lost image is listed; print what happened to them."""
    shard = sorted((root / "train").glob("*.tar"))[0]
    images = index_images(str(shard))
    original = dict(zip(images.keys, validate_images(images, 1, "skip").found["digest"].tolist(), strict=True))
    results: collections.Counter[str] = collections.Counter()
    for what, data in mutations(shard.read_bytes(), count, seed):
        mutated = root / "mutated.tar"
        mutated.write_bytes(data)
        try:
            found = validate_images(index_images(str(mutated), "skip"), 1, "skip")
        except UserError:
            results["refused as a whole, by name"] += 1
            continue
        kept = dict(zip(found.images.keys, found.found["digest"].tolist(), strict=True))
        lost = original.keys() - kept.keys()
        listed = bool(found.images.skipped or found.unreadable)
        named = lost and not listed and any(key.encode() in data for key in lost)
        # An image cannot be listed if its name is in no header any more: it was removed or renamed.
        assert not named, f"{what}: {sorted(lost)[:3]} are lost, and nothing is listed"
        if listed:
            results["defects listed, the rest kept"] += 1
        else:
            results["whole" if not lost else "no trace of a name left in the archive"] += 1
    print(f"mutated archives: {count}; there was no other exception, and every loss was listed")
    for where, number in results.most_common():
        print(f"  {where}: {number}")
    sys.stdout.flush()


def flip_campaign(root: Path, count: int, rng: random.Random) -> None:
    """Flip single bits of a cache, and check that verify finds each of them."""
    config = load_config(sets=settings(root))
    cache = root / "flipped"
    cache_teacher(config, str(root / "train" / "*.tar"), cache)
    more = load_config(sets=[*settings(root), "cache.blocks=[0]"])
    cache_teacher(more, str(root / "train" / "*.tar"), cache, "append")
    files = [f for f in sorted(cache.rglob("*")) if f.is_file() and not is_log(f.name)]
    weights = [f.stat().st_size for f in files]
    missed = []
    sys.stderr = io.StringIO()
    for number in range(count):
        # Half of the flips choose a byte of the cache, half choose a file: most bytes are features.
        file = rng.choices(files, weights)[0] if number % 2 else rng.choice(files)
        exact = file.read_bytes()
        place, bit = rng.randrange(len(exact)), rng.randrange(8)
        file.write_bytes(exact[:place] + bytes([exact[place] ^ 1 << bit]) + exact[place + 1 :])
        try:
            found = not verify(config, cache).whole
        except UserError:
            found = True
        if not found:
            missed.append(f"{file.relative_to(cache)} byte {place} bit {bit}")
        file.write_bytes(exact)
    sys.stderr = sys.__stderr__
    assert verify(config, cache).whole
    print(f"flipped bits: {count}, found: {count - len(missed)}")
    for where in missed:
        print(f"  missed: {where}")
    assert not missed


if __name__ == "__main__":
    main()
