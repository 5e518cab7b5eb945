"""The log of a stage, in its output: a file in a folder, or an object that is uploaded at the end."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from pipeline.config import Config, dump_config
from pipeline.runtime.logs import LOG, log_file, log_header, logger, rank_log
from pipeline.storage import Place, is_remote, open_store
from singer.errors import UserError


def stage_log(place: Place, config: Config) -> AbstractContextManager[None]:
    """Open the log file of an output, to which a stage adds its messages until the block ends."""
    header = partial(log_header, dump_config(config))
    return _uploaded_log(str(place), header) if is_remote(place) else log_file(Path(place) / LOG, header)


def process_log(place: Place) -> AbstractContextManager[None]:
    """Open the log file of a process other than the first; it appears with the first warning or error."""
    folder = Path(tempfile.gettempdir()) if is_remote(place) else Path(place)
    return log_file(folder / rank_log(), log_header, logging.WARNING)


@contextmanager
def _uploaded_log(url: str, header: Callable[[], str]) -> Iterator[None]:
    """Log to a temporary file, as nothing can be added to an object; at the end, add it to the store's log."""
    file = Path(tempfile.mkdtemp(prefix="singer-")) / LOG
    logger.info("the log is %s until the end, then %s/%s", file, url, LOG)

    def upload() -> None:
        store = open_store(url)
        before = b""
        with suppress(FileNotFoundError):
            before = store.read(LOG)
        store.write(LOG, before + file.read_bytes())

    try:
        with log_file(file, header):
            yield
    except OSError:
        raise  # the store may be out of reach
    except BaseException:
        with suppress(UserError, OSError):
            upload()
        raise  # the file stays, because the message names it
    with suppress(UserError, OSError):
        upload()
        shutil.rmtree(file.parent)
