"""UrgencyQueue: Sequences in the order of their urgency, from either end.

A Sequence leaves by changing its state, or its urgency, with which it is pushed again; its entry stays behind until it
comes to the front or the entries are swept, so every operation takes O(log n) on average and nothing that has ended is
kept for long.
"""

import heapq

from batching.sequence import Sequence, SequenceState

#: Entries below which sweeping is not worth it.
_MIN_SWEEP = 64

_Entry = tuple[float, float, float, int, Sequence]


class UrgencyQueue:
    """Of the Sequences pushed, those in `state`; the least urgent first if `is_reversed`."""

    def __init__(self, state: SequenceState, *, is_reversed: bool = False) -> None:
        self._state = state
        self._sign = -1 if is_reversed else 1
        self._heap: list[_Entry] = []
        self._sweep_at = _MIN_SWEEP

    def __len__(self) -> int:
        """Entries, stale ones included."""
        return len(self._heap)

    def push(self, seq: Sequence) -> None:
        """Its arrival number is its own, so keys never tie but with its own: one that comes back to an urgency that it
        had is in here twice, until it leaves."""
        heapq.heappush(self._heap, (*self._key(seq), seq))
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)
            self._sweep_at = max(2 * len(self._heap), _MIN_SWEEP)

    def first(self) -> Sequence | None:
        while self._heap:
            if self._is_current(self._heap[0]):
                return self._heap[0][-1]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """The one `first` has given."""
        return heapq.heappop(self._heap)[-1]

    def _key(self, seq: Sequence) -> tuple[float, float, float, int]:
        priority, deadline, start, arrival = seq.urgency
        sign = self._sign
        return sign * priority, sign * deadline, sign * start, sign * arrival

    def _is_current(self, entry: _Entry) -> bool:
        return entry[-1].state is self._state and entry[:-1] == self._key(entry[-1])
