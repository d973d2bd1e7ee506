"""Deleting Jobs: all of one goes, nothing else does, and an interruption leaves nothing half there."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, insert, update

from protocol.errors import JobNotEnded, JobNotFound, SubmissionConflict
from storage import deletion
from storage.clock import now
from storage.deletion import count_ended_jobs, delete_ended_jobs, delete_job, find_job_to_delete
from storage.jobs import (
    Job,
    append_chunk,
    cancel_job,
    close_job_if_done,
    find_job,
    job_status,
    list_jobs,
    reopen_errors,
    seal_job,
)
from storage.landings import job_progress
from storage.leases import claim_next, renew
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit, read_results
from storage.tables import chunk_requests, chunks, dead_letters, jobs, results
from tests.storage.samples import MODEL, answered, died, new_chunk, new_job, new_lease, num_rows, run_threads

DAY_S = 86_400.0


def finished_job(ledger: Ledger, identity: str, num_chunks: int = 3) -> Job:
    """Of two lines in each Chunk, all answered."""
    job = new_job(ledger, identity)
    for number in range(num_chunks):
        lines = [2 * number + 1, 2 * number + 2]
        lease = new_lease(ledger, new_chunk(ledger, job, lines))
        commit(ledger, [ChunkCommit(lease, [answered(line) for line in lines], is_finished=True)])
    seal_job(ledger, job.id, 2 * num_chunks)
    return find_job(ledger, job.id, "acme")


def age(ledger: Ledger, job: Job, days: float) -> None:
    """Let the Job have ended so long ago."""
    ended = update(jobs).where(jobs.c.id == job.id).values(ended_at=now() - days * DAY_S)
    ledger.write(lambda connection: connection.execute(ended))


def rows(ledger: Ledger) -> tuple[int, ...]:
    return tuple(num_rows(ledger, table) for table in (jobs, chunks, chunk_requests, results))


def test_deleted_job_is_gone_with_everything_of_its_own_and_nothing_else(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "_MAX_CHUNKS", 2)
    monkeypatch.setattr(deletion, "_MAX_RESULTS", 3)
    kept = finished_job(ledger, "kept")
    before = rows(ledger)
    gone = finished_job(ledger, "gone", num_chunks=5)
    told: list[tuple[int, int]] = []

    assert delete_job(ledger, gone.id, lambda *numbers: told.append(numbers)) == 10

    assert rows(ledger) == before
    assert [result.line for result in read_results(ledger, kept.id)] == [1, 2, 3, 4, 5, 6]
    assert told == [(0, 2), (0, 4), (0, 6), (0, 8), (0, 10)]
    with pytest.raises(JobNotFound):
        delete_job(ledger, gone.id)


def test_dead_letters_go_with_their_job(ledger: Ledger) -> None:
    job = finished_job(ledger, "gone", num_chunks=1)
    letter = {"job_id": job.id, "line": 1, "sample": 0, "chunk_id": 1, "code": "engine_died", "reason": "it died"}
    ledger.write(lambda connection: connection.execute(insert(dead_letters).values(**letter, created_at=now())))

    delete_job(ledger, job.id)

    assert num_rows(ledger, dead_letters) == 0


def test_job_that_has_not_ended_is_not_deleted(ledger: Ledger) -> None:
    job = new_job(ledger)
    new_chunk(ledger, job)
    with pytest.raises(JobNotEnded, match=f"the Job {job.id} is submitting: cancel it first"):
        delete_job(ledger, job.id)
    seal_job(ledger, job.id, 3)
    with pytest.raises(JobNotEnded, match="is running"):
        delete_job(ledger, job.id)
    assert job_status(ledger, job.id).num_requests == 3

    cancel_job(ledger, job.id)
    delete_job(ledger, job.id)

    assert rows(ledger) == (0, 0, 0, 0)


def _interrupt(ledger: Ledger, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin to delete the Job, and be killed after the first piece."""

    class Killed(Exception):
        pass

    def die(*_: int) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(deletion, "_MAX_CHUNKS", 1)
        with pytest.raises(Killed):
            delete_job(ledger, job.id, die)


def test_interrupted_deletion_leaves_no_job_to_be_found_and_can_be_gone_on_with(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finished_job(ledger, "nightly")
    _interrupt(ledger, job, monkeypatch)
    assert num_rows(ledger, results) == 4

    assert list_jobs(ledger, "acme", 10) == []
    assert job_progress(ledger, job.id) is None
    missing: list[Callable[[], Any]] = [
        lambda: find_job(ledger, "nightly", "acme"),
        lambda: job_status(ledger, job.id),
        lambda: cancel_job(ledger, job.id),
        lambda: reopen_errors(ledger, job.id, ["engine_died"]),
        lambda: append_chunk(ledger, job.id, first_line=9, last_line=9, requests=[], failures=[]),
    ]
    for call in missing:
        with pytest.raises(JobNotFound):
            call()
    assert not close_job_if_done(ledger, job.id)
    again = finished_job(ledger, "nightly")
    assert again.id != job.id
    assert find_job_to_delete(ledger, "nightly", "acme").id == again.id

    delete_job(ledger, find_job_to_delete(ledger, job.id[:8], "acme").id)

    assert num_rows(ledger, jobs) == 1
    assert [result.line for result in read_results(ledger, again.id)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(JobNotFound, match="there is no Job 'nothing'"):
        find_job_to_delete(ledger, "nothing", "acme")


def test_job_is_deleted_under_the_worker_that_still_holds_its_chunks(ledger: Ledger) -> None:
    job = new_job(ledger)
    lease = new_lease(ledger, new_chunk(ledger, job, [1, 2]))
    cancel_job(ledger, job.id)
    delete_job(ledger, job.id)

    assert commit(ledger, [ChunkCommit(lease, [answered(1)], is_finished=False)]) == {lease.chunk_id}
    assert renew(ledger, lease.owner, {lease.chunk_id: lease.attempt}, 60) == set()
    assert rows(ledger) == (0, 0, 0, 0)


def test_deleting_while_workers_commit_leaves_nothing_behind(ledger: Ledger) -> None:
    job = new_job(ledger)
    for number in range(20):
        new_chunk(ledger, job, [2 * number + 1, 2 * number + 2])
    is_started = threading.Event()

    def work() -> None:
        while (lease := claim_next(ledger, [MODEL], "worker", 60, min_age_s=0)) is not None:
            for request in lease.requests:
                commit(ledger, [ChunkCommit(lease, [answered(request.line)], is_finished=request.line % 2 == 0)])
                is_started.set()

    def remove() -> None:
        is_started.wait(60)
        cancel_job(ledger, job.id)
        delete_job(ledger, job.id)

    run_threads([work, work, remove])

    assert rows(ledger) == (0, 0, 0, 0)


def test_ended_jobs_are_deleted_by_age_and_tenant(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "_MAX_JOBS", 2)
    old = [finished_job(ledger, f"old {number}", num_chunks=1) for number in range(5)]
    cancelled, young, running = finished_job(ledger, "cancelled"), finished_job(ledger, "young"), new_job(ledger)
    for job in old:
        age(ledger, job, days=31)
    age(ledger, young, days=29)
    strangers = finished_job(ledger, "stranger's", num_chunks=1)
    age(ledger, strangers, days=31)
    ledger.write(
        lambda connection: connection.execute(update(jobs).where(jobs.c.id == strangers.id).values(tenant="other"))
    )
    _interrupt(ledger, cancelled, monkeypatch)
    told: list[tuple[int, int]] = []

    # What a deletion left is always part of it: of the Job's six Results one piece, two of them, had gone.
    assert count_ended_jobs(ledger, 30 * DAY_S, "acme") == (6, 14)
    assert delete_ended_jobs(ledger, 30 * DAY_S, "acme", lambda *numbers: told.append(numbers)) == (6, 14)

    assert {job.id for job in list_jobs(ledger, "acme", 10)} == {young.id, running.id}
    assert told[-1][1] == 14
    assert len(told) >= 3
    assert count_ended_jobs(ledger, 30 * DAY_S, None) == (1, 2)
    assert delete_ended_jobs(ledger, 30 * DAY_S, None) == (1, 2)
    assert delete_ended_jobs(ledger, 30 * DAY_S, None) == (0, 0)


def test_job_that_was_reopened_meanwhile_is_not_deleted(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    job = new_job(ledger)
    lease = new_lease(ledger, new_chunk(ledger, job, [1]))
    commit(ledger, [ChunkCommit(lease, [died(1)], is_finished=True)])
    seal_job(ledger, job.id, 1)
    age(ledger, job, days=31)
    hide = deletion._hide

    def reopen_and_hide(connection: Connection, ids: list[str]) -> list[str]:
        connection.execute(update(jobs).values(state="running"))
        return hide(connection, ids)

    monkeypatch.setattr(deletion, "_hide", reopen_and_hide)

    assert delete_ended_jobs(ledger, DAY_S, None) == (0, 0)
    assert find_job(ledger, job.id, "acme").state == "running"


def test_submitting_to_a_job_that_is_being_deleted_makes_another(ledger: Ledger) -> None:
    job = finished_job(ledger, "input-1", num_chunks=1)
    with pytest.raises(SubmissionConflict):
        new_chunk(ledger, job, [9])
    delete_job(ledger, job.id)

    assert new_job(ledger, "input-1").id != job.id
