"""A submission whose database fails in the middle of it."""

import logging
from typing import Any

import pytest

from producer import intake
from producer.client import Client
from protocol.errors import DatabaseUnavailable
from storage.jobs import append_chunk
from storage.ledger import Ledger


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
