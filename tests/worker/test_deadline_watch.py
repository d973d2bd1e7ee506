"""Deadlines are acted on when they pass, in whatever order they become known."""

import math
import queue
import time

from worker.deadline_watch import DeadlineWatch


def test_the_first_deadline_is_acted_on_when_it_has_passed_and_then_the_next() -> None:
    acted: queue.Queue[float] = queue.Queue()
    left: list[float] = []

    def act() -> float:
        now = time.monotonic()
        left[:] = [deadline for deadline in left if deadline > now]
        acted.put(now)
        return min(left, default=math.inf)

    watch = DeadlineWatch(act)
    watch.start()
    started = time.monotonic()
    # Calls may expire in the year 9999, which is longer than a thread can wait.
    never, far, near, next_one = started + 2.5e11, started + 1e6, started + 0.1, started + 0.2
    left += [near, next_one, far, never]
    for deadline in (never, far, near, next_one):
        watch.note(deadline)

    assert near <= acted.get(timeout=30) < far
    assert acted.get(timeout=30) >= next_one
    # What is late already when it becomes known is not waited for.
    watch.note(started - 1)
    acted.get(timeout=30)
    watch.stop()
    assert acted.empty()
