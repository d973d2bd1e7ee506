"""Leases: the right to work on a Chunk until a time by the database's clock, fenced by the attempt.

A lease whose time has passed is still its owner's until somebody else claims the Chunk and so raises the attempt.
Claims and renewals do not wait for the disk: a database that forgets one in a power cut gives the Chunk to another
owner, whose name fences the first one off.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Double, Select, Update, and_, bindparam, or_, select, update

from protocol.priority import PRIORITIES
from protocol.requests import Request, unpack_requests
from protocol.sampling import SamplingParams
from storage.batches import batches
from storage.clock import now, now_once
from storage.intake_order import next_chunks
from storage.ledger import Ledger
from storage.tables import chunk_requests, chunks, is_leased, jobs, results

_decode_params = msgspec.json.Decoder(SamplingParams).decode


_JOB = select(jobs.c.params, jobs.c.priority, jobs.c.created_at).where(jobs.c.id == bindparam("job"))
_REQUESTS = select(chunk_requests.c.requests).where(chunk_requests.c.chunk_id == bindparam("chunk"))


def _expired(whose: ColumnElement[bool]) -> Select[int]:
    is_served = chunks.c.model.in_(bindparam("models", expanding=True))
    found = select(chunks.c.id).where(is_served, is_leased, chunks.c.leased_until <= now_once(), whose)
    return found.order_by(chunks.c.leased_until).limit(1).with_for_update(skip_locked=True)


_is_own = chunks.c.owner == bindparam("owner")
_is_given_up = chunks.c.id.not_in(bindparam("held", expanding=True))
_EXPIRED = _expired(or_(~_is_own, _is_given_up))
_GIVEN_UP = _expired(and_(_is_own, _is_given_up))
_CLAIM = (
    update(chunks)
    .where(chunks.c.id == bindparam("chunk"))
    .values(
        state="leased",
        owner=bindparam("new_owner"),
        attempt=chunks.c.attempt + 1,
        leased_until=now() + bindparam("lease_s", type_=Double),
    )
    .returning(chunks, now().label("claimed_at"))
)


class _Resolved(msgspec.Struct):
    """Of ResolvedParams what says how many Results a Request must have."""

    n: int = 1


_decode_resolved = lru_cache(maxsize=1024)(msgspec.json.Decoder(_Resolved).decode)


class Lease(msgspec.Struct, frozen=True):
    """A claimed Chunk and what is left to do in it."""

    chunk_id: int
    job_id: str
    attempt: int
    owner: str
    tenant: str
    model: str
    job_params: SamplingParams
    priority: int  # the Job's class, as in NewSequence
    requests: list[Request]  # whole Requests, those whose Results are all stored left out
    done: frozenset[tuple[int, int]]  # (line, sample) of `requests` that an earlier attempt stored
    submitted_at: float  # when the Job was made; this and the next by the database's clock
    claimed_at: float


class Held(msgspec.Struct, frozen=True):
    """What the ledger says of a Chunk somebody believes to hold."""

    attempt: int
    owner: str | None
    state: str
    digest: bytes


def claim_next(
    ledger: Ledger,
    models: Collection[str],
    owner: str,
    lease_s: float,
    *,
    ranks: Collection[int] = range(len(PRIORITIES)),
    min_age_s: float = 0.0,
    held: Collection[int] = (),
    may_take_over: Callable[[], bool] = lambda: True,
) -> Lease | None:
    """Lease the Chunk of these `models` whose turn it is, among Jobs of these classes; None when there is none.

    `held` are the Chunks that `owner` believes to hold: their leases may have run out while it slept, and are for it
    to renew. Its other leases it has given up, and may take again like anybody's. `may_take_over` is asked, when it is
    the owner's turn in the database, whether a lease that has run out says that somebody else has died.

    The lease that ran out first goes first: it was claimed before anything that still waits. Then comes the first of
    `intake_order.next_chunks`, made at least `min_age_s` ago; who has not been told of it by a message leaves younger
    ones to those who are.
    """

    def work(connection: Connection) -> Lease | None:
        statement = _EXPIRED if may_take_over() else _GIVEN_UP
        whose = {"models": list(models), "owner": owner, "held": list(held)}
        expired = connection.execute(statement, whose).scalars()
        for chunk_id in chain(expired, next_chunks(connection, models, ranks, min_age_s)):
            return lease_chunk(connection, chunk_id, owner, lease_s)
        return None

    return ledger.write(work, is_flushed=False)


def renew(ledger: Ledger, owner: str, held: Mapping[int, int], lease_s: float) -> set[int]:
    """Extend the leases {chunk id: attempt}; returns the ids that are still the owner's."""

    def work(connection: Connection) -> set[int]:
        kept = _still_held(connection, owner, held)
        for ids in batches(sorted(kept)):
            extended = update(chunks).where(chunks.c.id.in_(ids)).values(leased_until=now() + lease_s)
            connection.execute(extended)
        return kept

    return ledger.write(work, is_flushed=False) if held else set()


def still_leased(ledger: Ledger, owner: str, held: Mapping[int, int]) -> set[int]:
    """Which of {chunk id: attempt} are the owner's, as `renew` says, but without a lock and changing nothing."""
    columns = select(chunks.c.id, chunks.c.attempt).where(chunks.c.owner == owner, is_leased)

    def work(connection: Connection) -> set[int]:
        found: set[int] = set()
        for ids in batches(sorted(held)):
            rows = connection.execute(columns.where(chunks.c.id.in_(ids)))
            found.update(row.id for row in rows if row.attempt == held[row.id])
        return found

    return ledger.read(work) if held else set()


def release(ledger: Ledger, owner: str, held: Mapping[int, int]) -> None:
    """Give the leases {chunk id: attempt} back: the Chunks wait again at once. Lost ones are left alone."""

    def work(connection: Connection) -> None:
        for ids in batches(sorted(_still_held(connection, owner, held))):
            connection.execute(_releasing().where(chunks.c.id.in_(ids)))

    if held:
        ledger.write(work)


def release_all(ledger: Ledger) -> int:
    """Give back every lease there is; for the one run that has the database to itself. Returns how many."""
    return ledger.write(lambda connection: connection.execute(_releasing().where(is_leased)).rowcount)


def lock_chunks(connection: Connection, ids: Iterable[int]) -> dict[int, Held]:
    """Lock these Chunks' rows until the transaction ends, in one order for everybody so that nobody deadlocks."""
    found = {}
    columns = select(chunks.c.id, chunks.c.attempt, chunks.c.owner, chunks.c.state, chunks.c.digest)
    for batch in batches(sorted(set(ids))):
        statement = columns.where(chunks.c.id.in_(batch)).order_by(chunks.c.id).with_for_update(key_share=True)
        for row in connection.execute(statement):
            found[row.id] = Held(attempt=row.attempt, owner=row.owner, state=row.state, digest=row.digest)
    return found


def _still_held(connection: Connection, owner: str, held: Mapping[int, int]) -> set[int]:
    found = lock_chunks(connection, held)
    return {i for i, at in found.items() if (at.attempt, at.owner, at.state) == (held[i], owner, "leased")}


def _releasing() -> Update:
    return update(chunks).values(state="waiting", owner=None, leased_until=None)


def lease_chunk(connection: Connection, chunk_id: int, owner: str, lease_s: float) -> Lease:
    """Lease this Chunk, which must be free, and its row locked."""
    row = connection.execute(_CLAIM, {"chunk": chunk_id, "new_owner": owner, "lease_s": lease_s}).one()
    job = connection.execute(_JOB, {"job": row.job_id}).one()
    job_params = _decode_params(job.params)
    requests = unpack_requests(connection.execute(_REQUESTS, {"chunk": row.id}).scalar_one())
    done: frozenset[tuple[int, int]] = frozenset()
    if row.attempt > 1:
        requests, done = _left(connection, row, job_params, requests)
    return Lease(
        chunk_id=row.id,
        job_id=row.job_id,
        attempt=row.attempt,
        owner=row.owner,
        tenant=row.tenant,
        model=row.model,
        job_params=job_params,
        priority=job.priority,
        requests=requests,
        done=done,
        submitted_at=job.created_at,
        claimed_at=row.claimed_at,
    )


def _left(
    connection: Connection, row: Any, job_params: SamplingParams, requests: list[Request]
) -> tuple[list[Request], frozenset[tuple[int, int]]]:
    """The Requests without all their Results, and which of theirs are there."""
    in_span = (results.c.job_id == row.job_id) & results.c.line.between(row.first_line, row.last_line)
    columns = (results.c.line, results.c.sample, results.c.error_code, results.c.params)
    samples: dict[int, set[int]] = {}
    resolved: dict[int, int] = {}
    refused = set()
    for line, sample, error_code, params in connection.execute(select(*columns).where(in_span)):
        samples.setdefault(line, set()).add(sample)
        if params is not None:
            resolved[line] = _decode_resolved(params).n
        elif error_code is not None:
            # It failed before anybody knew how many samples there are: this one row stands for all.
            refused.add(line)
    left = []
    for request in requests:
        # A number that neither the Request nor its Job states was the model's default.
        num_samples = request.params.over(job_params).n or resolved.get(request.line, 1)
        if request.line not in refused and len(samples.get(request.line, ())) < num_samples:
            left.append(request)
    return left, frozenset((request.line, sample) for request in left for sample in samples.get(request.line, ()))
