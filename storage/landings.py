"""Landings: which of a Job's Chunks have Results, for whoever reads them in the order in which they land."""

from collections.abc import Collection

import msgspec
from sqlalchemy import Connection, func, select

from storage.batches import batches
from storage.ledger import Ledger
from storage.tables import chunks, is_there, is_unfinished, jobs

_num_results = chunks.c.num_ok + chunks.c.num_error
_landed = select(chunks.c.id, chunks.c.first_line, chunks.c.last_line, _num_results, ~is_unfinished)


class LandedChunk(msgspec.Struct, frozen=True):
    """A Chunk with Results, or one that will get no more of them."""

    id: int
    first_line: int
    last_line: int
    num_results: int
    is_settled: bool  # no Result is missing any more


def landed_chunks(
    ledger: Ledger, job_id: str, *, after_line: int = 0, ids: Collection[int] | None = None, limit: int = 1000
) -> list[LandedChunk]:
    """The Job's next landed Chunks behind `after_line`, in the order of their lines; of `ids` alone if these are given.

    Raises DatabaseUnavailable.
    """
    statement = _landed.where(chunks.c.job_id == job_id, chunks.c.first_line > after_line)
    statement = statement.where((_num_results > 0) | ~is_unfinished).order_by(chunks.c.first_line).limit(limit)
    if ids is not None:
        statement = statement.where(chunks.c.id.in_(sorted(ids)))
    return ledger.read(lambda connection: [LandedChunk(*row) for row in connection.execute(statement)])


def landed_by_id(ledger: Ledger, ids: Collection[int]) -> dict[int, LandedChunk]:
    """These Chunks of any Jobs, with Results or not; deleted ones are missing. Raises DatabaseUnavailable."""

    def work(connection: Connection) -> dict[int, LandedChunk]:
        found: dict[int, LandedChunk] = {}
        for batch in batches(sorted(ids)):
            rows = connection.execute(_landed.where(chunks.c.id.in_(batch)))
            found |= {row[0]: LandedChunk(*row) for row in rows}
        return found

    return ledger.read(work)


def num_unfinished_requests(ledger: Ledger, job_id: str) -> int:
    """Requests in the Job's Chunks in which anything is left to do. Raises DatabaseUnavailable."""
    statement = select(func.sum(chunks.c.num_requests)).where(chunks.c.job_id == job_id, is_unfinished)
    return ledger.read(lambda connection: int(connection.scalar(statement) or 0))


def job_progress(ledger: Ledger, job_id: str) -> tuple[str, bool] | None:
    """The Job's state, and whether anything is left to do in its Chunks; None when there is no such Job.

    Cheap at any size, unlike `job_status`. Raises DatabaseUnavailable.
    """
    is_open = select(chunks.c.id).where(chunks.c.job_id == job_id, is_unfinished).exists()
    statement = select(jobs.c.state, is_open).where(is_there, jobs.c.id == job_id)

    def work(connection: Connection) -> tuple[str, bool] | None:
        row = connection.execute(statement).one_or_none()
        return None if row is None else (row[0], bool(row[1]))

    return ledger.read(work)
