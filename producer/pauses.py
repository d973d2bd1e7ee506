"""Pauses: when to look into the ledger again: at word from Redis, and without it less and less often."""

import time
from collections.abc import Callable, Set
from typing import TypeVar

from producer.wakeups import Wakeup
from protocol.errors import TimedOut

T = TypeVar("T")

#: Seconds between two looks, at first and at most; and at most while word comes through, which may still get lost.
_FIRST_S = 0.05
_LAST_S = 1.0
_LAST_HEARD_S = 5.0
#: A look that takes long, as in a Job of a million Chunks, is taken less often: a tenth of the time goes into it.
_COST_FACTOR = 10


class Pauses:
    """For one waiter. `timeout_s` bounds its pauses since the last restart."""

    def __init__(self, wakeup: Wakeup, *, timeout_s: float | None = None, most_s: float = _LAST_HEARD_S) -> None:
        self._wakeup = wakeup
        self._timeout_s = timeout_s
        self._most_s = most_s
        self._cost_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Something has happened, so more may soon, and the time given begins anew."""
        self._deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        self._next_s = _FIRST_S

    def timed(self, look: Callable[[], T]) -> T:
        """What `look` returns; the pauses grow with what it costs."""
        start = time.monotonic()
        value = look()
        self._cost_s = time.monotonic() - start
        return value

    def pause(self, what: str) -> Set[int] | None:
        """Wait for the next look; returns the Chunks with news, None: look at the whole Job.

        Raises TimedOut, which says that `what` did not happen in time.
        """
        rest_s = self._cost_s * _COST_FACTOR
        most_s = min(self._most_s, _LAST_HEARD_S if self._wakeup.is_heard else _LAST_S)
        wait_s = max(0.0, (most_s if self._wakeup.is_heard else min(self._next_s, most_s)) - rest_s)
        self._next_s = min(self._next_s * 1.5, _LAST_S)
        if self._deadline is None:
            time.sleep(rest_s)
            return self._wakeup.wait(wait_s)
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"{what} within the time given: it goes on, so wait again or longer")
        time.sleep(min(rest_s, left_s))
        return self._wakeup.wait(min(wait_s, max(0.0, self._deadline - time.monotonic())))
