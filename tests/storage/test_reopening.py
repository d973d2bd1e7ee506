"""Errors taken back: what is done again, what stays, and who may be at work meanwhile."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text, update

from protocol.errors import JobNotFound
from protocol.requests import Request
from storage.jobs import (
    Job,
    append_chunk,
    cancel_job,
    close_job_if_done,
    find_job,
    job_status,
    reopen_errors,
    seal_job,
    unclaimed_chunks,
)
from storage.leases import release
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit, insert_results, read_results, to_rows
from storage.tables import chunks, results
from tests.storage.lossy_proxy import LossyProxy
from tests.storage.samples import (
    add_many_chunks,
    answered,
    chunk_row,
    died,
    failed,
    new_chunk,
    new_job,
    new_lease,
    num_rows,
    run_threads,
)


def _state(ledger: Ledger, job: Job) -> tuple[str, bool]:
    found = find_job(ledger, job.id, job.tenant)
    return found.state, found.ended_at is not None


def _finished_job(ledger: Ledger) -> tuple[Job, int, int]:
    """Two samples each: of the first Chunk's lines 1 to 4 some died, the second has no errors of that kind."""
    job = new_job(ledger, n=2)
    first, second = new_chunk(ledger, job, range(1, 5)), new_chunk(ledger, job, [5])
    rows = [answered(1), answered(1, 1), answered(2), died(2, 1), died(3), died(3, 1), failed(4)]
    commit(ledger, [ChunkCommit(new_lease(ledger, first), rows, is_finished=True)])
    commit(ledger, [ChunkCommit(new_lease(ledger, second), [failed(5)], is_finished=True)])
    seal_job(ledger, job.id, 5)
    assert _state(ledger, job) == ("finished", True)
    return job, first, second


def test_requests_that_failed_are_claimed_again_and_the_job_closes_again(ledger: Ledger) -> None:
    job, first, second = _finished_job(ledger)
    before = job_status(ledger, job.id)

    assert reopen_errors(ledger, job.id, ["engine_died"]) == 3

    assert _state(ledger, job) == ("running", False)
    row = chunk_row(ledger, first)
    assert (row.state, row.owner, row.leased_until, row.attempt, row.num_error) == ("waiting", None, None, 1, 1)
    assert (chunk_row(ledger, second).state, chunk_row(ledger, second).num_error) == ("finished", 1)
    after = job_status(ledger, job.id)
    assert (after.num_ok, after.num_error) == (before.num_ok, before.num_error - 3) == (3, 2)
    assert list(unclaimed_chunks(ledger, job.id)) == [first]

    lease = new_lease(ledger, first, "worker-2")
    assert lease.attempt == 2
    assert [request.line for request in lease.requests] == [2, 3]
    assert lease.done == {(2, 0)}
    again = [answered(2, 1), answered(3), answered(3, 1)]
    assert commit(ledger, [ChunkCommit(lease, again, is_finished=True)]) == set()
    assert close_job_if_done(ledger, job.id)
    assert _state(ledger, job) == ("finished", True)
    assert [(row.line, row.sample, row.failure is None) for row in read_results(ledger, job.id)] == [
        (1, 0, True), (1, 1, True), (2, 0, True), (2, 1, True), (3, 0, True), (3, 1, True), (4, 0, False),
        (5, 0, False),
    ]  # fmt: skip


def test_taking_the_same_errors_back_again_changes_nothing(ledger: Ledger) -> None:
    job, first, _ = _finished_job(ledger)
    assert reopen_errors(ledger, job.id, {"engine_died", "too_long"}) == 5
    before = (find_job(ledger, job.id, "acme"), chunk_row(ledger, first), read_results(ledger, job.id))

    assert reopen_errors(ledger, job.id, {"engine_died", "too_long"}) == 0

    assert (find_job(ledger, job.id, "acme"), chunk_row(ledger, first), read_results(ledger, job.id)) == before


def test_a_job_without_such_errors_stays_finished(ledger: Ledger) -> None:
    job, _, _ = _finished_job(ledger)
    for codes in (["another"], []):
        assert reopen_errors(ledger, job.id, codes) == 0
    assert _state(ledger, job) == ("finished", True)
    with pytest.raises(JobNotFound):
        reopen_errors(ledger, "0123456789abcdef", ["engine_died"])


def test_lines_refused_at_intake_stay_refused(ledger: Ledger) -> None:
    job = new_job(ledger)
    requests = [Request(line=1, prompt="p")]
    chunk_id = append_chunk(ledger, job.id, first_line=1, last_line=2, requests=requests, failures=[failed(2)])
    append_chunk(ledger, job.id, first_line=3, last_line=3, requests=[], failures=[failed(3)])
    assert chunk_id is not None
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), [failed(1)], is_finished=True)])
    seal_job(ledger, job.id, 3)

    assert reopen_errors(ledger, job.id, ["too_long"]) == 1

    assert [row.line for row in read_results(ledger, job.id)] == [2, 3]
    assert [request.line for request in new_lease(ledger, chunk_id).requests] == [1]
    assert job_status(ledger, job.id).num_error == 2


def test_a_cancelled_job_is_left_alone(ledger: Ledger) -> None:
    job = new_job(ledger)
    done = new_chunk(ledger, job, [1])
    new_chunk(ledger, job, [2])
    commit(ledger, [ChunkCommit(new_lease(ledger, done), [died(1)], is_finished=True)])
    cancel_job(ledger, job.id)

    assert reopen_errors(ledger, job.id, ["engine_died"]) == 0

    assert _state(ledger, job) == ("cancelled", True)
    assert (chunk_row(ledger, done).state, len(read_results(ledger, job.id))) == ("finished", 1)


def test_errors_of_a_leased_chunk_wait_until_it_is_given_back_or_finished(ledger: Ledger) -> None:
    """Its owner has them behind it: it would finish the Chunk without doing them again."""
    job = new_job(ledger)
    held, given_back = new_chunk(ledger, job, [1, 2]), new_chunk(ledger, job, [3, 4])
    leases = [new_lease(ledger, chunk_id) for chunk_id in (held, given_back)]
    commit(ledger, [ChunkCommit(lease, [died(lease.requests[0].line)], is_finished=False) for lease in leases])
    assert reopen_errors(ledger, job.id, ["engine_died"]) == 0

    release(ledger, "worker-1", {given_back: 1})
    assert reopen_errors(ledger, job.id, ["engine_died"]) == 1
    assert [request.line for request in new_lease(ledger, given_back).requests] == [3, 4]

    assert commit(ledger, [ChunkCommit(leases[0], [answered(2)], is_finished=True)]) == set()
    assert reopen_errors(ledger, job.id, ["engine_died"]) == 1
    assert [request.line for request in new_lease(ledger, held).requests] == [1]


def test_the_attempt_that_finished_a_reopened_chunk_writes_to_it_no_more(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job, [1])
    last = ChunkCommit(new_lease(ledger, chunk_id), [died(1)], is_finished=True)
    assert commit(ledger, [last]) == set()
    assert reopen_errors(ledger, job.id, ["engine_died"]) == 1

    # Its worker did not hear that the commit had landed.
    assert commit(ledger, [last]) == {chunk_id}

    assert read_results(ledger, job.id) == []
    assert new_lease(ledger, chunk_id).requests


def test_workers_that_commit_meanwhile_leave_no_request_without_a_result(ledger: Ledger) -> None:
    """Every Request dies at first; workers, and somebody who takes the errors back, are at it at the same time."""
    job = new_job(ledger)
    made = [new_chunk(ledger, job, [2 * n + 1, 2 * n + 2]) for n in range(20)]
    seal_job(ledger, job.id, 40)
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        barrier.wait(30)
        for chunk_id in made[number::2]:
            lease = new_lease(ledger, chunk_id, f"worker-{number}")
            first, second = (request.line for request in lease.requests)
            assert commit(ledger, [ChunkCommit(lease, [died(first)], is_finished=False)]) == set()
            assert commit(ledger, [ChunkCommit(lease, [died(second)], is_finished=True)]) == set()
            close_job_if_done(ledger, job.id)

    counts: list[int] = []

    def take_back() -> None:
        barrier.wait(30)
        while sum(counts) < 40:
            counts.append(reopen_errors(ledger, job.id, ["engine_died"]))

    run_threads([partial(work, 0), partial(work, 1), take_back])

    assert sum(counts) == 40
    assert _state(ledger, job) == ("running", False)
    assert list(unclaimed_chunks(ledger, job.id)) == made
    for chunk_id in made:
        lease = new_lease(ledger, chunk_id)
        assert len(lease.requests) == 2
        rows = [answered(request.line) for request in lease.requests]
        assert commit(ledger, [ChunkCommit(lease, rows, is_finished=True)]) == set()
    assert close_job_if_done(ledger, job.id)
    assert (job_status(ledger, job.id).num_ok, job_status(ledger, job.id).num_error) == (40, 0)


def test_a_job_is_not_closed_over_a_chunk_that_is_just_being_reopened(postgres_ledger: Ledger) -> None:
    """The closing statement had looked at the Chunks before it waited for the lock of the Job."""
    ledger = postgres_ledger
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job, [1])
    seal_job(ledger, job.id, 1)
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), [died(1)], is_finished=True)])
    blocked = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    closing: list[Future[bool]] = []

    def close_meanwhile(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM results"):
            closing.append(pool.submit(close_job_if_done, ledger, job.id))
            while not ledger.read(lambda connection: connection.execute(blocked).scalar()):
                assert not closing[0].done()

    event.listen(Engine, "before_cursor_execute", close_meanwhile)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert reopen_errors(ledger, job.id, ["engine_died"]) == 1
            assert not closing[0].result()
    finally:
        event.remove(Engine, "before_cursor_execute", close_meanwhile)
    assert _state(ledger, job) == ("running", False)


def test_taking_back_whose_reply_is_lost_is_counted(lossy_ledger: Ledger, lossy_proxy: LossyProxy) -> None:
    job, _, _ = _finished_job(lossy_ledger)

    def lose_its_commit(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM results") and lossy_proxy.num_lost == 0:
            lossy_proxy.lose_next_commit()

    event.listen(Engine, "before_cursor_execute", lose_its_commit)
    try:
        assert reopen_errors(lossy_ledger, job.id, ["engine_died"]) == 3
    finally:
        event.remove(Engine, "before_cursor_execute", lose_its_commit)
    assert lossy_proxy.num_lost == 1
    assert reopen_errors(lossy_ledger, job.id, ["engine_died"]) == 0


def test_all_chunks_of_a_large_job_are_reopened(ledger: Ledger) -> None:
    job = new_job(ledger)
    add_many_chunks(ledger, job, 450, state="finished")
    rows = to_rows(job.id, 1, [died(line) for line in range(1, 451)])

    def fail_all(connection: Connection) -> None:
        insert_results(connection, rows)
        connection.execute(update(chunks).values(num_error=1))

    ledger.write(fail_all)

    assert reopen_errors(ledger, job.id, ["engine_died"]) == 450

    assert num_rows(ledger, results) == job_status(ledger, job.id).num_error == 0
    assert len(list(unclaimed_chunks(ledger, job.id))) == 450
