"""A submission whose database fails in the middle of it."""

import logging
from typing import Any

import pytest

from producer import intake
from producer.client import Client
from protocol.errors import DatabaseUnavailable
from protocol.sampling import SamplingParams
from storage.jobs import append_chunk
from storage.landings import num_unfinished_requests
from storage.leases import Lease, claim_next
from storage.ledger import Ledger
from tests.producer.conftest import MODEL, answer_oldest


class FailingDatabase:
    """Fails at these calls, counted from 0; before or, as when word of a COMMIT is lost, after it has stored them."""

    def __init__(self, fails: dict[int, str]) -> None:
        self.fails = fails
        self.num_calls = 0

    def append_chunk(self, ledger: Ledger, job_id: str, **given: Any) -> int | None:
        when, self.num_calls = self.fails.get(self.num_calls), self.num_calls + 1
        chunk_id = append_chunk(ledger, job_id, **given) if when != "before" else None
        if when is not None:
            raise DatabaseUnavailable("the database does not answer: database or disk is full")
        return chunk_id


def test_a_submission_waits_for_a_full_database_and_goes_on_where_it_stopped(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = FailingDatabase({1: "before", 2: "before", 3: "after", 5: "after"})
    monkeypatch.setattr(intake, "append_chunk", database.append_chunk)
    with caplog.at_level(logging.WARNING, "millrace.producer"):
        job = client.submit([f"prompt {i}" for i in range(11)])

    status = client.status(job)
    assert (job.num_lines, status.num_requests, status.num_chunks) == (11, 11, 3)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].endswith("database or disk is full; 4 lines are in, and it goes on when the database does")
    assert told[1] == "the database takes lines again: going on after line 8"
    assert len(told) == 4


def test_a_database_that_takes_nothing_at_all_is_an_error_at_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "append_chunk", FailingDatabase({0: "before"}).append_chunk)
    with pytest.raises(DatabaseUnavailable):
        client.submit(["prompt"])


def test_a_submission_that_waits_for_room_ends_what_is_late_though_its_workers_have_died(
    client: Client, ledger: Ledger
) -> None:
    dead: list[Lease | None] = []

    def die(_: int) -> None:
        if not dead:
            dead.append(claim_next(ledger, [MODEL], "dead", 0.0))

    params = SamplingParams(timeout=0.5)
    job = client.submit([f"prompt {i}" for i in range(11)], params=params, window=4, on_progress=die)

    assert dead[0] is not None
    status = client.wait(job, timeout_s=60)
    assert (status.num_ok, status.num_error) == (0, 11)
    codes = {result.failure.code for result in client.results(job) if result.failure is not None}
    assert codes == {"deadline_exceeded"}
    assert client.verify(job).holds


def test_a_submission_that_waits_for_room_outlives_its_database(
    client: Client, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [DatabaseUnavailable("the database does not answer") for _ in range(2)]

    def count(ledger: Ledger, job_id: str) -> int:
        if failures:
            raise failures.pop()
        answer_oldest(ledger)
        return num_unfinished_requests(ledger, job_id)

    def fail_from_now_on(_: int) -> None:
        monkeypatch.setattr(intake, "num_unfinished_requests", count)

    with caplog.at_level(logging.WARNING, "millrace.producer"):
        job = client.submit([f"prompt {i}" for i in range(8)], window=4, on_progress=fail_from_now_on)

    assert client.status(job).num_requests == 8
    assert [record.getMessage() for record in caplog.records] == [
        "the database does not answer; it goes on when the database does"
    ]
