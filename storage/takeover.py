"""Takeover: whether a lease that has run out says that its owner is dead.

While the database is away nobody can renew, so that afterwards every lease may have run out. Whoever lives renews his
at the next chance, three times in the length of a lease. So for as long as it was away, and for that length at most,
nothing is taken from others, and what runs in their engines goes on. After one question that failed this is a moment: a
database that fails or is slow now and then, or always, must not keep the Chunks of the dead for ever.
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
        self._is_away = False
        self._answered_at = clock()

    def now(self) -> float:
        """When a question is asked, in seconds."""
        return self._clock()

    def away(self) -> None:
        """The database did not answer."""
        self._is_away = True

    def answered(self, asked_at: float) -> None:
        """It answered what it was asked at this time; if that took long, others could not renew meanwhile either."""
        now = self._clock()
        waited_s = now - asked_at
        if self._is_away:
            self._wait_out(now, now - self._answered_at)
        elif waited_s > self._lease_s / 3 and (asked_at >= self._fair_at or waited_s >= self._lease_s):
            # Asked before the last such wait is over, it is a slow database and no outage: others renew as slowly.
            self._wait_out(now, waited_s)
        self._is_away, self._answered_at = False, now

    def is_fair(self, asked_at: float) -> bool:
        """To be called as soon as a question of this time is being answered."""
        self.answered(asked_at)
        return self._clock() >= self._fair_at

    def _wait_out(self, now: float, seconds: float) -> None:
        self._fair_at = max(self._fair_at, now + min(seconds, self._lease_s))
