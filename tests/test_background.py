"""Work that follows in a thread: in order, one call at a time, and no error is lost."""

import threading
import time

import pytest
import torch

from pipeline.runtime.background import BackgroundWorker


def test_calls_come_in_order_and_one_at_a_time() -> None:
    done: list[int] = []
    busy = threading.Lock()

    def run(number: int) -> None:
        assert busy.acquire(blocking=False)
        time.sleep(0.002)
        done.append(number)
        busy.release()

    with BackgroundWorker(run, "test") as worker:
        for number in range(20):
            worker(number)
            # Of two calls, the first has ended once the second is accepted.
            assert done[:number] == list(range(number)) and len(done) <= number + 1
    assert done == list(range(20))


def test_the_caller_goes_on_meanwhile() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        assert go_on.wait(30)

    with BackgroundWorker(run, "test") as worker:
        worker()
        assert begun.wait(30)
        go_on.set()


@pytest.mark.parametrize("calls", [1, 2])
def test_an_error_is_raised_by_the_next_call_or_at_the_end(calls: int) -> None:
    done: list[int] = []

    def run(number: int) -> None:
        if number == 0:
            raise OSError("no room")
        done.append(number)

    with pytest.raises(OSError, match="no room"), BackgroundWorker(run, "test") as worker:
        for number in range(calls):
            worker(number)
    assert done == []


def test_the_callers_error_comes_first_and_waits_for_what_is_under_way() -> None:
    done: list[int] = []

    def run(number: int) -> None:
        time.sleep(0.05)
        done.append(number)
        raise OSError("no room")

    with pytest.raises(KeyError, match="mine"), BackgroundWorker(run, "test") as worker:
        worker(1)
        raise KeyError("mine")
    assert done == [1]


def test_only_its_own_thread_computes_alone() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with BackgroundWorker(lambda: seen.append(torch.get_num_threads()), "test") as worker:
            worker()
            assert torch.get_num_threads() == 3
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]
