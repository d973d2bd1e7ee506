"""Takeover: whether a lease that has run out says that its owner is dead.

While the database is away nobody can renew, so that afterwards every lease has run out. Whoever lives renews his at the
next chance, three times in the length of a lease; so for that length nothing is taken from others, and what runs in
their engines goes on.
"""

import math
import time
from collections.abc import Callable


class Takeover:
    """Of one thread, which says of every question to the database whether it was answered."""

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._fair_at = -math.inf

    def away(self) -> None:
        """The database did not answer."""
        self._fair_at = math.inf

    def answered(self, asked_at: float) -> None:
        """It answered what it was asked at this time; if that took long, others could not renew meanwhile either."""
        now = self._clock()
        if self._fair_at == math.inf or now - asked_at > self._lease_s / 3:
            self._fair_at = now + self._lease_s

    def is_fair(self, asked_at: float) -> bool:
        """To be called as soon as a question of this time is being answered."""
        self.answered(asked_at)
        return self._clock() >= self._fair_at
