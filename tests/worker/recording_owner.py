"""An Owner that keeps what it is told."""

from dataclasses import dataclass, field

from protocol.requests import Result


@dataclass(eq=False)
class RecordingOwner:
    tenant: str = "default"
    job_id: str = "job"
    priority: int = 0
    needs_ledger: bool = True
    seconds: float = 0.0
    submitted: float = 0.0
    deadline: float | None = None
    is_abandoned: bool = False
    num_expected: int | None = None
    settled: list[tuple[Result, bytes | None]] = field(default_factory=list)

    def abandon(self) -> None:
        self.is_abandoned = True

    def expect(self, num_results: int) -> None:
        self.num_expected = num_results

    def settle(self, result: Result, key: bytes | None = None) -> None:
        self.settled.append((result, key))
