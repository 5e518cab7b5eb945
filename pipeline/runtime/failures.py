"""What ended a command or a part of one, told in one line; the traceback of a defect goes to a log."""

from dataclasses import dataclass

from pipeline.runtime.error_kinds import FULL, DefectsFound, explained, is_defect, one_line
from pipeline.runtime.logs import keep_traceback, logger, show_traceback


@dataclass(frozen=True)
class Failure:
    """A message of one line that says what went wrong. defect: whether it is singer's fault; full: or a full disk's."""

    message: str
    defect: bool = False
    full: bool = False


def failure(error: Exception) -> Failure:
    """Describe an error in one line. The whole traceback of a defect goes to a log, which the line names."""
    error = explained(error)
    if is_defect(error):
        log = keep_traceback(error)
        return Failure(f"defect: {type(error).__name__}: {one_line(error)}; see {log}", True)
    return Failure(one_line(error), full=isinstance(error, OSError) and error.errno in FULL)


def report_failure(error: Exception) -> int:
    """Tell the user what ended a command. Return its exit code: 1 for a defect, otherwise 2."""
    error = explained(error)
    if is_defect(error):
        log = keep_traceback(error)
        show_traceback(error)
        logger.error(
            "this is a defect of singer, not of what it was given; please report it with its log, %s, which has the "
            "whole traceback",
            log,
        )
        return 1
    logger.error(one_line(error, None))
    return 1 if isinstance(error, DefectsFound) else 2
