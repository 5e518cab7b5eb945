"""Why weights did not come from the network."""

from urllib.error import URLError

from huggingface_hub.errors import LocalEntryNotFoundError

_HINTS = {401: "no such model, or one that needs a login", 403: "access is not granted", 404: "no such model or file"}
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def why_not_fetched(error: BaseException) -> str | None:
    """Why something did not come from the network; None if that is not what an error is about.

    The hub's client says of most that the file is not on this disk; the cause is behind that.
    """
    chain = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None) or getattr(link, "code", None)
        if isinstance(status, int):
            hints = {
                401: "no such model, or one that needs a login",
                403: "access is not granted",
                404: "no such model or file",
            }
            hint = f" ({hints[status]})" if status in hints else ""
            return f"the server answered {status}{hint}: {first_line(link)}"
    for link in reversed(chain):
        if isinstance(link, ConnectionError | TimeoutError | URLError | LocalEntryNotFoundError) or (
            type(link).__module__.split(".")[0] in _CLIENTS
        ):
            return f"no network ({type(link).__name__}: {first_line(link)})"
    return None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
