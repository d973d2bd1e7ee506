"""Whose Chunk is next: the most urgent class of Jobs first; within it the tenant with the fewest Requests under way,
of its Jobs the one with the fewest, and of equals the oldest; a Job's Chunks in the order of its lines.

Who is behind is read from the leases themselves, over all workers, so nothing has to be kept, and a Job of a few lines
does not wait for one of a million.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from functools import lru_cache

from sqlalchemy import Connection, Select, bindparam, func, select

from storage.clock import now_once
from storage.tables import chunks, is_leased, is_open, is_waiting, jobs

#: Jobs that are looked at, the most urgent and oldest: what is behind them waits until one of them has ended.
_MAX_JOBS = 200

_UNDER_WAY = (
    select(chunks.c.tenant, chunks.c.job_id, func.sum(chunks.c.num_requests))
    .where(chunks.c.model.in_(bindparam("models", expanding=True)), is_leased)
    .group_by(chunks.c.tenant, chunks.c.job_id)
)


def next_chunks(
    connection: Connection, models: Collection[str], ranks: Collection[int], min_age_s: float
) -> Iterator[int]:
    """Waiting Chunks of Jobs of these models and classes, the first of each Job, in that order; made at
    least so long ago.

    Their rows are locked as they are given; those that somebody else has locked are passed over.
    """
    waiting = list(connection.execute(_jobs_with_work(tuple(sorted(ranks))), {"models": list(models)}))
    if not waiting:
        return
    by_tenant: Counter[str] = Counter()
    by_job: Counter[str] = Counter()
    if len(waiting) > 1:
        for tenant, job_id, num_requests in connection.execute(_UNDER_WAY, {"models": list(models)}):
            by_tenant[tenant] += num_requests
            by_job[job_id] = num_requests
    # Sorting is stable, so equals stay in the order of their age.
    waiting.sort(key=lambda job: (job.priority, by_tenant[job.tenant], by_job[job.id]))
    for job in waiting:
        chunk_id = connection.execute(_FIRST, {"job": job.id, "age": min_age_s}).scalar()
        if chunk_id is not None:
            yield chunk_id


# The age is looked at outside of the LIMIT: inside, a burst of young Chunks would be walked from end to end.
_HEAD = (
    select(chunks.c.id, chunks.c.created_at)
    .where(chunks.c.job_id == bindparam("job"), is_waiting)
    .order_by(chunks.c.first_line)
    .limit(1)
    .with_for_update(skip_locked=True)
    .subquery()
)
_FIRST = select(_HEAD.c.id).where(_HEAD.c.created_at <= now_once() - bindparam("age"))


@lru_cache(maxsize=16)
def _jobs_with_work(ranks: tuple[int, ...]) -> Select[tuple[str, str, int]]:
    # In an order, so that PostgreSQL asks the index once for each Job and does not join the tables instead.
    work = select(chunks.c.id).where(chunks.c.job_id == jobs.c.id, is_waiting).order_by(chunks.c.first_line).limit(1)
    return (
        select(jobs.c.id, jobs.c.tenant, jobs.c.priority)
        .where(
            jobs.c.model.in_(bindparam("models", expanding=True)),
            is_open,
            jobs.c.priority.in_(ranks),
            work.scalar_subquery().is_not(None),
        )
        .order_by(jobs.c.priority, jobs.c.created_at, jobs.c.id)
        .limit(_MAX_JOBS)
    )
