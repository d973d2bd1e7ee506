"""Owner: for whom Requests are computed, as everything between a Request and its Result knows it."""

from typing import Protocol

from protocol.requests import Result


class Owner(Protocol):
    """A Chunk whose Results go to the ledger, or a caller who waits for a reply. Told of Results by any thread."""

    @property
    def tenant(self) -> str:
        """Whose answers may be shared with it."""

    @property
    def job_id(self) -> str:
        """Whose share of its tenant's it is computed from: the Job's, or "" for all callers who wait for a reply."""

    @property
    def priority(self) -> int:
        """Of its Sequences, as in NewSequence: lower is more urgent."""

    @property
    def needs_ledger(self) -> bool:
        """Whether nothing is to be started for it while the database is away."""

    @property
    def seconds(self) -> float:
        """Since it was taken up."""

    @property
    def submitted(self) -> float:
        """When its Requests were submitted, in monotonic seconds here; timeouts count from then."""

    @property
    def deadline(self) -> float | None:
        """Until when it waits at all, in monotonic seconds; None: as long as its Requests may take."""

    @property
    def is_abandoned(self) -> bool:
        """Set by `abandon`, for good: nothing is started for it any more."""

    def abandon(self) -> None:
        """It waits no longer."""

    def expect(self, num_results: int) -> None:
        """Before the first of them: how many Results there will be."""

    def settle(self, result: Result, key: bytes | None = None) -> None:
        """One Result. `key` says that its answer was computed just now, and is to be kept."""
