"""Jobs and the Chunks they are cut into: intake, progress, closing and cancelling."""

import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Row,
    Select,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)

from protocol.errors import JobNotFound, SubmissionConflict
from protocol.priority import ASKED_PRIORITY, DEFAULT_PRIORITY, PRIORITIES, Priority, rank
from protocol.requests import Request, Result, first_timeout, pack_requests
from protocol.sampling import SamplingParams
from storage import digest
from storage.clock import now
from storage.completeness import NO_PROOF, close_proof
from storage.dead_letters import delete_dead_letters
from storage.insertion import insert_new
from storage.leases import lock_chunks
from storage.ledger import Ledger
from storage.results import COUNTERS, RESULT_COLUMNS, count, insert_results, to_result, to_rows
from storage.tables import (
    chunk_requests,
    chunks,
    is_leased,
    is_submitted,
    is_there,
    is_unfinished,
    is_waiting,
    jobs,
    results,
)

JobState = Literal["submitting", "running", "finished", "cancelled", "deleting"]

#: Shorter prefixes of an id would soon stop being unique.
_MIN_PREFIX = 4
_ID_PREFIX = re.compile(f"[0-9a-f]{{{_MIN_PREFIX},16}}")
#: Chunk ids read at a time for re-publishing.
_PAGE = 1000
#: Chunks whose errors are taken back in one transaction, which meanwhile keeps the Job's producer waiting.
_REOPENED = 100

_NEW_JOB = ("id", "tenant", "identity", "model", "params", "priority", "state", "is_asked")

_decode_params = msgspec.json.Decoder(SamplingParams).decode

_is_done = (
    (jobs.c.id == bindparam("job"))
    & (jobs.c.state == "running")
    & ~exists().where(chunks.c.job_id == bindparam("job"), is_unfinished)
)
_DONE = select(jobs.c.id).where(_is_done)
_CLOSE = update(jobs).where(_is_done).values(state="finished", ended_at=now())


class Job(msgspec.Struct, frozen=True):
    """What a user submitted."""

    id: str
    tenant: str
    identity: str
    model: str
    params: SamplingParams
    state: JobState
    created_at: float
    num_lines: int | None  # None until sealed
    ended_at: float | None = None  # when it became finished or cancelled
    priority: Priority = DEFAULT_PRIORITY


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A Job's progress. Results count per sample; a Chunk counts as finished when nothing is left to do in it."""

    job: Job
    num_lines: int  # so far, while the Job is being submitted
    num_ok: int
    num_error: int
    num_cached: int  # of num_ok
    num_chunks: int
    num_chunks_finished: int
    num_requests: int
    num_requests_waiting: int  # in Chunks nobody has claimed
    num_requests_leased: int  # in Chunks being worked on, those with Results included
    prompt_tokens: int
    completion_tokens: int
    computed_tokens: int  # of completion_tokens, those that no known answer saved

    @property
    def is_finished(self) -> bool:
        return self.job.state == "finished"


def open_job(
    ledger: Ledger,
    *,
    tenant: str,
    identity: str,
    model: str,
    params: SamplingParams,
    priority: Priority = DEFAULT_PRIORITY,
) -> tuple[Job, bool]:
    """The tenant's Job with this identity, made now if there is none; True if it was. Raises DatabaseUnavailable."""
    job_id = secrets.token_hex(8)
    shown = msgspec.json.encode(params).decode()
    row = (job_id, tenant, identity, model, shown, rank(priority), "submitting", False)

    def work(connection: Connection) -> Job:
        insert_new(connection, jobs, _NEW_JOB, [row], stamped=("created_at",))
        same = is_there & (jobs.c.tenant == tenant) & (jobs.c.identity == identity)
        return _job(connection.execute(select(jobs).where(same)).one())

    job = ledger.write(work)
    return job, job.id == job_id


def set_priority(ledger: Ledger, job_id: str, priority: Priority) -> None:
    """For what of the Job nobody has claimed yet. Raises DatabaseUnavailable."""
    changed = update(jobs).where(jobs.c.id == job_id).values(priority=rank(priority))
    ledger.write(lambda connection: connection.execute(changed))


def find_job(ledger: Ledger, name: str, tenant: str, *, among: ColumnElement[bool] = is_there) -> Job:
    """The tenant's Job with this id, with the one id that begins so (4 characters or more), or with this identity,
    which is its name where it has one.

    Raises JobNotFound and DatabaseUnavailable.
    """
    own = select(jobs).where(among, jobs.c.tenant == tenant)

    def work(connection: Connection) -> Job:
        matches = connection.execute(own.where(jobs.c.identity == name)).all()
        if not matches and _ID_PREFIX.fullmatch(name):
            matches = connection.execute(own.where(jobs.c.id.startswith(name)).order_by(jobs.c.id).limit(3)).all()
        if len(matches) == 1:
            return _job(matches[0])
        if matches:
            ids = ", ".join(row.id for row in matches)
            raise JobNotFound(f"{name!r} is the beginning of several Jobs ({ids}): give more of the id")
        raise JobNotFound(
            f"there is no Job {name!r} of tenant {tenant!r}: give its id, at least {_MIN_PREFIX} characters of it, or "
            "its name"
        )

    return ledger.read(work)


def list_jobs(ledger: Ledger, tenant: str, limit: int) -> list[Job]:
    """The tenant's newest submitted Jobs, newest first. Raises DatabaseUnavailable."""
    newest = (
        select(jobs)
        .where(is_there, is_submitted, jobs.c.tenant == tenant)
        .order_by(jobs.c.created_at.desc(), jobs.c.id)
        .limit(limit)
    )
    return ledger.read(lambda connection: [_job(row) for row in connection.execute(newest)])


def intake_position(ledger: Ledger, job_id: str) -> int:
    """The last input line that a Chunk covers, 0 at first: a resumed submit goes on after it."""
    return ledger.read(lambda connection: _position(connection, job_id))


def settled_position(ledger: Ledger, job_id: str) -> int:
    """The last input line up to which no Result is missing any more: Results up to there can be read in order."""
    first_open = select(chunks.c.first_line - 1).where(chunks.c.job_id == job_id, is_unfinished)
    newest = select(chunks.c.last_line).where(chunks.c.job_id == job_id)
    # One statement, hence one snapshot: a Chunk added between two would count as settled.
    position = func.coalesce(
        first_open.order_by(chunks.c.id).limit(1).scalar_subquery(),
        newest.order_by(chunks.c.first_line.desc()).limit(1).scalar_subquery(),
        0,
    )
    return ledger.read(lambda connection: int(connection.execute(select(position)).scalar_one()))


def append_chunk(
    ledger: Ledger,
    job_id: str,
    *,
    first_line: int,
    last_line: int,
    requests: Sequence[Request],
    failures: Sequence[Result],
    may_be_in: bool = False,
) -> int | None:
    """Add the lines first_line..last_line: a Chunk of `requests`, and `failures` for the lines that are malformed.

    `may_be_in`: an earlier call with the same lines failed, and may have landed all the same. Returns the Chunk's id;
    None when there is nothing to do in it, as it then is finished already. Raises JobNotFound; SubmissionConflict when
    the lines are there already or the Job takes no more; DatabaseUnavailable.
    """
    blob = pack_requests(requests) if requests else None
    rows = to_rows(job_id, 0, failures)
    chunk = {"job_id": job_id, "first_line": first_line, "last_line": last_line, "num_requests": len(requests)}
    chunk |= {"state": "waiting" if requests else "finished", "attempt": 0, **count(failures)}
    chunk["digest"] = digest.added(digest.EMPTY, failures)
    is_retry = may_be_in

    def work(connection: Connection) -> int | None:
        nonlocal is_retry
        # The Job's row is locked: producers take turns, and a Job that is being cancelled gets no Chunk afterwards.
        locked = select(jobs).where(is_there, jobs.c.id == job_id).with_for_update(key_share=True)
        job = connection.execute(locked).one_or_none()
        if job is None:
            raise JobNotFound(f"there is no Job {job_id!r}")
        # An earlier try within this call may have landed without our hearing of it.
        landed = _landed(connection, job_id, first_line, last_line, blob) if is_retry else None
        is_retry = True
        if landed is not None:
            return landed if requests else None
        _check_open(job, first_line, _position(connection, job_id))
        timeout_s = first_timeout(requests, _decode_params(job.params))
        due_at = None if timeout_s is None else job.created_at + timeout_s
        chunk_id = _insert_chunk(
            connection, {**chunk, "tenant": job.tenant, "model": job.model, "due_at": due_at}, blob
        )
        insert_results(connection, rows)
        return chunk_id if requests else None

    return ledger.write(work)


def open_asked_job(
    ledger: Ledger, *, tenant: str, model: str, params: SamplingParams, requests: Sequence[Request]
) -> tuple[str, int]:
    """A Job with all its lines in one Chunk, made in one transaction for prompts that somebody waits for.

    Lists leave it out. Returns its id and its Chunk's. Raises DatabaseUnavailable.
    """
    job_id = secrets.token_hex(8)
    shown = msgspec.json.encode(params).decode()
    row = (job_id, tenant, f"asked {job_id}", model, shown, rank(ASKED_PRIORITY), "running", True)
    blob, num_lines = pack_requests(requests), len(requests)
    chunk: dict[str, Any] = {"job_id": job_id, "tenant": tenant, "model": model}
    chunk |= {"first_line": 1, "last_line": num_lines, "num_requests": num_lines}
    chunk |= {"state": "waiting", "attempt": 0, **count([]), "digest": digest.EMPTY}
    timeout_s = first_timeout(requests, params)
    chunk["due_at"] = None if timeout_s is None else now() + timeout_s
    sealed = update(jobs).where(jobs.c.id == job_id).values(num_lines=num_lines)

    def work(connection: Connection) -> int:
        # An earlier try within this call may have landed without our hearing of it.
        if insert_new(connection, jobs, _NEW_JOB, [row], stamped=("created_at",)) == 0:
            landed: int = connection.execute(select(chunks.c.id).where(chunks.c.job_id == job_id)).scalar_one()
            return landed
        connection.execute(sealed)
        return _insert_chunk(connection, chunk, blob)

    return job_id, ledger.write(work)


def seal_job(ledger: Ledger, job_id: str, num_lines: int) -> None:
    """The whole input is in: the Job runs, or is finished if nothing is left to do. Sealing again changes nothing.

    Raises DatabaseUnavailable.
    """
    opened = (jobs.c.id == job_id) & (jobs.c.state == "submitting")
    sealed = update(jobs).where(opened).values(state="running", num_lines=num_lines)
    ledger.write(lambda connection: connection.execute(sealed))
    close_job_if_done(ledger, job_id)


def unclaimed_chunks(ledger: Ledger, job_id: str) -> Iterator[int]:
    """The ids of the Job's Chunks that nobody has claimed, oldest first, to publish them again."""
    last = 0
    unclaimed = select(chunks.c.id).where(chunks.c.job_id == job_id, is_unfinished, is_waiting).order_by(chunks.c.id)
    while True:
        ids = ledger.read(partial(_scalars, unclaimed.where(chunks.c.id > last).limit(_PAGE)))
        yield from ids
        if len(ids) < _PAGE:
            return
        last = ids[-1]


def job_status(ledger: Ledger, job_id: str) -> JobStatus:
    """The Job's progress, summed over its Chunks without a look at its Results. Raises JobNotFound."""
    totals = select(
        func.count().label("num_chunks"),
        func.sum(case((is_unfinished, 0), else_=1)).label("num_chunks_finished"),
        func.max(chunks.c.last_line).label("position"),
        func.sum(chunks.c.num_requests).label("num_requests"),
        func.sum(case((is_waiting, chunks.c.num_requests), else_=0)).label("num_requests_waiting"),
        func.sum(case((is_leased, chunks.c.num_requests), else_=0)).label("num_requests_leased"),
        *(func.sum(chunks.c[name]).label(name) for name in COUNTERS),
    ).where(chunks.c.job_id == job_id)

    def work(connection: Connection) -> JobStatus:
        job = _job_by_id(connection, job_id)
        # PostgreSQL sums integers to Decimals, and nothing to NULL.
        total = {name: int(value or 0) for name, value in connection.execute(totals).one()._mapping.items()}
        position = total.pop("position")
        return JobStatus(job=job, num_lines=position if job.num_lines is None else job.num_lines, **total)

    return ledger.read(work)


def close_job_if_done(ledger: Ledger, job_id: str) -> bool:
    """Finish a sealed Job none of whose Chunks has anything left to do; True if this call did it.

    For after the last Chunk's commit, never within it: of two workers that commit the last two Chunks at the same
    time neither would see the other's on PostgreSQL, and the Job would stay open. Raises DatabaseUnavailable.
    """
    this = {"job": job_id}

    def work(connection: Connection) -> bool:
        # Looked at again under the lock: somebody may just have reopened a Chunk.
        if connection.execute(_DONE.with_for_update(key_share=True), this).first() is None:
            return False
        return connection.execute(_CLOSE.values(close_proof(connection, job_id)), this).rowcount == 1

    # Nearly always there is something left, and to find that out nobody has to wait for his turn to write.
    is_done = ledger.read(lambda connection: connection.execute(_DONE, this).first()) is not None
    return is_done and ledger.write(work)


def reopen_errors(ledger: Ledger, job_id: str, codes: Collection[str], *, lines: Collection[int] | None = None) -> int:
    """Take back the errors with these codes, so that their Requests are done again; returns how many Results that was.

    With `lines` those of these lines alone. A dead letter goes with its error.

    Chunks that get work to do wait again, and their finished Job runs again. Left as they are: lines refused at
    intake, of which there is no Request; Chunks that are leased, whose owner would not notice, until they are given
    back or finished and this is called again; cancelled Jobs. Many Chunks take several transactions: after an error
    call it again. Raises JobNotFound and DatabaseUnavailable.
    """
    failed = select(chunks.c.id, chunks.c.first_line, chunks.c.last_line).order_by(chunks.c.first_line)
    failed = failed.where(chunks.c.job_id == job_id, chunks.c.num_error > 0).limit(_REOPENED)
    ledger.read(lambda connection: _job_by_id(connection, job_id))
    # Attempt 0 is the intake's.
    taken_back = delete(results).where(
        results.c.job_id == job_id, results.c.error_code.in_(codes), results.c.attempt > 0
    )
    if lines is not None:
        taken_back = taken_back.where(results.c.line.in_(lines))
    num_reopened = position = 0
    while True:
        page = ledger.read(partial(_rows, failed.where(chunks.c.first_line > position)))
        num_reopened += _reopen(ledger, job_id, page, taken_back)
        if len(page) < _REOPENED:
            return num_reopened
        position = page[-1].first_line


def cancel_job(ledger: Ledger, job_id: str) -> bool:
    """Stop a Job: its unfinished Chunks cannot be claimed any more and leases on them are lost; Results stay.

    Returns True if this call did it, False when the Job had ended. Raises JobNotFound and DatabaseUnavailable.
    """
    not_ended = (jobs.c.id == job_id) & jobs.c.state.in_(("submitting", "running"))
    cancelled = update(jobs).where(not_ended).values(state="cancelled", ended_at=now())
    stopped = update(chunks).where(chunks.c.job_id == job_id, is_unfinished).values(state="cancelled")

    def work(connection: Connection) -> bool:
        _job_by_id(connection, job_id)
        if connection.execute(cancelled).rowcount == 0:
            return False
        connection.execute(stopped)
        return True

    return ledger.write(work)


def _reopen(ledger: Ledger, job_id: str, page: Sequence[Row[Any]], taken_back: Delete) -> int:
    # The Job first, then its Chunks, as when it is cancelled.
    locked = select(jobs.c.state).where(jobs.c.id == job_id).with_for_update(key_share=True)
    spans = {row.id: results.c.line.between(row.first_line, row.last_line) for row in page}
    returning = taken_back.returning(*RESULT_COLUMNS)
    waiting = {"state": "waiting", "owner": None, "leased_until": None}
    reopened = update(jobs).where(jobs.c.id == job_id, jobs.c.state == "finished")
    most = 0

    def work(connection: Connection) -> int:
        nonlocal most
        if connection.execute(locked).scalar() not in ("submitting", "running", "finished"):
            return 0
        total = 0
        for chunk_id, held in lock_chunks(connection, spans).items():
            if held.state == "leased":
                continue
            gone = [to_result(*row) for row in connection.execute(returning.where(spans[chunk_id]))]
            if gone:
                delete_dead_letters(connection, job_id, gone)
                left = {"num_error": chunks.c.num_error - len(gone), "digest": digest.subtracted(held.digest, gone)}
                connection.execute(update(chunks).where(chunks.c.id == chunk_id).values(**left, **waiting))
            total += len(gone)
        if total:
            connection.execute(reopened.values(state="running", ended_at=None, **NO_PROOF))
        # An earlier try may have landed without our hearing of it: then nothing is left for this one.
        most = max(most, total)
        return most

    return ledger.write(work) if page else 0


def _insert_chunk(connection: Connection, values: dict[str, Any], blob: bytes | None) -> int:
    chunk = insert(chunks).values(**values, created_at=now()).returning(chunks.c.id)
    chunk_id: int = connection.execute(chunk).scalar_one()
    if blob is not None:
        connection.execute(insert(chunk_requests).values(chunk_id=chunk_id, requests=blob))
    return chunk_id


def _rows(statement: Select[*tuple[Any, ...]], connection: Connection) -> Sequence[Row[Any]]:
    return connection.execute(statement).all()


def _scalars(statement: Select[int], connection: Connection) -> list[int]:
    return list(connection.scalars(statement))


def _job_by_id(connection: Connection, job_id: str) -> Job:
    row = connection.execute(select(jobs).where(is_there, jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise JobNotFound(f"there is no Job {job_id!r}")
    return _job(row)


def _job(row: Any) -> Job:
    fields = {name: getattr(row, name) for name in Job.__struct_fields__}
    return Job(**(fields | {"params": _decode_params(row.params), "priority": PRIORITIES[row.priority]}))


def _position(connection: Connection, job_id: str) -> int:
    newest = select(chunks.c.last_line).where(chunks.c.job_id == job_id).order_by(chunks.c.first_line.desc()).limit(1)
    position: int | None = connection.execute(newest).scalar()
    return position or 0


def _check_open(job: Any, first_line: int, position: int) -> None:
    if job.state != "submitting":
        raise SubmissionConflict(f"the Job {job.id} is {job.state} and takes no more lines")
    if first_line <= position:
        raise SubmissionConflict(
            f"line {first_line} of Job {job.id} is in already, as are all up to {position}: is somebody else "
            "submitting the same input right now? Wait for them, or submit again to go on where they stopped"
        )


def _landed(connection: Connection, job_id: str, first_line: int, last_line: int, blob: bytes | None) -> int | None:
    same = select(chunks.c.id, chunk_requests.c.requests).outerjoin_from(chunks, chunk_requests)
    same = same.where(chunks.c.job_id == job_id, chunks.c.first_line == first_line, chunks.c.last_line == last_line)
    row = connection.execute(same).one_or_none()
    return row.id if row is not None and row.requests == blob else None
