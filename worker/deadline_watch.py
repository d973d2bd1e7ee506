"""DeadlineWatch: a thread that acts when the first of many deadlines passes, and not a moment later."""

import math
import threading
import time
from collections.abc import Callable


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
                    self._changed.wait(None if left_s == math.inf else left_s)
                if self._is_stopped:
                    return
                self._first = math.inf  # what is noted while it acts stays noted
            self.note(self._act())
