"""Results: exactly one row for each sample of each Request, written under its Chunk's lease and counted with it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, select, tuple_, update

from protocol.faults import fault_point
from protocol.requests import Answer, Endpoint, Failure, Result
from protocol.sampling import ResolvedParams
from storage import digest
from storage.answers import ANSWER_COLUMNS, insert_answers, to_answer
from storage.dead_letters import insert_dead_letters
from storage.insertion import insert_new
from storage.leases import Held, Lease, lock_chunks
from storage.ledger import Ledger
from storage.tables import chunks, results

_NONE: Mapping[bytes, Answer] = {}
COUNTERS = ("num_ok", "num_error", "num_cached", "prompt_tokens", "completion_tokens", "computed_tokens")

#: A row of the table, as `to_rows` makes it: its columns in their order.
Row = tuple[Any, ...]

_NAMES = tuple(results.c.keys())
#: What `to_result` takes, in this order.
RESULT_COLUMNS = [
    *(results.c.line, results.c.sample, results.c.custom_id, results.c.carried, results.c.endpoint),
    *(results.c.error_code, results.c.error_message, results.c.params, results.c.is_cached, results.c.seconds),
    *(results.c[name] for name in ANSWER_COLUMNS),
]
_NO_ANSWER = (None,) * len(ANSWER_COLUMNS)
_answer_columns = attrgetter(*ANSWER_COLUMNS)

_encode_params = msgspec.json.Encoder().encode
_decode_params = lru_cache(maxsize=1024)(msgspec.json.Decoder(ResolvedParams).decode)


class ChunkCommit(msgspec.Struct, frozen=True):
    """Results of one Chunk that are ready to be written; `is_finished` with the last of them."""

    lease: Lease
    results: list[Result]
    is_finished: bool
    answers: dict[bytes, Answer] = {}  # new ones, to be kept for equal Requests


def commit(ledger: Ledger, commits: Sequence[ChunkCommit], answers: Mapping[bytes, Answer] = _NONE) -> set[int]:
    """Write Results, counters, answers and finished Chunks in one transaction; `answers` are those of no Chunk.

    Returns the ids of the Chunks whose lease was lost: of theirs the answers alone are written, which are true whoever
    computed them, and which Results of other Chunks may have been taken from already. Committing the same again,
    because the outcome of the first time is unknown, changes nothing. Raises DatabaseUnavailable.
    """
    if not commits and not answers:
        return set()
    return ledger.write(lambda connection: commit_within(connection, commits, answers))


def read_results(
    ledger: Ledger,
    job_id: str,
    *,
    after: tuple[int, int] = (0, -1),
    up_to_line: int | None = None,
    limit: int = 1000,
) -> list[Result]:
    """The next Results after (line, sample), in that order. Raises DatabaseUnavailable."""
    statement = select(*RESULT_COLUMNS).where(results.c.job_id == job_id)
    statement = statement.where(tuple_(results.c.line, results.c.sample) > tuple_(*after))
    if up_to_line is not None:
        statement = statement.where(results.c.line <= up_to_line)
    statement = statement.order_by(results.c.line, results.c.sample).limit(limit)
    return ledger.read(lambda connection: [to_result(*row) for row in connection.execute(statement)])


def insert_results(connection: Connection, rows: list[Row]) -> list[Row]:
    """Insert rows made by `to_rows`; returns those that were not there yet. Nobody else may insert the same now."""
    with connection.begin_nested() as savepoint:
        if insert_new(connection, results, _NAMES, rows) == len(rows):
            return rows
        savepoint.rollback()
    stored = {key for job_id in {row[0] for row in rows} for key in _stored_keys(connection, job_id, rows)}
    left = {row[:3]: row for row in reversed(rows) if row[:3] not in stored}
    insert_new(connection, results, _NAMES, list(left.values()))
    return list(left.values())


def _stored_keys(connection: Connection, job_id: str, rows: list[Row]) -> Iterator[tuple[str, int, int]]:
    lines = [row[1] for row in rows if row[0] == job_id]
    among = (results.c.job_id == job_id) & results.c.line.between(min(lines), max(lines))
    for line, sample in connection.execute(select(results.c.line, results.c.sample).where(among)):
        yield job_id, line, sample


def count(stored: Iterable[Result]) -> dict[str, int]:
    """The Chunk's counters for these Results."""
    counter: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
    for result in stored:
        if result.answer is None:
            counter["num_error"] += 1
            continue
        counter["num_ok"] += 1
        counter["prompt_tokens"] += result.answer.prompt_tokens
        counter["completion_tokens"] += result.answer.completion_tokens
        if result.is_cached:
            counter["num_cached"] += 1
        else:
            counter["computed_tokens"] += result.answer.completion_tokens
    return dict(counter)


def to_rows(job_id: str, attempt: int, stored: Iterable[Result]) -> list[Row]:
    """Results as rows of the table; exactly one of answer and failure must be set in each."""
    shown: dict[int, str] = {}  # by identity: a Chunk's Results have most parameters in common
    rows = []
    for result in stored:
        answer, failure, params = result.answer, result.failure, result.params
        assert (answer is None) != (failure is None), f"line {result.line} needs an answer or a failure"
        if params is not None and id(params) not in shown:
            shown[id(params)] = _encode_params(params).decode()
        rows.append(
            (
                job_id,
                result.line,
                result.sample,
                result.custom_id,
                result.carried,
                result.endpoint,
                *(_NO_ANSWER if answer is None else _answer_columns(answer)),
                *((None, None) if failure is None else (failure.code, failure.message)),
                None if params is None else shown[id(params)],
                result.is_cached,
                result.seconds,
                attempt,
            )
        )
    return rows


def to_result(
    line: int,
    sample: int,
    custom_id: str | None,
    carried: str | None,
    endpoint: Endpoint,
    error_code: str | None,
    error_message: str | None,
    params: str | None,
    is_cached: bool,
    seconds: float,
    *answer: Any,
) -> Result:
    """Of the values of RESULT_COLUMNS."""
    return Result(
        line=line,
        sample=sample,
        custom_id=custom_id,
        carried=carried,
        endpoint=endpoint,
        answer=to_answer(*answer) if error_code is None else None,
        failure=None if error_code is None else Failure(error_code, error_message or ""),
        is_cached=is_cached,
        params=None if params is None else _decode_params(params),
        seconds=seconds,
    )


# The rows are locked and their leases have been checked, so the id is fence enough.
_COUNT = (
    update(chunks)
    .where(chunks.c.id == bindparam("chunk"))
    .values(digest=bindparam("new_digest"), **{name: chunks.c[name] + bindparam(f"new_{name}") for name in COUNTERS})
)
_FINISH = update(chunks).where(chunks.c.id == bindparam("chunk")).values(state="finished")


def commit_within(
    connection: Connection, commits: Sequence[ChunkCommit], answers: Mapping[bytes, Answer] = _NONE
) -> set[int]:
    """`commit` as a part of a transaction."""
    held = lock_chunks(connection, (each.lease.chunk_id for each in commits))
    digests = {chunk_id: at.digest for chunk_id, at in held.items()}
    writable, lost = _fence(held, commits)
    rows = [to_rows(each.lease.job_id, each.lease.attempt, each.results) for each in writable]
    flat = list(chain.from_iterable(rows))
    new = insert_results(connection, flat)
    # Only new rows count: an earlier try or an earlier attempt may have stored the others.
    uncounted = None if len(new) == len(flat) else {row[:3] for row in new}
    added = []
    for each, of_chunk in zip(writable, rows, strict=True):
        stored = each.results
        if uncounted is not None:
            firsts = {row[:3]: result for result, row in zip(reversed(stored), reversed(of_chunk), strict=True)}
            stored = [result for key, result in firsts.items() if key in uncounted]
            uncounted -= firsts.keys()
        if stored:
            chunk_id = each.lease.chunk_id
            digests[chunk_id] = digest.added(digests[chunk_id], stored)
            insert_dead_letters(connection, each.lease.job_id, chunk_id, stored)
            added.append({"chunk": chunk_id, "new_digest": digests[chunk_id], **_added(stored)})
    if added:
        connection.execute(_COUNT, added)
    finished = [{"chunk": each.lease.chunk_id} for each in writable if each.is_finished]
    if finished:
        connection.execute(_FINISH, finished)
    insert_answers(connection, {**answers, **{key: answer for each in commits for key, answer in each.answers.items()}})
    fault_point("within commit")
    return lost


def _added(stored: list[Result]) -> dict[str, int]:
    return {f"new_{name}": value for name, value in count(stored).items()}


def _fence(found: Mapping[int, Held], commits: Sequence[ChunkCommit]) -> tuple[list[ChunkCommit], set[int]]:
    """Of locked Chunks: which commits may be written, and the ids of lost Chunks."""
    writable, lost = [], set()
    for each in commits:
        lease, at = each.lease, found.get(each.lease.chunk_id)
        is_ours = at is not None and (at.owner, at.attempt) == (lease.owner, lease.attempt)
        if at is None or not is_ours or at.state not in ("leased", "finished"):
            lost.add(lease.chunk_id)
        elif at.state == "leased":
            writable.append(each)
        # Else finished by this very attempt: an earlier try of this commit has landed, and nothing is left to write.
    return writable, lost
