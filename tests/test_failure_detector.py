"""Which ranks have failed, from their reports alone: no processes, no clocks."""

from pipeline.runtime.failure_detector import FailureDetector
from pipeline.runtime.rank_messages import Status

LIMIT = 10.0


def reported(rank: int, **values: object) -> Status:
    return Status(**({"rank": rank, "host": f"host{rank}", "patience": LIMIT} | values))  # type: ignore[arg-type]


def detector(*statuses: Status, now: float = 0.0) -> FailureDetector:
    found = FailureDetector(LIMIT)
    for status in statuses:
        found.hear(status, now)
    return found


def test_a_lost_connection_is_a_death_unless_the_rank_is_done() -> None:
    others = detector(reported(1), reported(2, state="done"))
    assert others.departure([], 1.0) is None
    failed = others.departure([1, 2], 1.0)
    assert failed is not None and [s.rank for s in failed[0]] == [1] and failed[1] == "is dead"


def test_silence_beyond_the_limit() -> None:
    others = detector(reported(1))
    assert others.departure([], LIMIT) is None
    failed = others.departure([], LIMIT + 1)
    assert failed is not None and failed[1] == "has not answered for 11 s"


def test_a_rank_that_reports_its_end_may_print_why_first() -> None:
    for state, ended, grace in (("failed", [1], 2.0), ("failed", [], 10.0), ("terminated", [], 2.0)):
        others = detector(reported(1, state=state))
        assert others.departure(ended, 5.0) is None and others.departure(ended, 5.0 + grace) is None
        assert others.departure(ended, 5.1 + grace) is not None


def test_a_rank_that_works_alone_is_found_before_those_that_wait() -> None:
    waiting = reported(0, joined=True, age=99.0)
    failed = detector(reported(1, age=11.0, where="step 3")).delay(waiting, 0, 0.0)
    assert failed is not None and [s.where for s in failed[0]] == ["step 3"]
    assert detector(reported(1, age=9.0)).delay(waiting, 0, 0.0) is None
    assert detector(reported(1, age=9.0)).delay(waiting, 0, 2.0) is not None  # the report itself is old


def test_if_all_wait_those_that_came_least_far_are_found() -> None:
    own = reported(0, joined=True, age=11.0, count=5)
    late = detector(reported(1, joined=True, age=12.0, count=4), reported(2, joined=True, age=13.0, count=5))
    failed = late.delay(own, 0, 0.0)
    assert failed is not None and [s.rank for s in failed[0]] == [1] and "for 11 s" in failed[1]
    # A rank at the barrier waits; the one outside is late, though it counts more reports.
    at_barrier = reported(0, joined=True, age=11.0, count=1, barrier=1)
    failed = detector(reported(1, joined=True, age=12.0, count=4)).delay(at_barrier, 0, 0.0)
    assert failed is not None and [s.rank for s in failed[0]] == [1]


def test_a_barrier_that_all_have_reached_is_about_to_open() -> None:
    own, other = (reported(n, joined=True, age=99.0, barrier=1) for n in (0, 1))
    assert detector(other).delay(own, 0, 0.0) is None and detector(other).delay(own, 1, 0.0) is not None
