"""A Chunk this worker holds the lease of, with what is still owed for it."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from protocol.requests import Result
from storage.leases import Lease

if TYPE_CHECKING:
    from worker.committer import Committer


class Ticket(Protocol):
    """The queue message that said there is a Chunk; one claimed without being told has none."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The classes of Jobs whose Chunks it is for."""

    def accept(self) -> None:
        """The lease is committed: the message may be acked."""

    def complete(self, outcome: str) -> None:
        """The Chunk is done with; `outcome` is what Celery shows as its result."""


@dataclass(eq=False, slots=True)
class OpenChunk:
    """An Owner whose Results go to the committer."""

    lease: Lease
    ticket: Ticket | None
    committer: "Committer"
    num_owed: int = 0  # Results not yet committed
    num_ok: int = 0
    num_error: int = 0
    num_cached: int = 0
    is_abandoned: bool = False  # the lease is lost
    started: float = field(default_factory=time.monotonic)

    @property
    def needs_ledger(self) -> bool:
        return True

    @property
    def tenant(self) -> str:
        return self.lease.tenant

    @property
    def job_id(self) -> str:
        return self.lease.job_id

    @property
    def priority(self) -> int:
        return self.lease.priority

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def submitted(self) -> float:
        # How long ago that was, the database's clock says.
        return self.started + self.lease.submitted_at - self.lease.claimed_at

    @property
    def deadline(self) -> float | None:
        return None

    def abandon(self) -> None:
        self.is_abandoned = True

    def expect(self, num_results: int) -> None:
        self.num_owed = num_results
        if not num_results:
            self.committer.finish(self)

    def settle(self, result: Result, key: bytes | None = None) -> None:
        self.committer.put(self, result, key)

    def count(self, result: Result) -> None:
        """A Result of this Chunk is about to be committed."""
        self.num_owed -= 1
        self.num_ok += result.failure is None
        self.num_error += result.failure is not None
        self.num_cached += result.is_cached

    def outcome(self) -> str:
        text = f"{self.num_ok} ok, {self.num_error} error"
        return f"{text}, {self.num_owed} released" if self.num_owed else text

    def complete(self) -> None:
        if self.ticket is not None:
            self.ticket.complete(self.outcome())
            self.ticket = None
