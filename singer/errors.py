"""The one exception for what the user can fix, and its message for a name that does not exist."""

from collections.abc import Iterable


class UserError(ValueError):
    """An error that says in one line what is wrong with what the user gave, where, and what to do about it.

    The commands print it as it is and end with code 2. Any other exception is a defect of this package, except
    OSError: the cause of that is the disk or the network.
    """


def continued(message: str) -> str:
    """Return a library's message as it goes on in a sentence: only its first letter, as it may quote names."""
    return f"{message[:1].lower()}{message[1:]}"


def require_known(what: str, value: str, known: Iterable[str]) -> None:
    """Raise UserError if a value is not one of the known names. what: the option, or the key of the configuration."""
    names = list(known)
    if value not in names:
        raise UserError(f"{what}: unknown {value!r}; known: {', '.join(names)}")
