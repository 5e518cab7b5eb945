"""Explain why weights were not fetched from the network."""

from urllib.error import URLError

from huggingface_hub.errors import LocalEntryNotFoundError

_HINTS = {401: "no such model, or one that needs a login", 403: "access is not granted", 404: "no such model or file"}
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def why_not_fetched(error: BaseException) -> str | None:
    """Say why something was not fetched from the network; return None if the error has another reason.

    For most errors, the hub's client only says that the file is not on this disk. The cause is further down the chain
    of errors.
    """
    chain = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None) or getattr(link, "code", None)
        if isinstance(status, int):
            hint = f" ({_HINTS[status]})" if status in _HINTS else ""
            return f"the server answered {status}{hint}: {first_line(link)}"
    for link in reversed(chain):
        if isinstance(link, ConnectionError | TimeoutError | URLError | LocalEntryNotFoundError) or (
            type(link).__module__.split(".")[0] in _CLIENTS
        ):
            return f"no network ({type(link).__name__}: {first_line(link)})"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
