"""UrgencyOrder: Sequences sorted by urgency, to read the first of them and to take any out at once.

Sorted pieces of bounded size, so every change costs a search and a short shift, whatever else is or ever was in here.
UrgencyQueue is cheaper where only the end is asked for, and leaves those that have gone to whoever comes by next.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain, islice

from batching.sequence import Sequence

#: Entries at which a piece is halved: few enough to be shifted in about a microsecond.
_MAX_PIECE = 1024

_Key = tuple[int, float, float, int]


class UrgencyOrder:
    def __init__(self) -> None:
        self._pieces: list[list[_Key]] = []
        self._lasts: list[_Key] = []  # of each piece
        self._members: dict[_Key, Sequence] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """The most urgent first."""
        return map(self._members.__getitem__, chain.from_iterable(self._pieces))

    def first(self, num: int) -> list[Sequence]:
        """The `num` most urgent, or all."""
        return list(islice(self, num))

    def last(self) -> Sequence:
        """The least urgent; there must be one."""
        return self._members[self._lasts[-1]]

    def add(self, seq: Sequence) -> None:
        """Its urgency stays as it is while it is in here; its arrival number is its own, so keys never tie."""
        key = seq.urgency
        self._members[key] = seq
        if not self._pieces:
            self._pieces, self._lasts = [[key]], [key]
            return
        i = min(bisect_left(self._lasts, key), len(self._pieces) - 1)
        piece = self._pieces[i]
        insort(piece, key)
        if len(piece) >= _MAX_PIECE:
            half = len(piece) // 2
            self._pieces.insert(i + 1, piece[half:])
            self._lasts.insert(i + 1, piece[-1])
            del piece[half:]
        self._lasts[i] = piece[-1]

    def remove(self, seq: Sequence) -> None:
        key = seq.urgency
        del self._members[key]
        i = bisect_left(self._lasts, key)
        piece = self._pieces[i]
        del piece[bisect_left(piece, key)]
        if piece:
            self._lasts[i] = piece[-1]
        else:
            del self._pieces[i], self._lasts[i]
