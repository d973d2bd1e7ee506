"""Quarantine: which of an engine's Sequences may run after it has died with some of them aboard, and died again.

One death says little: the engine falls with everything that runs in it, and everything runs again. What was aboard
twice is suspect and runs in halves, each without the rest, until either all have finished or the one that the engine
cannot survive has been alone with it. Nobody else pays with more than time.
"""

from collections import deque
from collections.abc import Collection, Iterable

#: Deaths a Sequence must have been aboard of, the last one alone, before it is given up.
MAX_DEATHS = 3


class Quarantine:
    """Knows ids alone, in the order in which the engine was told of them. `max_aboard` is how many it runs at once."""

    def __init__(self, max_aboard: int) -> None:
        self._max_aboard = max_aboard
        self._running: dict[int, None] = {}  # told to the engine
        self._groups: deque[list[int]] = deque()  # suspects to run by themselves, one group after another
        self._rest: dict[int, None] = {}  # to run when no group is left
        self._num_deaths: dict[int, int] = {}

    @property
    def is_active(self) -> bool:
        return bool(self._groups or self._rest)

    def add(self, seq_ids: Iterable[int]) -> list[int]:
        """New ones; returns those that may run now."""
        new = dict.fromkeys(seq_ids)
        if self.is_active:
            self._rest |= new
            return []
        self._running |= new
        return list(new)

    def remove(self, seq_ids: Collection[int]) -> list[int]:
        """Ended ones; returns those whose turn it is now."""
        for seq_id in seq_ids:
            for place in (self._running, self._rest, self._num_deaths):
                place.pop(seq_id, None)
        if any(seq_id in group for group in self._groups for seq_id in seq_ids):
            gone = set(seq_ids)
            self._groups = deque(left for group in self._groups if (left := [i for i in group if i not in gone]))
        return self._next() if not self._running else []

    def on_death(self, started: Collection[int]) -> int | None:
        """The engine died; `started` had given tokens. Returns the one to be given up, if it has been found.

        Afterwards `restart` says what to tell the next engine.
        """
        likely = list(self._running)[: self._max_aboard]
        aboard = [seq_id for seq_id in self._running if seq_id in started or seq_id in likely]
        for seq_id in aboard:
            self._num_deaths[seq_id] = self._num_deaths.get(seq_id, 0) + 1
        suspects = [seq_id for seq_id in aboard if self._num_deaths[seq_id] > 1]
        if len(suspects) == 1 and len(self._running) == 1 and self._num_deaths[suspects[0]] >= MAX_DEATHS:
            return suspects[0]
        if suspects:
            innocent = [seq_id for seq_id in self._running if seq_id not in suspects]
            self._rest = dict.fromkeys(innocent) | self._rest
            middle = (len(suspects) + 1) // 2
            self._groups.extendleft(half for half in (suspects[middle:], suspects[:middle]) if half)
            self._running = {}
        return None

    def restart(self) -> list[int]:
        """What to tell a new engine."""
        return list(self._running) or self._next()

    def _next(self) -> list[int]:
        if self._groups:
            self._running = dict.fromkeys(self._groups.popleft())
        else:
            self._running, self._rest = self._rest, {}
        return list(self._running)
