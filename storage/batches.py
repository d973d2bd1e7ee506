"""Batches: keys or ids in lists that fit into one statement or command."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

#: Well below the 32766 parameters SQLite takes, and few enough not to hold Redis up.
_MAX_SIZE = 500


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """All of them, in their order; none of no items."""
    given = list(items)
    return (given[i : i + _MAX_SIZE] for i in range(0, len(given), _MAX_SIZE))
