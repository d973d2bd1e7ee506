"""Backoff: how long to wait before the next try of something that the world is in the way of."""

import random
from collections.abc import Iterator


def backoff(first_s: float, most_s: float) -> Iterator[float]:
    """Pauses without end, each twice the last up to `most_s`, and by chance between half and all of that: who failed
    together does not come back together."""
    pause_s = first_s
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, most_s)
