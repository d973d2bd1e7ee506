"""A client over this test's servers, and somebody to do a worker's work."""

from collections.abc import Iterable, Iterator

import pytest

from producer.client import Client
from protocol.requests import Answer, Request, Result
from protocol.settings import Settings
from storage.jobs import close_job_if_done
from storage.landing_channel import LandingChannel
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit

MODEL = "tiny"
NOBODY_LISTENS = "redis://:secret@127.0.0.1:1/0"


@pytest.fixture
def settings(ledger: Ledger, database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, broker_url=redis_url, model_name=MODEL, chunk_requests=4)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
def channel_of_workers(redis_url: str) -> Iterator[LandingChannel]:
    landings = LandingChannel.connect(redis_url)
    yield landings
    landings.close()


def answered(request: Request, sample: int = 0) -> Result:
    """What a worker would store for it."""
    answer = Answer(text=f"{request.prompt}!", finish_reason="stop", prompt_tokens=1, completion_tokens=2)
    return Result(line=request.line, sample=sample, custom_id=request.custom_id, answer=answer)


def answer_oldest(ledger: Ledger, *, num_samples: int = 1, closes_job: bool = True) -> list[int]:
    """Do a worker's work on the oldest Chunk; returns its lines."""
    lease = claim_next(ledger, [MODEL], "worker", 60, min_age_s=0)
    assert lease is not None
    results = [answered(request, sample) for request in lease.requests for sample in range(num_samples)]
    commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
    if closes_job:
        close_job_if_done(ledger, lease.job_id)
    return [request.line for request in lease.requests]


def lines_of(results: Iterable[Result]) -> list[int]:
    return [result.line for result in results]
