"""Deleting Jobs: with their Chunks, Requests and Results, a bounded piece in each transaction.

From the first transaction on nobody finds the Job any more, and its identity is free. Answers are no Job's: those that
it brought stay known until they are pruned.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from protocol.errors import JobNotEnded, JobNotFound
from storage.clock import now_once
from storage.jobs import Job, find_job
from storage.leases import lock_chunks
from storage.ledger import Ledger
from storage.tables import chunk_requests, chunks, is_there, jobs, results

#: What goes in one transaction, which meanwhile keeps SQLite's other writers waiting. A Chunk with more Results, many
#: samples each, goes alone.
_MAX_JOBS = 500
_MAX_CHUNKS = 100
_MAX_RESULTS = 10_000

Progress = Callable[[int, int], None]

_is_ended = jobs.c.state.in_(("finished", "cancelled"))


def find_job_to_delete(ledger: Ledger, name: str, tenant: str) -> Job:
    """As `find_job`, or else one whose deletion was interrupted. Raises JobNotFound and DatabaseUnavailable."""
    try:
        return find_job(ledger, name, tenant)
    except JobNotFound:
        try:
            return find_job(ledger, name, tenant, among=~is_there)
        except JobNotFound:
            pass
        raise


def delete_job(ledger: Ledger, job_id: str, on_progress: Progress | None = None) -> int:
    """Delete a Job that has ended; returns how many Results that were. `on_progress` as for `delete_ended_jobs`.

    After an error call it again: it goes on with what is left. Raises JobNotEnded, JobNotFound and DatabaseUnavailable.
    """
    state_of = select(jobs.c.state).where(jobs.c.id == job_id)
    ledger.write(partial(_hide, ids=[job_id]))
    state = ledger.read(lambda connection: connection.scalar(state_of))
    if state is None:
        raise JobNotFound(f"there is no Job {job_id!r}")
    if state != "deleting":
        raise JobNotEnded(f"the Job {job_id} is {state}: cancel it first, wait for its end, or give --force")
    return _delete_hidden(ledger, [job_id], on_progress or _ignore, (0, 0))[1]


def count_ended_jobs(ledger: Ledger, age_s: float, tenant: str | None) -> tuple[int, int]:
    """How many Jobs `delete_ended_jobs` would delete, and how many Results with them. Raises DatabaseUnavailable."""
    is_old = _is_old(age_s, tenant)
    num_jobs = select(func.count()).select_from(jobs).where(is_old)
    num_results = select(func.sum(chunks.c.num_ok + chunks.c.num_error)).join_from(chunks, jobs).where(is_old)
    return ledger.read(lambda connection: (connection.scalar(num_jobs) or 0, int(connection.scalar(num_results) or 0)))


def delete_ended_jobs(
    ledger: Ledger, age_s: float, tenant: str | None, on_progress: Progress | None = None
) -> tuple[int, int]:
    """Delete the Jobs that ended longer ago than this many seconds, and what interrupted deletions left.

    Of one tenant, or of all for None. Returns how many Jobs and Results went; `on_progress` is told the same on the
    way. After an error call it again. Raises DatabaseUnavailable.
    """
    on_progress, total = on_progress or _ignore, (0, 0)
    page = select(jobs.c.id).where(_is_old(age_s, tenant)).order_by(jobs.c.id).limit(_MAX_JOBS)
    while True:
        ids = ledger.read(lambda connection: connection.scalars(page).all())
        if not ids:
            return total
        hidden = ledger.write(partial(_hide, ids=ids))
        total = _delete_hidden(ledger, hidden, on_progress, total)


def _ignore(_num_jobs: int, _num_results: int) -> None:
    pass


def _is_old(age_s: float, tenant: str | None) -> Any:
    is_old = (_is_ended & (jobs.c.ended_at < now_once() - age_s)) | ~is_there
    return is_old if tenant is None else is_old & (jobs.c.tenant == tenant)


def _hide(connection: Connection, ids: Collection[str]) -> list[str]:
    """Mark those of the Jobs that have ended; returns the ids of all that are marked now."""
    chosen = jobs.c.id.in_(ids)
    connection.execute(select(jobs.c.id).where(chosen).order_by(jobs.c.id).with_for_update(key_share=True)).all()
    connection.execute(update(jobs).where(chosen, _is_ended).values(state="deleting"))
    return list(connection.scalars(select(jobs.c.id).where(chosen, ~is_there)))


def _delete_hidden(
    ledger: Ledger, ids: Sequence[str], on_progress: Progress, so_far: tuple[int, int]
) -> tuple[int, int]:
    num_jobs, num_results = so_far
    while (num_deleted := ledger.write(partial(_delete_piece, ids=ids))) is not None:
        num_results += num_deleted
        on_progress(num_jobs, num_results)
    return num_jobs + len(ids), num_results


def _delete_piece(connection: Connection, ids: Sequence[str]) -> int | None:
    """How many Results went; None when nothing is left, the Jobs included."""
    piece = _piece(connection, ids)
    if not piece:
        connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))
        return None
    chunk_ids = [chunk.id for chunk in piece]
    # A worker that has lost its lease may be committing right now: it is waited for, and finds no Chunk after this.
    lock_chunks(connection, chunk_ids)
    num_deleted = 0
    for job_id in dict.fromkeys(chunk.job_id for chunk in piece):
        lines = [line for chunk in piece if chunk.job_id == job_id for line in (chunk.first_line, chunk.last_line)]
        of_these = (results.c.job_id == job_id) & results.c.line.between(lines[0], lines[-1])
        num_deleted += connection.execute(delete(results).where(of_these)).rowcount
    connection.execute(delete(chunk_requests).where(chunk_requests.c.chunk_id.in_(chunk_ids)))
    connection.execute(delete(chunks).where(chunks.c.id.in_(chunk_ids)))
    return num_deleted


def _piece(connection: Connection, ids: Sequence[str]) -> list[Any]:
    """The next Chunks that are not too much for one transaction."""
    num_results = (chunks.c.num_ok + chunks.c.num_error).label("num_results")
    oldest = select(chunks.c.id, chunks.c.job_id, chunks.c.first_line, chunks.c.last_line, num_results)
    oldest = oldest.where(chunks.c.job_id.in_(ids)).order_by(chunks.c.job_id, chunks.c.first_line).limit(_MAX_CHUNKS)
    piece: list[Any] = []
    total = 0
    for chunk in connection.execute(oldest).all():
        total += chunk.num_results
        if piece and total > _MAX_RESULTS:
            break
        piece.append(chunk)
    return piece
