"""A Chunk this worker holds the lease of, with what is still owed for it."""

import time
from dataclasses import dataclass, field
from typing import Protocol

from protocol.requests import Result
from storage.leases import Lease


class Ticket(Protocol):
    """The queue message a Chunk came with; a Chunk claimed straight from SQL has none."""

    @property
    def chunk_id(self) -> int: ...

    def accept(self) -> None:
        """The lease is committed: the message may be acked."""

    def complete(self, outcome: str) -> None:
        """The Chunk is done with; `outcome` is what Celery shows as its result."""


@dataclass(eq=False, slots=True)
class OpenChunk:
    lease: Lease
    ticket: Ticket | None
    num_owed: int = 0  # Results not yet committed
    num_ok: int = 0
    num_error: int = 0
    num_cached: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

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
