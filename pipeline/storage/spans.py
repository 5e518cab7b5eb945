"""Ranges of objects that lie so near to each other that one request fetches them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Reading this many bytes in vain takes less time than another request.
_GAP = 2**20


class Span(NamedTuple):
    """The bytes start to end of an object, and where they go in the result, in bytes."""

    name: str
    start: int
    end: int
    place: int


def neighbours(spans: Iterable[Span], most: int) -> Iterator[list[Span]]:
    """Group spans that one request fetches: with small gaps, and no more than `most` bytes unless one is larger."""
    # obstore's own get_ranges does the same, but panics if an object ends too early.
    group: list[Span] = []
    for span in sorted(spans):
        near = group and span.name == group[0].name and span.start <= group[-1].end + _GAP
        if group and not (near and span.end <= group[0].start + most):
            yield group
            group = []
        group.append(span)
    if group:
        yield group
