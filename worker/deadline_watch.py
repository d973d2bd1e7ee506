"""DeadlineWatch: a thread that acts when the first of many deadlines passes."""

import math
import threading
import time
from collections.abc import Callable

#: Thousands of deadlines may pass within a second, and each look goes through all that waits: a fifth of the time at
#: most goes into looking, and no look is put off by more seconds than these.
_COST_FACTOR = 4
_MAX_REST_S = 0.5


class DeadlineWatch:
    """`act` ends what is late and returns the next deadline, or infinity; all times are monotonic seconds."""

    def __init__(self, act: Callable[[], float]) -> None:
        self._act = act
        self._first = math.inf
        self._is_stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    def note(self, deadline: float) -> None:
        """Whatever this is the deadline of can be ended from now on, also if it has passed already."""
        with self._changed:
            if deadline < self._first:
                self._first = deadline
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_stopped and (left_s := self._first - time.monotonic()) > 0:
                    self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
                if self._is_stopped:
                    return
                self._first = math.inf  # what is noted while it acts stays noted
            started = time.monotonic()
            self.note(self._act())
            time.sleep(min((time.monotonic() - started) * _COST_FACTOR, _MAX_REST_S))
