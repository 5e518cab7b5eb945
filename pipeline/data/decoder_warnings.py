"""Say what Pillow warns of, with the name of the image: each kind of warning once, whatever thread decodes."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from PIL import Image

from pipeline.runtime.logs import warn_once

_lock = threading.Lock()
_thread = threading.local()
_watchers = 0
_installed = ExitStack()


@contextmanager
def warnings_of(where: str) -> Iterator[None]:
    """Let the warnings of decoders in this thread begin with `where` until the block ends."""
    before = getattr(_thread, "where", None)
    _thread.where = where
    try:
        yield
    finally:
        _thread.where = before


def warn(kind: str, text: str) -> None:
    """Warn of the image that is being decoded in this thread, unless such a warning was said."""
    where = getattr(_thread, "where", None) or "an image"
    warn_once(kind, f"{where}: {text} (said once for all such images)")


@contextmanager
def watched_decoders() -> Iterator[None]:
    """Catch Pillow's warnings in all threads, and leave limits of size to singer, until the block ends.

    Filters of warnings and Pillow's limit belong to the process. Blocks may overlap in any order: the first one to
    begin sets both, and the last one to end sets them back.
    """
    global _watchers
    with _lock:
        _watchers += 1
        if _watchers == 1:
            _install()
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1
            if not _watchers:
                _installed.close()


def _install() -> None:
    _installed.enter_context(warnings.catch_warnings())
    # Without this, Python shows a warning of one line of Pillow once in the life of the process.
    warnings.filterwarnings("always", module=r"(PIL|pillow_heif)\.")
    show, most = warnings.showwarning, Image.MAX_IMAGE_PIXELS

    def said(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if getattr(_thread, "where", None) is None:
            show(message, category, filename, lineno, file, line)
        else:
            warn(f"{filename}:{lineno}", " ".join(str(message).split()))

    warnings.showwarning = said
    Image.MAX_IMAGE_PIXELS = None
    _installed.callback(setattr, Image, "MAX_IMAGE_PIXELS", most)
