"""A call that is being answered: one Request of a caller who waits for it."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from protocol.requests import Answer, Kind, Result
from worker.reply import CallExpired, Reply, error_of

#: More urgent than any Job's. Among themselves calls go by the message's priority, of which Redis serves 0 first.
_URGENCY = -1_000_000


class Ticket(Protocol):
    """The message of a call."""

    @property
    def task_id(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def args(self) -> Sequence[Any]: ...

    @property
    def kwargs(self) -> Mapping[str, Any]: ...

    @property
    def priority(self) -> int:
        """Of the message, 0 to 9."""

    @property
    def expires_in_s(self) -> float | None:
        """Seconds until the caller wants no answer any more; None: never."""

    def complete(self, outcome: Reply | Exception) -> None:
        """Tell the caller, then ack."""

    def discard(self) -> None:
        """Ack: the caller is told by another message, or knows already."""


class OpenCall:
    """An Owner whose Results become one Reply. `keep` gets the answers that were computed for it, behind the reply."""

    #: It is computed also while nobody can know whether it is known already.
    needs_ledger = False
    job_id = ""

    def __init__(
        self,
        ticket: Ticket,
        tenant: str,
        *,
        keep: Callable[[bytes, Answer], None],
        on_end: Callable[["OpenCall", Reply | Exception], None],
    ) -> None:
        self.task_id, self.kind = ticket.task_id, ticket.kind
        self.tickets = [ticket]  # the newest last: the message may be delivered again while the call is open
        self.tenant = tenant
        self.priority = _URGENCY + ticket.priority
        self._keep, self._on_end = keep, on_end
        self._started = time.monotonic()
        expires_in_s = ticket.expires_in_s
        self.deadline = None if expires_in_s is None else self._started + expires_in_s
        self._lock = threading.Lock()
        self._num_owed = 0
        self._results: dict[int, Result] = {}
        self.is_abandoned = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def submitted(self) -> float:
        return self._started

    def abandon(self) -> None:
        self.is_abandoned = True

    def expect(self, num_results: int) -> None:
        self._num_owed = num_results

    def settle(self, result: Result, key: bytes | None = None) -> None:
        with self._lock:
            self._results[result.sample] = result
            is_last = len(self._results) == self._num_owed
        if is_last:
            self._on_end(self, self._outcome())
        if key is not None and result.answer is not None:
            self._keep(key, result.answer)

    def _outcome(self) -> Reply | Exception:
        results = [self._results[sample] for sample in sorted(self._results)]
        failures = [result.failure for result in results if result.failure is not None]
        if self.deadline is not None and any(failure.code == "deadline_exceeded" for failure in failures):
            is_expired = self.deadline <= time.monotonic()  # or the Request's own timeout has passed
            return CallExpired() if is_expired else error_of(failures[0])
        return error_of(failures[0]) if failures else Reply(results)
