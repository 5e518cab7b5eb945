"""A cache in an object store: every stage gives what it gives with a local one, whatever happens on the way."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEPTH, WIDTH, seeded, tree_bytes, use_server, world_config
from stores import Server, file_limit, give_up_soon, raw

import cli
from pipeline.cache import Cache
from pipeline.cache.format import JOURNAL
from pipeline.cache.info import cache_info
from pipeline.cache.writer import write_zarr_shard as real_write_zarr_shard
from pipeline.config import load_config
from pipeline.runtime.logs import is_log
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.stages.verify import verify
from pipeline.storage import Store, locks, open_store
from singer.errors import UserError

CPU = torch.device("cpu")
SHARD = "features/2/values/c/1/0/0"
# Ragged parts, views of several kinds of place, and shards of which the last is shorter.
CODECS = {
    "float16": ("cache.codec=float16",),
    "int4": ("cache.codec=int4", "views.flip=true", "views.pixels=jpeg"),
}


@pytest.fixture(scope="module", autouse=True)
def environment(server: Server) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_server(server, patch)
        patch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 30)
        yield


def fill(world: Path, out: Path | str, mode: str = "new", *sets: str) -> Path | str:
    config = world_config(world, *sets)
    return cache_teacher(config, str(world / "train" / "*.tar"), out, mode).cache  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def caches(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """{codec: (local cache, remote cache)} of the same settings; tests only read them."""
    root = tmp_path_factory.mktemp("caches")
    made = {}
    for codec, sets in CODECS.items():
        made[codec] = root / codec, f"s3://bucket/{codec}"
        for place in made[codec]:
            fill(world, place, "new", *sets)
    return made


def objects(place: Path | str, *leave_out: str) -> dict[str, bytes]:
    """Everything there with its content, provenance and logs aside, as others than singer see it."""
    hidden = ("provenance.json", *leave_out)
    if isinstance(place, Path):
        return tree_bytes(place, *hidden)
    client = raw(place)
    names = [entry["path"] for entry in client.list().collect()]
    return {
        n: bytes(client.get(n).bytes()) for n in sorted(names) if not is_log(n) and n.rpartition("/")[2] not in hidden
    }


def copied(place: str, to: str) -> str:
    """A copy of a remote cache that a test may spoil."""
    for name, data in (objects(place) | {"provenance.json": open_store(place).read("provenance.json")}).items():
        raw(to).put(name, data)
    return to


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_objects(caches: dict[str, tuple[Path, str]], codec: str) -> None:
    local, remote = caches[codec]
    assert objects(remote) == objects(local)
    assert len([n for n in objects(remote) if n.startswith(JOURNAL)]) == 4
    assert verify(load_config(), remote).whole
    found, expected = cache_info(remote), cache_info(local)
    assert found.teachers == expected.teachers and found.teachers[0].missing == 0
    assert found.bytes == sum(open_store(remote).sizes().values())


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_records(caches: dict[str, tuple[Path, str]], codec: str) -> None:
    local, remote = (Cache(place) for place in caches[codec])
    assert remote.id == local.id and len(remote) == 100
    for records in (np.random.default_rng(seeded(0)).permutation(100), np.array([99, 0, 0, 41]), np.array([7])):
        features = local.features(records, CPU)
        for block, x in remote.features(records, CPU).items():
            assert torch.equal(x, features[block])
        if codec == "int4":
            assert torch.equal(remote.pixels(records, 16), local.pixels(records, 16))
    expected = local.suffix().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in remote.suffix().state_dict().items())


def test_what_is_there_is_not_overwritten_by_accident(world: Path, caches: dict[str, tuple[Path, str]]) -> None:
    remote = caches["float16"][1]
    before = objects(remote)
    with pytest.raises(UserError, match=rf"{remote} exists; continue it with --resume, replace it with --overwrite"):
        fill(world, remote)
    with pytest.raises(UserError, match=r"started with cache\.codec float16, not int8"):
        fill(world, remote, "resume", "cache.codec=int8")
    with pytest.raises(UserError, match=r"s3://bucket/nothing does not exist"):
        fill(world, "s3://bucket/nothing", "append")
    raw("s3://bucket/strange").put("diary.txt", b"dear")
    for mode in ("resume", "overwrite"):
        with pytest.raises(UserError, match="was not written by singer and is left alone"):
            fill(world, "s3://bucket/strange", mode)
    assert objects(remote) == before and objects("s3://bucket/strange") == {"diary.txt": b"dear"}


def test_resume(world: Path, caches: dict[str, tuple[Path, str]], server: Server) -> None:
    """Lost journal entries, lost and torn shards are made anew, and no others."""
    place = copied(caches["float16"][1], "s3://bucket/resumed")
    raw(place).delete([f"{JOURNAL}/000001.json", "features/3/values/c/3/0/0"])
    raw(place).put(SHARD, b"torn")
    with pytest.raises(UserError, match="is incomplete: 2 of 4 Zarr shards are missing; repeat .* with --resume"):
        Cache(place)
    assert cache_info(place).teachers[0].missing == 2
    whole, kept = ([server.requests("PUT", f"resumed/features/./values/c/{n}") for n in m] for m in ((1, 3), (0, 2)))
    assert fill(world, place, "resume") == place
    assert objects(place) == objects(caches["float16"][0])
    assert [
        server.requests("PUT", f"resumed/features/./values/c/{n}") - w for n, w in zip((1, 3), whole, strict=True)
    ] == [2, 2]
    assert [server.requests("PUT", f"resumed/features/./values/c/{n}") for n in (0, 2)] == kept


@pytest.mark.slow
def test_a_broken_run_is_resumed(
    world: Path, caches: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has left some of the shards, and a lock that nobody renews."""
    place = "s3://bucket/broken"

    def write(store: Store, manifest: object, shard: int, *values: object) -> None:
        if shard == 2:
            raise OSError("the network is gone")
        real_write_zarr_shard(store, manifest, shard, *values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the network is gone"):
        patch.setattr("pipeline.cache.background_writer.write_zarr_shard", write)
        fill(world, place)
    left = objects(place)
    assert "writer.lock" in left
    assert [n for n in left if n.startswith(JOURNAL)] == [f"{JOURNAL}/{shard:06d}.json" for shard in (0, 1)]
    start = time.monotonic()
    fill(world, place, "resume")
    assert time.monotonic() - start > locks.SECONDS
    assert objects(place) == objects(caches["float16"][0])


def test_overwrite(world: Path, caches: dict[str, tuple[Path, str]]) -> None:
    """Also of what an interrupted --overwrite has left."""
    place = copied(caches["int4"][1], "s3://bucket/overwritten")
    raw(place).put("parts/001/manifest.json", b"{}")
    fill(world, place, "overwrite")
    assert objects(place) == objects(caches["float16"][0])
    raw(place).delete([n for n in objects(place) if n != SHARD])
    assert set(open_store(place).sizes()) == {SHARD, "provenance.json"}
    fill(world, place, "overwrite")
    assert objects(place) == objects(caches["float16"][0])


@pytest.mark.slow
def test_append(world: Path, caches: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    places: tuple[Path | str, ...] = (tmp_path / "grown", copied(caches["int4"][1], "s3://bucket/grown"))
    fill(world, places[0], "new", *CODECS["int4"])
    for place in places:
        fill(world, place, "append", *CODECS["int4"], "cache.blocks=[1]", "views.count=2")
    local, remote = (Cache(place) for place in places)
    assert objects(places[1]) == objects(places[0]) and remote.ids == local.ids and len(remote.ids) > 1
    assert remote.blocks == (1, 2, 3) and len(remote) == 200
    records = np.random.default_rng(seeded(0)).permutation(200)
    expected = local.features(records, CPU)
    assert all(torch.equal(x, expected[b]) for b, x in remote.features(records, CPU).items())
    assert torch.equal(remote.pixels(records, 16), local.pixels(records, 16))


@pytest.mark.slow
def test_a_second_writer_is_refused(world: Path, caches: dict[str, tuple[Path, str]]) -> None:
    place = copied(caches["float16"][1], "s3://bucket/held")
    with open_store(place).lock():
        for mode in ("resume", "overwrite"):
            with pytest.raises(UserError, match="s3://bucket/held is being written by another run"):
                fill(world, place, mode)
        # Readers do not mind.
        assert len(Cache(place)) == 100 and verify(load_config(), place).whole
        assert cache_info(place).bytes == sum(open_store(place).sizes().values())
    assert objects(place) == objects(caches["float16"][0])


def test_who_loses_the_lock_writes_no_more(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "s3://bucket/lost"

    def write(store: Store, *args: object) -> None:
        real_write_zarr_shard(store, *args)  # type: ignore[arg-type]
        raw(place).put("writer.lock", b"other process 8\ntoken 1")
        while not locks.held[place].lost:
            time.sleep(0.01)

    monkeypatch.setattr("pipeline.cache.background_writer.write_zarr_shard", write)
    with pytest.raises(UserError, match=f"{place} has been taken over by another run"):
        fill(world, place)
    assert [n for n in objects(place) if n.startswith(JOURNAL)] == [f"{JOURNAL}/000000.json"]
    assert objects(place)["writer.lock"].startswith(b"other")


def shard_requests(server: Server, name: str) -> int:
    return server.requests("GET", f"{name}/[^ ]*/c/")


def test_refine_and_distill(world: Path, caches: dict[str, tuple[Path, str]], server: Server, tmp_path: Path) -> None:
    """From a local cache, from a remote one, and from copies of its shards, made once."""
    local, remote = caches["int4"]
    sets = ["refine.steps=5", "distill.epochs=1", f"student.dim={WIDTH}", f"student.depth={DEPTH}"]
    copy = tmp_path / "copy"
    found = []
    for name, place, more in (("a", local, []), ("b", remote, []), ("c", remote, [copy]), ("d", remote, [copy])):
        config = world_config(world, *sets, *(f"{s}.local_copy={c}" for s in ("refine", "distill") for c in more))
        before = shard_requests(server, "int4")
        refine(config, place, tmp_path / f"{name}-adapters")
        result = distill(config, place, tmp_path / name, tmp_path / f"{name}-adapters")
        requests = shard_requests(server, "int4") - before
        refiner = (tmp_path / f"{name}-adapters" / "refiner.safetensors").read_bytes()
        found.append((refiner, (result.student / "model.safetensors").read_bytes(), result.loss, requests))
    assert len({f[:3] for f in found}) == 1
    shards = [n for n in objects(remote) if "/c/" in n and not n.startswith("views/")]
    # An object is read whole at once, if it is small.
    assert found[0][3] == found[3][3] == 0 and found[2][3] == len(shards) < found[1][3]
    assert sorted(f.stat().st_size for f in copy.rglob("*") if f.is_file()) == sorted(
        len(d) for n, d in objects(remote).items() if n in shards
    )


def test_a_damaged_shard_is_not_copied(world: Path, caches: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    place = copied(caches["float16"][1], "s3://bucket/damaged")
    data = bytearray(open_store(place).read(SHARD))
    data[100] ^= 1
    raw(place).put(SHARD, bytes(data))
    with pytest.raises(UserError, match=f"{place}/{SHARD} does not match its checksum; run singer cache verify"):
        Cache(place, local_copy=tmp_path / "copy").read(np.arange(100))
    assert not [f for f in (tmp_path / "copy").rglob("*") if f.name.endswith(".singer-tmp")]
    assert verify(load_config(), place).parts[0].damaged == [1]
    repaired = verify(world_config(world), place, repair=True)
    assert repaired.whole and repaired.parts[0].repaired == [1]
    assert objects(place) == objects(caches["float16"][0])
    expected = Cache(caches["float16"][0]).features(np.arange(100), CPU)
    again = Cache(place, local_copy=tmp_path / "copy").features(np.arange(100), CPU)
    assert all(torch.equal(x, expected[b]) for b, x in again.items())


def singer(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line; its exit code."""
    monkeypatch.setattr("sys.argv", ["singer", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_command_line(
    world: Path,
    config_file: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make = ["cache-teacher", "--config", config_file, "--shards", world / "train" / "*.tar", "--out"]
    assert singer(monkeypatch, *make, "s3://bucket/with space", "--codec", "int8", "--json") == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["cache"] == "s3://bucket/with space" and result["records"] == 100 and result["codec"] == "int8"
    assert singer(monkeypatch, "cache", "info", "s3://bucket/with space", "--json") == 0
    assert json.loads(capfd.readouterr().out)["bytes"] == result["bytes"]
    for arguments, message in (
        ([*make, "s3://bucket/with space"], "error: s3://bucket/with space exists; continue it"),
        ([*make, "s3://nowhere/x"], "error: s3://nowhere/x: The specified bucket does not exist; check the URL"),
        ([*make, "ftp://bucket/x"], "error: ftp://bucket/x: ftp:// is of no known kind; give a folder, or a URL s3://"),
        (["cache", "info", "s3://nowhere/x"], "error: s3://nowhere/x/manifest.json: The specified bucket does not"),
        (["cache", "info", "s3://bucket/x"], "error: s3://bucket/x is not a feature cache: it has no manifest.json"),
        (["refine", "--cache", world / "cache", "--out", "s3://bucket/x"], "error: --out s3:/bucket/x: only a cache"),
    ):
        assert singer(monkeypatch, *arguments) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(message)
    give_up_soon(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert singer(monkeypatch, "cache", "info", "s3://bucket/with space") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "http://127.0.0.1:9 does not answer as it should" in line


def test_a_full_disk(
    world: Path,
    config_file: Path,
    caches: dict[str, tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line; the shard is not journalled; --resume ends with the same bytes."""

    def write(store: Store, manifest: object, shard: int, *values: object) -> None:
        with file_limit(10_000 if shard == 2 else 10**9):
            real_write_zarr_shard(store, manifest, shard, *values)  # type: ignore[arg-type]

    out = tmp_path / "full"
    make = ["cache-teacher", "--config", config_file, "--shards", world / "train" / "*.tar", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.background_writer.write_zarr_shard", write)
        assert singer(patch, *make) == 2
    error = capfd.readouterr().err.splitlines()
    assert error == [f"error: File too large ({out}/features/2/values/c/2/0/0)"]
    assert sorted(f.name for f in (out / JOURNAL).iterdir()) == ["000000.json", "000001.json"]
    assert not [n for n in tree_bytes(out) if "singer-tmp" in n]
    assert singer(monkeypatch, *make, "--resume") == 0
    assert objects(out) == objects(caches["float16"][0])
