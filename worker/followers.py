"""Followers: pieces whose answers another worker computes right now. They wait for its answer, or take its place."""

import math
import threading
from collections.abc import Callable, Iterable

from protocol.requests import Answer
from storage.answers import AnswerCache, find_answers
from storage.flights import Flights
from storage.ledger import Ledger
from worker.generations import Piece


class Followers:
    """Thread-safe. `settle` gets a piece with its answer, `start` the pieces that are to be computed here after all."""

    def __init__(
        self,
        ledger: Ledger,
        cache: AnswerCache,
        flights: Flights,
        *,
        settle: Callable[[Piece, Answer], None],
        start: Callable[[list[Piece]], None],
    ) -> None:
        self._ledger, self._cache, self._flights = ledger, cache, flights
        self._settle, self._start = settle, start
        self._lock = threading.Lock()
        self._waiting: dict[bytes, list[Piece]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, key: bytes, pieces: Iterable[Piece]) -> None:
        with self._lock:
            self._waiting.setdefault(key, []).extend(pieces)

    def forget_abandoned(self) -> None:
        """The pieces of owners who gave up."""
        with self._lock:
            self._keep(lambda piece: not piece.owner.is_abandoned)

    @property
    def first_deadline(self) -> float:
        """Of all who wait, in monotonic seconds; infinity: there is none."""
        with self._lock:
            deadlines = [piece.deadline for pieces in self._waiting.values() for piece in pieces]
        return min((deadline for deadline in deadlines if deadline is not None), default=math.inf)

    def expire(self, now: float) -> list[Piece]:
        """The pieces whose deadline has passed, which wait no longer."""
        with self._lock:
            return self._keep(lambda piece: piece.deadline is None or piece.deadline > now)

    def _keep(self, is_kept: Callable[[Piece], bool]) -> list[Piece]:
        """Only these wait on; returns the others."""
        others: list[Piece] = []
        for key, pieces in list(self._waiting.items()):
            others += [piece for piece in pieces if not is_kept(piece)]
            if left := [piece for piece in pieces if is_kept(piece)]:
                self._waiting[key] = left
            else:
                del self._waiting[key]
        return others

    def look(self) -> None:
        """Serve what is known by now, and start what nobody computes any more. Raises DatabaseUnavailable."""
        with self._lock:
            keys = list(self._waiting)
        if not keys:
            return
        answers = self._cache.get_many(keys)
        free = [key for key in keys if key not in answers]
        held = self._flights.claim(free)
        free = [key for key in free if key not in held]
        try:
            # Whoever computed it has committed it before letting go.
            found = find_answers(self._ledger, free)
        except BaseException:
            self._flights.release(free)
            raise
        self._flights.release(list(found))
        answers |= found
        unknown: list[Piece] = []
        for key in [*answers, *(key for key in free if key not in answers)]:
            with self._lock:
                pieces = self._waiting.pop(key, [])
            answer = answers.get(key)
            if answer is None:
                unknown += pieces
                continue
            for piece in pieces:
                self._settle(piece, answer)
        if unknown:
            self._start(unknown)
