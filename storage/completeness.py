"""Completeness: the proof that every Request of a finished Job has its Results, and that they are still the same."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, Select, select, tuple_

from protocol.errors import JobNotFound
from protocol.requests import unpack_requests
from storage import digest
from storage.ledger import Ledger
from storage.results import RESULT_COLUMNS, to_result
from storage.tables import chunk_requests, chunks, jobs, results

#: Rows read from the ledger at a time.
_PAGE = 1000
#: Lines that a verification names; it counts them all.
_MAX_NAMED = 20


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What a Job was closed with."""

    num_lines: int  # of the input, blank ones included
    num_results: int
    num_errors: int  # of num_results
    num_cached: int  # of num_results
    digest: str  # 64 hex digits


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """A Job's proof beside the same made anew of the Results that are there now."""

    stated: Proof | None  # None: the Job is not finished
    found: Proof
    num_incomplete: int  # Requests that lack a Result
    incomplete: list[int]  # the first of them, by their lines
    altered: list[tuple[int, int]]  # first and last lines of Chunks whose Results are not those that were committed

    @property
    def holds(self) -> bool:
        return self.stated == self.found and not self.num_incomplete and not self.altered


def close_proof(connection: Connection, job_id: str) -> dict[str, Any]:
    """The Job's columns of the proof, from what its Chunks say."""
    columns = (chunks.c.digest, chunks.c.num_ok, chunks.c.num_error, chunks.c.num_cached)
    rows = connection.execute(select(*columns).where(chunks.c.job_id == job_id)).all()
    return {
        "num_results": sum(row.num_ok + row.num_error for row in rows),
        "num_errors": sum(row.num_error for row in rows),
        "num_cached": sum(row.num_cached for row in rows),
        "digest": digest.total(row.digest for row in rows).hex(),
    }


#: The columns of `close_proof` in a Job that is not finished.
NO_PROOF: dict[str, Any] = dict.fromkeys(("num_results", "num_errors", "num_cached", "digest"))


def verify(ledger: Ledger, job_id: str) -> Verification:
    """Read all the Job's Results and count and add them up again. Raises JobNotFound and DatabaseUnavailable.

    A Request lacks a Result when its line has none, or not one for each of its samples.
    """
    job = ledger.read(lambda connection: connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none())
    if job is None:
        raise JobNotFound(f"there is no Job {job_id!r}")
    counts = dict.fromkeys(("num_results", "num_errors", "num_cached"), 0)
    found: list[bytes] = []
    incomplete: list[int] = []
    altered: list[tuple[int, int]] = []
    for chunk, of_chunk in _by_chunk(_chunks(ledger, job_id), _rows(ledger, job_id)):
        found.append(digest.added(digest.EMPTY, (to_result(*row[:-1]) for row in of_chunk)))
        if found[-1] != chunk.digest:
            altered.append((chunk.first_line, chunk.last_line))
        counts["num_results"] += len(of_chunk)
        counts["num_errors"] += sum(each.error_code is not None for each in of_chunk)
        counts["num_cached"] += sum(each.is_cached for each in of_chunk)
        incomplete += _incomplete(ledger, chunk, of_chunk)
    stated = None
    if job.digest is not None:
        stated = Proof(num_lines=job.num_lines, digest=job.digest, **{name: getattr(job, name) for name in counts})
    return Verification(
        stated=stated,
        found=Proof(num_lines=job.num_lines or 0, digest=digest.total(found).hex(), **counts),
        num_incomplete=len(incomplete),
        incomplete=incomplete[:_MAX_NAMED],
        altered=altered,
    )


def _incomplete(ledger: Ledger, chunk: Any, rows: list[Any]) -> list[int]:
    """The lines of the Chunk's Requests that lack a Result."""
    samples: dict[int, list[int]] = {}
    num_samples: dict[int, int] = {}
    for row in rows:
        samples.setdefault(row.line, []).append(row.sample)
        # Without parameters it was refused as a whole, and one row stands for all samples.
        params = to_result(*row[:-1]).params
        num_samples[row.line] = 1 if params is None else params.n
    short = [line for line, there in samples.items() if len(there) != num_samples[line]]
    num_answered = len({row.line for row in rows if row.attempt > 0})
    if num_answered < chunk.num_requests:
        blob = select(chunk_requests.c.requests).where(chunk_requests.c.chunk_id == chunk.id)
        packed = ledger.read(lambda connection: connection.execute(blob).scalar_one())
        short += [request.line for request in unpack_requests(packed) if request.line not in samples]
    return sorted(short)


def _by_chunk(chunks_in_order: Iterator[Any], rows: Iterator[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Each Chunk with the rows of its lines; what no Chunk covers is the last one's."""
    row, chunk = next(rows, None), next(chunks_in_order, None)
    while chunk is not None:
        of_chunk, following = [], next(chunks_in_order, None)
        while row is not None and (following is None or row.line <= chunk.last_line):
            of_chunk.append(row)
            row = next(rows, None)
        yield chunk, of_chunk
        chunk = following


def _chunks(ledger: Ledger, job_id: str) -> Iterator[Any]:
    statement = select(chunks).where(chunks.c.job_id == job_id).order_by(chunks.c.first_line)
    return _paged(ledger, statement, lambda last: chunks.c.first_line > last.first_line)


def _rows(ledger: Ledger, job_id: str) -> Iterator[Any]:
    key = (results.c.line, results.c.sample)
    statement = select(*RESULT_COLUMNS, results.c.attempt).where(results.c.job_id == job_id).order_by(*key)
    return _paged(ledger, statement, lambda last: tuple_(*key) > tuple_(last.line, last.sample))


def _paged(
    ledger: Ledger, statement: Select[*tuple[Any, ...]], behind: Callable[[Any], ColumnElement[bool]]
) -> Iterator[Any]:
    page = ledger.read(partial(_all, statement.limit(_PAGE)))
    while page:
        yield from page
        page = ledger.read(partial(_all, statement.where(behind(page[-1])).limit(_PAGE)))


def _all(statement: Select[*tuple[Any, ...]], connection: Connection) -> Sequence[Row[Any]]:
    return connection.execute(statement).all()
