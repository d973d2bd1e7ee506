"""Dead letters: Requests that were given up because of what they did to the engine or the worker, for people to judge.

Each stands beside its error Result and is written with it. Its Request stays where it is, in its Chunk.
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec
from sqlalchemy import ColumnElement, Connection, delete, select

from protocol.errors import DeadLetterNotFound
from protocol.requests import Request, Result, unpack_requests
from storage.insertion import insert_new
from storage.ledger import Ledger
from storage.tables import chunk_requests, dead_letters, jobs

#: Error codes that make a dead letter: somebody should look before it is tried again.
DEAD_CODES = frozenset({"engine_died", "internal_error"})

_NAMES = ("job_id", "line", "sample", "chunk_id", "code", "reason")


class DeadLetter(msgspec.Struct, frozen=True):
    """One given-up sample of a Request."""

    job_id: str
    line: int
    sample: int
    chunk_id: int
    code: str
    reason: str
    created_at: float  # seconds since the epoch


def insert_dead_letters(connection: Connection, job_id: str, chunk_id: int, stored: Iterable[Result]) -> None:
    """For those of the new Results whose error makes one."""
    rows = [
        (job_id, result.line, result.sample, chunk_id, result.failure.code, result.failure.message)
        for result in stored
        if result.failure is not None and result.failure.code in DEAD_CODES
    ]
    if rows:
        insert_new(connection, dead_letters, _NAMES, rows, stamped=("created_at",))


def delete_dead_letters(connection: Connection, job_id: str, gone: Iterable[Result]) -> None:
    """Of Results that are taken back."""
    for result in gone:
        if result.failure is not None and result.failure.code in DEAD_CODES:
            this = (dead_letters.c.line == result.line) & (dead_letters.c.sample == result.sample)
            connection.execute(delete(dead_letters).where(dead_letters.c.job_id == job_id, this))


def list_dead_letters(ledger: Ledger, tenant: str, job_id: str | None = None, limit: int = 1000) -> list[DeadLetter]:
    """The tenant's, or one Job's, newest first. Raises DatabaseUnavailable."""
    statement = select(dead_letters).join(jobs).where(jobs.c.tenant == tenant)
    if job_id is not None:
        statement = statement.where(dead_letters.c.job_id == job_id)
    newest = dead_letters.c.created_at.desc(), dead_letters.c.job_id, dead_letters.c.line, dead_letters.c.sample
    statement = statement.order_by(*newest).limit(limit)
    return ledger.read(lambda connection: [DeadLetter(*row) for row in connection.execute(statement)])


def find_dead_letter(ledger: Ledger, job_id: str, line: int) -> tuple[list[DeadLetter], Request]:
    """A line's dead samples and its Request. Raises DeadLetterNotFound and DatabaseUnavailable."""
    of_line = select(dead_letters).where(_among(job_id, [line])).order_by(dead_letters.c.sample)
    blob = select(chunk_requests.c.requests)

    def work(connection: Connection) -> tuple[list[DeadLetter], bytes]:
        found = [DeadLetter(*row) for row in connection.execute(of_line)]
        if not found:
            raise DeadLetterNotFound(
                f"line {line} of Job {job_id} is no dead letter: `millrace dead-letters list` has them"
            )
        return found, connection.execute(blob.where(chunk_requests.c.chunk_id == found[0].chunk_id)).scalar_one()

    found, packed = ledger.read(work)
    return found, next(request for request in unpack_requests(packed) if request.line == line)


def drop_dead_letters(ledger: Ledger, job_id: str, lines: Sequence[int] | None = None) -> int:
    """Forget these lines' dead letters, or all of the Job's; their error Results stay. Returns how many went."""
    return ledger.write(
        lambda connection: connection.execute(delete(dead_letters).where(_among(job_id, lines))).rowcount
    )


def _among(job_id: str, lines: Collection[int] | None) -> ColumnElement[bool]:
    of_job = dead_letters.c.job_id == job_id
    return of_job if lines is None else of_job & dead_letters.c.line.in_(lines)
