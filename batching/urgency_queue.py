"""UrgencyQueue: Sequences in the order of their urgency, from either end.

A Sequence leaves by changing its state and its entry stays behind until it comes to the front or the entries are swept,
so every operation takes O(log n) on average and nothing that has ended is kept for long.
"""

import heapq

from batching.sequence import Sequence, SequenceState

#: Entries below which sweeping is not worth it.
_MIN_SWEEP = 64


class UrgencyQueue:
    """Of the Sequences pushed, those in `state`; the least urgent first if `is_reversed`."""

    def __init__(self, state: SequenceState, *, is_reversed: bool = False) -> None:
        self._state = state
        self._sign = -1 if is_reversed else 1
        self._heap: list[tuple[float, float, float, int, Sequence]] = []
        self._sweep_at = _MIN_SWEEP

    def __len__(self) -> int:
        """Entries, stale ones included."""
        return len(self._heap)

    def push(self, seq: Sequence) -> None:
        """The caller pushes no Sequence that is in the queue; its arrival number is its own, so keys never tie."""
        priority, deadline, start, arrival = seq.urgency
        sign = self._sign
        heapq.heappush(self._heap, (sign * priority, sign * deadline, sign * start, sign * arrival, seq))
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[-1].state is self._state]
            heapq.heapify(self._heap)
            self._sweep_at = max(2 * len(self._heap), _MIN_SWEEP)

    def first(self) -> Sequence | None:
        while self._heap:
            seq = self._heap[0][-1]
            if seq.state is self._state:
                return seq
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """The one `first` has given."""
        return heapq.heappop(self._heap)[-1]
