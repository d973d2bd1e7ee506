"""Overdue Requests of Chunks that nobody works on end as errors, whoever looks, and whatever model they ask for: so
those of a Job that no worker serves end too."""

from collections.abc import Callable
from functools import partial

from sqlalchemy import ColumnElement, Connection, Select, bindparam, select, true, update

from protocol.requests import Request, Result, deadline_exceeded
from storage.clock import now_once
from storage.jobs import close_job_if_done
from storage.leases import lease_chunk
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit_within
from storage.tables import chunks, is_bounded, is_waiting
from storage.takeover import Takeover

#: Chunks ended in one call: whoever looks has something else to do as well.
_MAX_CHUNKS = 20
#: Of the lease, which is given up in the same transaction.
_LEASE_S = 60.0


def _overdue(whose: ColumnElement[bool]) -> Select[int]:
    found = select(chunks.c.id).where(is_bounded, chunks.c.due_at <= now_once(), whose)
    return found.order_by(chunks.c.due_at).limit(1)


_WAITING = _overdue(is_waiting)
_FREE = _overdue(is_waiting | (chunks.c.leased_until <= now_once()))


def end_overdue(ledger: Ledger, owner: str, *, job_id: str | None = None, takeover: Takeover | None = None) -> int:
    """Let what is late in waiting Chunks, of this Job or of all, be `deadline_exceeded`; returns in how many Chunks.

    Also in those whose lease has run out, if that says by `takeover` that their owners have died: who lives may have
    answers that were in time. It is told of each question that is answered. Where the rest of a Chunk is in time, it
    waits on. After so many Chunks it comes back, to be called again. Raises DatabaseUnavailable.
    """
    is_of_job = true() if job_id is None else chunks.c.job_id == bindparam("job", job_id)
    takeover = takeover or Takeover(0.0)  # nobody has anything to wait for

    def overdue(asked_at: float) -> Select[int]:
        return (_FREE if takeover.is_fair(asked_at) else _WAITING).where(is_of_job)

    for num_ended in range(_MAX_CHUNKS):
        # Nearly always there are none, and to find that out nobody has to wait for his turn to write.
        asked_at = takeover.now()
        found = ledger.read(lambda connection: connection.execute(_FREE.where(is_of_job)).first())
        takeover.answered(asked_at)
        if found is None:
            return num_ended
        ended = ledger.write(partial(_end_one, overdue=partial(overdue, takeover.now()), owner=owner))
        if ended is None:
            return num_ended
        close_job_if_done(ledger, ended)
    return _MAX_CHUNKS


def _end_one(connection: Connection, overdue: Callable[[], Select[int]], owner: str) -> str | None:
    """Returns the Chunk's Job; None when others have all of them."""
    chunk_id = connection.execute(overdue().with_for_update(skip_locked=True)).scalar()
    if chunk_id is None:
        return None
    lease = lease_chunk(connection, chunk_id, owner, _LEASE_S)
    late: list[Result] = []
    left: list[float] = []
    for request in lease.requests:
        timeout_s = request.timeout_s(lease.job_params)
        if timeout_s is None:
            continue
        if (deadline := lease.submitted_at + timeout_s) > lease.claimed_at:
            left.append(deadline)
        else:
            late.append(_late(request, timeout_s, lease.done))
    is_finished = len(late) == len(lease.requests)
    commit_within(connection, [ChunkCommit(lease, late, is_finished)])
    after: dict[str, object] = {"due_at": min(left, default=None)}
    if not is_finished:
        after |= {"state": "waiting", "owner": None, "leased_until": None}
    connection.execute(update(chunks).where(chunks.c.id == chunk_id).values(after))
    return lease.job_id


def _late(request: Request, timeout_s: float, done: frozenset[tuple[int, int]]) -> Result:
    """Without parameters, so that it stands for all samples there are to be, however many these are."""
    sample = 0
    while (request.line, sample) in done:
        sample += 1
    return Result.failed(request, deadline_exceeded(timeout_s), sample)
