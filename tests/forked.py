"""Processes forked from one that has imported everything: imports would take longer than what is tested."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event

# A process has one fork server and one list of what it imports first, which the last caller sets: all tests use this.
_server = get_context("forkserver")
_server.set_forkserver_preload([
    *("pipeline.stages.cache_teacher", "pipeline.stages.refine", "pipeline.stages.distill", "pipeline.planning.pilot"),
    *("cli", "scipy.optimize", "pytest", "hypothesis"),  # a process imports the module of the test, too
])  # fmt: skip


def forked(target: Callable[..., None], *args: object, daemon: bool = True) -> ForkServerProcess:
    """A process that runs a function of a module, not yet started.

    daemon: it is killed when this process ends, and may have no processes of its own.
    """
    return _server.Process(target=target, args=args, daemon=daemon)


def event() -> Event:
    """An event to be shared with such a process."""
    return _server.Event()
