"""A worker's ChunkService without Celery around it, over real servers, a real engine process and a real ledger."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from producer.client import Client
from protocol.sampling import SamplingParams
from protocol.settings import EngineSettings, Settings
from storage.jobs import Job, unclaimed_chunks
from storage.ledger import Ledger
from worker.chunk_service import ChunkService

#: Seconds for anything to happen on two busy cores.
PATIENCE_S = 60.0


def service_settings(model: Path, redis_url: str, database_url: str, **changes: Any) -> Settings:
    """Leases so long that what waits for one to run out never ends."""
    engine = EngineSettings(model=str(model), num_threads=1, max_num_seqs=8, kv_tokens=8192)
    given: dict[str, Any] = {"model_name": "tiny", "lease_seconds": 600.0, "engine": engine}
    return Settings(broker_url=redis_url, database_url=database_url, **(given | changes))


@contextmanager
def running_service(settings: Settings) -> Iterator[ChunkService]:
    fatal: list[str] = []
    service = ChunkService(settings, Path(settings.engine.model), on_credit=lambda: None, on_fatal=fatal.append)
    service.load()
    service.start()
    try:
        yield service
    finally:
        service.stop()
    assert fatal == []


class Ticket(msgspec.Struct):
    """A Chunk's message, as the pool hands it on."""

    chunk_id: int
    ranks: tuple[int, ...] = (0, 1)
    outcome: str | None = None

    def accept(self) -> None:
        pass

    def complete(self, outcome: str) -> None:
        self.outcome = outcome


def submit(client: Client, name: str, lines: list[dict[str, Any]], **params: Any) -> Job:
    return client.submit(lines, name=name, params=SamplingParams(**params))


def hand_over(service: ChunkService, ledger: Ledger, job: Job) -> list[Ticket]:
    """The Job's messages reach the service."""
    tickets = [Ticket(chunk_id) for chunk_id in unclaimed_chunks(ledger, job.id)]
    for ticket in tickets:
        service.receive(ticket)
    return tickets


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not happen within {PATIENCE_S:.0f} s")
        time.sleep(0.02)
