"""Late Requests end without a worker of their model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection

from protocol.requests import Request
from protocol.sampling import SamplingParams
from storage.jobs import Job, append_chunk, job_status, open_asked_job, seal_job
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.overdue import end_overdue
from storage.results import ChunkCommit, commit, read_results
from storage.takeover import Takeover
from tests.storage.samples import MODEL, answered, chunk_row, expire, new_job, new_lease, run_threads

LATE, IN_TIME = 1e-6, 1e6


def add(ledger: Ledger, job: Job, *timeouts: float | None, first_line: int = 1) -> int:
    """A Chunk whose lines have these timeouts."""
    requests = [
        Request(line=line, custom_id=f"id {line}", prompt="p", params=SamplingParams(timeout=timeout_s))
        for line, timeout_s in enumerate(timeouts, first_line)
    ]
    chunk_id = append_chunk(
        ledger, job.id, first_line=first_line, last_line=requests[-1].line, requests=requests, failures=[]
    )
    assert chunk_id is not None
    return chunk_id


def test_a_job_that_nobody_serves_ends_when_all_of_it_is_late(ledger: Ledger) -> None:
    job = new_job(ledger, model="served by nobody", timeout=LATE)
    add(ledger, job, None, None)
    add(ledger, job, None, first_line=3)
    seal_job(ledger, job.id, 3)
    other = new_job(ledger, "other", model="served by nobody", timeout=LATE)
    add(ledger, other, None)

    assert end_overdue(ledger, "anybody", job_id=job.id) == 2

    status = job_status(ledger, job.id)
    assert (status.job.state, status.num_error, status.num_chunks_finished) == ("finished", 3, 2)
    found = read_results(ledger, job.id)
    assert [(result.line, result.custom_id) for result in found] == [(1, "id 1"), (2, "id 2"), (3, "id 3")]
    assert {result.failure.code for result in found if result.failure is not None} == {"deadline_exceeded"}
    assert read_results(ledger, other.id) == []
    assert end_overdue(ledger, "anybody") == 1
    assert end_overdue(ledger, "anybody") == 0


def test_what_is_in_time_waits_on_in_the_same_chunk(ledger: Ledger) -> None:
    job = new_job(ledger, timeout=IN_TIME)
    chunk_id = add(ledger, job, None, LATE, 2 * IN_TIME)

    assert end_overdue(ledger, "anybody") == 1

    assert [result.line for result in read_results(ledger, job.id)] == [2]
    row = chunk_row(ledger, chunk_id)
    assert (row.state, row.owner) == ("waiting", None)
    assert row.due_at == job.created_at + IN_TIME
    lease = claim_next(ledger, [MODEL], "worker-1", 60)
    assert lease is not None
    assert [request.line for request in lease.requests] == [1, 3]
    assert end_overdue(ledger, "anybody") == 0


def test_a_chunk_with_a_living_owner_is_left_to_it_and_a_dead_ones_ends_with_what_it_has(ledger: Ledger) -> None:
    job = new_job(ledger, timeout=LATE, n=2)
    chunk_id = add(ledger, job, None, None, None)
    lease = new_lease(ledger, chunk_id)
    commit(ledger, [ChunkCommit(lease, [answered(1, 0), answered(1, 1), answered(2, 0)], is_finished=False)])
    assert end_overdue(ledger, "anybody") == 0

    expire(ledger, chunk_id)
    # After an outage its owner has not had the time to renew, nor to commit what it has.
    after_outage = Takeover(30.0)
    after_outage.answered(after_outage.now() - 600)
    assert end_overdue(ledger, "anybody", takeover=after_outage) == 0
    assert end_overdue(ledger, "anybody") == 1

    found = read_results(ledger, job.id)
    # The last one stands for both of its samples.
    assert [(result.line, result.sample, result.failure is None) for result in found] == [
        (1, 0, True), (1, 1, True), (2, 0, True), (2, 1, False), (3, 0, False),
    ]  # fmt: skip
    assert chunk_row(ledger, chunk_id).state == "finished"
    assert commit(ledger, [ChunkCommit(lease, [answered(3, 0)], is_finished=False)]) == {chunk_id}


def test_of_those_who_look_at_the_same_time_one_ends_each_chunk(ledger: Ledger) -> None:
    job = new_job(ledger, timeout=LATE)
    for line in range(1, 31):
        add(ledger, job, None, first_line=line)
    seal_job(ledger, job.id, 30)

    run_threads([partial(_until_none, ledger, number) for number in range(4)])

    status = job_status(ledger, job.id)
    assert (status.job.state, status.num_error) == ("finished", 30)


def _until_none(ledger: Ledger, number: int) -> None:
    while end_overdue(ledger, f"worker-{number}"):
        pass


def test_prompts_whose_caller_waits_end_too(ledger: Ledger) -> None:
    params = SamplingParams(timeout=LATE)
    job_id, _ = open_asked_job(
        ledger, tenant="acme", model="nobody's", params=params, requests=[Request(line=1, prompt="p")]
    )

    assert end_overdue(ledger, "anybody") == 1
    assert job_status(ledger, job_id).job.state == "finished"


def test_a_look_that_took_long_was_an_outage_for_everybody_though_it_found_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, read = [1000.0], ledger.read

    def read_slowly(work: Callable[[Connection], Any]) -> Any:
        found = read(work)
        now[0] += 600
        return found

    takeover = Takeover(30.0, lambda: now[0])
    with monkeypatch.context() as outage:
        outage.setattr(ledger, "read", read_slowly)
        assert end_overdue(ledger, "anybody", takeover=takeover) == 0

    job = new_job(ledger, timeout=LATE)
    chunk_id = add(ledger, job, None)
    new_lease(ledger, chunk_id)
    expire(ledger, chunk_id)
    assert end_overdue(ledger, "anybody", takeover=takeover) == 0
    now[0] += 30
    assert end_overdue(ledger, "anybody", takeover=takeover) == 1
