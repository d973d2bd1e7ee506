"""Results that are written as they finish, beside a command that waits."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.collector import Collector
from cli.output import Output, Showing
from producer.client import Client
from protocol.errors import ConfigurationError
from protocol.requests import Answer, Result
from protocol.settings import Settings
from storage.jobs import Job, close_job_if_done, unclaimed_chunks
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from tests.storage.samples import new_lease

FINISHED = Showing("openai", "finished")


@pytest.fixture
def client(ledger: Ledger, database_url: str, redis_url: str) -> Iterator[Client]:
    settings = Settings(database_url=database_url, broker_url=redis_url, model_name="tiny", chunk_requests=1)
    with Client(settings) as client:
        yield client


def answer_chunk(ledger: Ledger, chunk_id: int) -> None:
    lease = new_lease(ledger, chunk_id)
    answer = Answer(text="yes", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
    results = [Result(line=request.line, answer=answer) for request in lease.requests]
    commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
    close_job_if_done(ledger, lease.job_id)


def test_what_finishes_first_is_written_first(client: Client, ledger: Ledger, tmp_path: Path) -> None:
    job = client.submit(["first", "second"])
    first, second = unclaimed_chunks(ledger, job.id)
    is_written = threading.Event()

    output = Output(str(tmp_path / "results.jsonl"), FINISHED, job)
    with output, Collector(client, job, output, lambda _: is_written.set()):
        answer_chunk(ledger, second)
        assert is_written.wait(30)
        answer_chunk(ledger, first)

    written = [json.loads(line)["id"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert written == [f"batch_req-{job.id}-2", f"batch_req-{job.id}-1"]


def test_trouble_with_writing_ends_the_command(client: Client, ledger: Ledger) -> None:
    job: Job = client.submit(["first"])
    for chunk_id in unclaimed_chunks(ledger, job.id):
        answer_chunk(ledger, chunk_id)

    def collect() -> None:
        output = Output("/dev/full", Showing("flat", "finished"), job)
        with output, Collector(client, job, output, lambda _: None):
            pass

    with pytest.raises(ConfigurationError, match="No space left on device"):
        collect()
