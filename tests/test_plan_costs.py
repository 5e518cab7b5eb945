"""The costs of a plan: what follows from rates, what is refused, and what is left on the disk."""

import signal
import time
from collections.abc import Generator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from conftest import SIZE, shards
from forked import event, forked

from pipeline.config import Config
from pipeline.data import ImageFile, list_images
from pipeline.planning.disk import sustained
from pipeline.planning.hours import Work, break_even, break_even_text, cached_hours, caching_hours, online_hours
from pipeline.planning.plan import judge, plan
from pipeline.planning.rates import Rate, bottleneck, rate_of
from pipeline.planning.sample import Sample
from pipeline.planning.scratch import SCRATCH, scratch
from pipeline.planning.speeds import Speeds, no_speeds
from pipeline.storage import open_store
from singer.errors import UserError


def at(per_second: float) -> Rate:
    return Rate(per_second, 0.0, "measured")


def test_break_even_of_4_views_and_2_epochs_is_1() -> None:
    """900 images in 4 views are 3,600 records. Cached at 10 a second: 360 s. A student sees 2 x 3,600 = 7,200 of them.

    Online at 8 a second, that takes 900 s; from the cache at 40 a second, 180 s. 360 + 180 = 540 <= 900.
    """
    work = Work(images=900, views=4, epochs=2)
    assert (work.records, work.samples) == (3600, 7200)
    caching = caching_hours(work, at(10), 0.0)
    cached = cached_hours(work, at(40), at(1000), in_memory=False)
    online = online_hours(work, at(8))
    assert (caching, cached, online) == (pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.25))
    assert break_even(caching, cached, online) == 1
    # On a disk that takes only 1 record a second, caching takes 3,600 s: 1 + 0.05 n <= 0.25 n from n = 5 on.
    slow = caching_hours(work, at(1), 0.0)
    assert break_even(slow, cached, online) == 5
    assert break_even_text(slow, cached, online) == "the cache pays off from student 5 on"


def test_setup_counts_once_and_the_disk_in_every_pass_that_does_not_fit_memory() -> None:
    work = Work(images=3600, views=1, epochs=10)
    assert caching_hours(work, at(10), 360.0) == pytest.approx(0.2)
    # Read at 2 a second: half an hour a pass; trained at 4: a quarter.
    assert cached_hours(work, at(4), at(2), in_memory=False) == pytest.approx(10 * 0.5)
    assert cached_hours(work, at(4), at(2), in_memory=True) == pytest.approx(0.5 + 9 * 0.25)


def test_a_cache_that_never_pays_off_is_said_not_to() -> None:
    assert break_even(1.0, 2.0, 2.0) is None
    assert "never pays off" in break_even_text(1.0, 2.0, 2.0)
    assert break_even(None, 1.0, 2.0) is None and break_even_text(None, 1.0, 2.0) == "not measured"


def test_the_bottleneck_is_the_slowest_stage_or_what_they_share() -> None:
    stages = {"decoding": at(300.0), "teacher": at(434.0), "writing": at(19.0)}
    assert bottleneck(stages, at(19.0)) == "writing"
    busy = {"decoding": at(100.0), "teacher": at(110.0)}
    assert bottleneck(busy, at(55.0)) == "the cores that decoding and teacher share"
    assert bottleneck(stages | {"encoding": Rate(None, None, "not measured")}, at(19.0)) is None


def speeds(**caching: Rate) -> Speeds:
    parts = {name: at(434.0) for name in ("images", "decoding", "teacher", "encoding", "writing", "caching")}
    names = ("reading", "student images", "student", "cached", "online")
    training = {name: at(rate) for name, rate in zip(names, (2000.0, 900.0, 100.0, 97.0, 51.4), strict=True)}
    return Speeds({**parts, **caching}, training, "neighbour, standardize", 0.0, 10**9)


def test_a_slow_disk_sets_the_pace_of_caching() -> None:
    """What others planned at 434 images a second and got 19."""
    judged = judge(Work(241_000, 1, 1), speeds(writing=at(19.0)), cache_bytes=10**9)
    assert judged["images_per_second"] == 19.0 and judged["caching_bottleneck"] == "writing"
    assert judged["hours"] == pytest.approx(241_000 / 19 / 3600)
    assert judged["training_bottleneck"] == "student"
    one, five, twenty = judged["students"]
    assert twenty.online_hours == pytest.approx(20 * 241_000 / 51.4 / 3600)
    assert five.cached_hours - one.cached_hours == pytest.approx(4 * 241_000 / 97 / 3600)


@pytest.mark.parametrize("missing", ["images", "writing", "caching"])
def test_nothing_is_promised_of_what_was_not_measured(missing: str) -> None:
    judged = judge(Work(100, 1, 1), speeds(**{missing: Rate(None, None, "not measured: no --out")}), cache_bytes=1)
    assert judged["hours"] is None and judged["images_per_second"] is None and judged["caching_bottleneck"] is None
    assert judged["break_even_students"] is None and judged["break_even_text"] == "not measured"
    assert [s.cached_hours for s in judged["students"]] == [None] * 3
    assert all(s.online_hours is not None for s in judged["students"])
    stage = next(s for s in judged["stages"] if s.stage == missing)
    assert stage.per_second is None and stage.status == "not measured: no --out"


def test_repeats_that_differ_too_much_are_no_measurement() -> None:
    assert Rate.of([(10, 1.0), (12, 1.0)]).per_second == pytest.approx(11)
    assert Rate.of([(10, 1.0), (12, 1.0)]).spread == pytest.approx(1 / 11)
    wide = Rate.of([(10, 1.0), (30, 1.0)])
    assert wide.per_second is None and wide.spread == pytest.approx(0.5) and "repeats differ by ±50%" in wide.status
    assert Rate.of([(10, 1.0)]).per_second is None


def test_a_disk_is_as_fast_as_its_second_half() -> None:
    quick, slow = (1e9, 1.0), (1e9, 10.0)
    assert sustained([quick] * 8, whole=10**12).per_second == pytest.approx(1e9)
    assert "on the first 8 of 1e+03 GB" in sustained([quick] * 8, whole=10**12).status
    falling = sustained([quick] * 4 + [slow] * 4, whole=10**12)
    assert falling.per_second is None and "still slowing down after 8 GB" in falling.status
    # All that the cache has was written: then that is how it is.
    assert sustained([quick] * 4 + [slow] * 4, whole=8 * 10**9).per_second == pytest.approx(1e8)


def test_a_generator_is_closed_after_it_was_measured() -> None:
    closed = []

    def steps() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    rate_of(steps(), 0.0)
    assert closed == [True]


def test_scratch_is_removed_after_errors_and_leftovers_are_removed(tmp_path: Path) -> None:
    left = tmp_path / SCRATCH
    left.mkdir()
    (left / "half").write_bytes(b"of a plan that was killed")
    with pytest.raises(ZeroDivisionError), scratch(tmp_path / "a" / "cache") as place:
        assert place == left and not left.exists()
        open_store(place).write("written/0", b"x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with (
        scratch(tmp_path / "cache"),
        pytest.raises(UserError, match="being written by another run"),
        scratch(tmp_path / "cache"),
    ):
        pass


def use_scratch(out: Path, ready: Event) -> None:
    with scratch(out) as place:
        place.mkdir()
        (place / "some").write_bytes(b"1")
        ready.set()
        time.sleep(600)


def test_scratch_is_removed_by_a_signal(tmp_path: Path) -> None:
    ready = event()
    process = forked(use_scratch, tmp_path / "cache", ready)
    process.start()
    assert ready.wait(200) and (tmp_path / SCRATCH / "some").exists()
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_fails_leaves_nothing(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        assert any((tmp_path / SCRATCH).rglob("manifest.json"))
        raise OSError("the disk is gone")

    monkeypatch.setattr("pipeline.planning.plan.measure_speeds", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        plan(config, str(world / "train" / "*.tar"), tmp_path / "cache", 0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(world: Path, config: Config) -> None:
    images = list_images(config, shards(world))
    with ImageFile(images) as files, pytest.raises(OSError, match="No space left on device") as caught:
        Sample(config, images, files, SIZE).write_tar(Path("/dev/full"), range(len(images)))
    assert caught.value.filename == "/dev/full"


def test_without_an_output_and_without_seconds_no_hours_are_promised(world: Path, config: Config) -> None:
    result = plan(config, str(world / "train" / "*.tar"), None, 0)
    assert result.hours is None and result.break_even_students is None and result.written_bytes == 0
    assert {s.status for s in result.stages} == {"not measured: --seconds 0"}
    assert result.stages and no_speeds("x").caching


def test_every_stage_is_measured_where_the_cache_will_be(world: Path, config: Config, tmp_path: Path) -> None:
    """The figures are luck here, so only that there is a repeat of each, and that nothing stays."""
    result = plan(config, str(world / "train" / "*.tar"), tmp_path / "cache", 0.05)
    assert [s.stage for s in result.stages] == [
        "images", "decoding", "teacher", "encoding", "writing", "caching",
        "reading", "student images", "student", "cached", "online",
    ]  # fmt: skip
    assert all(s.spread_percent is not None for s in result.stages if s.stage != "writing")
    assert result.written_bytes > 0 and result.targets == "adapter, standardize"
    assert list(tmp_path.iterdir()) == []
