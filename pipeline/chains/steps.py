"""The steps of a chain, in one folder: each is done once, and a chain that was interrupted goes on at its step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipeline.config import Config
from pipeline.outputs.chain_folder import STEPS
from pipeline.outputs.folder import Mode, claimed_output
from pipeline.outputs.resuming import RESULT_SECTIONS
from pipeline.outputs.stage_log import process_log
from pipeline.runtime.devices import this_process
from pipeline.runtime.progress import say
from pipeline.runtime.watched_rank import wait_for_all, watched
from pipeline.storage.json_files import read_json, write_json
from singer.errors import UserError


class Steps:
    """The steps of a chain below the folder `out`. They are numbered up to `total`."""

    def __init__(self, out: Path, mode: Mode, total: int, process: PartialState) -> None:
        self.out, self.process, self._mode = out, process, mode
        self._number, self.total = 0, total
        self._done: dict[str, Any] = read_json(out, STEPS, "chain") if (out / STEPS).exists() else {}

    @property
    def main(self) -> bool:
        """Return whether this is the first process."""
        return bool(self.process.is_main_process)

    @property
    def resumed(self) -> Mode:
        """Return the mode of stages that can resume: whatever a killed chain has left of them is continued."""
        return "resume" if self._mode == "resume" else "new"

    def again(self, folder: Path) -> Mode:
        """Return the mode of stages that cannot resume: what a killed chain has left in `folder` is replaced."""
        return "overwrite" if self._mode == "resume" and folder.exists() else "new"

    def again_from(self, name: str) -> None:
        """Do a step that was done, and all that were done after it, again."""
        done = list(self._done)
        for later in done[done.index(name) :] if name in done else ():
            del self._done[later]

    def note(self, name: str, value: Any) -> None:
        """Store a value among the results of the steps."""
        if self.main:
            self._record(name, value)

    def alone(self, name: str, title: str, work: Callable[[], Any]) -> Any:
        """Do a step on the first process, while the others wait. Return its result, which JSON can hold."""
        if self._begin(name, title):
            with watched(self.process, name):
                if self.main:
                    self._record(name, work())
            self._done = read_json(self.out, STEPS, "chain")
        return self._done[name]

    def together(self, name: str, title: str, work: Callable[[], object]) -> None:
        """Do a step on all processes."""
        if self._begin(name, title):
            work()
            self._done[name] = None
            if self.main:
                self._record(name, None)

    def _begin(self, name: str, title: str) -> bool:
        """Announce a step. Return whether it has to be done."""
        self._number += 1
        if self.main:
            say(f"{self._number}/{self.total} {title}{' (done before)' if name in self._done else ''}")
        return name not in self._done

    def _record(self, name: str, result: Any) -> None:
        self._done[name] = result
        write_json(self.out / STEPS, self._done)


@contextmanager
def chain(stage: str, config: Config, out: Path, mode: Mode, total: int) -> Iterator[Steps]:
    """Claim the folder of a chain, and give its steps. Raises UserError if it may not be written."""
    process = this_process()
    seed = config.distill.seed
    with claimed_output(out, mode, stage, config, seed) if process.is_main_process else process_log(out):
        wait_for_all(process, stage)  # the folder is claimed before another process reads it
        try:
            yield Steps(out, mode, total, process)
        except UserError as error:
            if RESULT_SECTIONS[stage] is None or "--resume" in str(error):
                raise
            # A stage knows nothing of the chain, whose --overwrite would replace all stages.
            again = " (here: remove that folder)" if "--overwrite" in str(error) else ""
            raise UserError(f"{error}{again}; then go on with --resume") from error
