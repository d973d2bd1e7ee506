"""Results: exactly one row for each sample of each Request, written under its Chunk's lease and counted with it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, select, tuple_, update

from protocol.requests import Answer, Failure, Result
from protocol.sampling import ResolvedParams
from storage.answers import insert_answers, to_answer
from storage.insertion import insert_new
from storage.leases import Lease, lock_chunks
from storage.ledger import Ledger
from storage.tables import chunks, results

COUNTERS = ("num_ok", "num_error", "num_cached", "prompt_tokens", "completion_tokens", "computed_tokens")

_encode_params = msgspec.json.Encoder().encode
_decode_params = lru_cache(maxsize=1024)(msgspec.json.Decoder(ResolvedParams).decode)


class ChunkCommit(msgspec.Struct, frozen=True):
    """Results of one Chunk that are ready to be written; `is_finished` with the last of them."""

    lease: Lease
    results: list[Result]
    is_finished: bool
    answers: dict[bytes, Answer] = {}  # new ones, to be kept for equal Requests


def commit(ledger: Ledger, commits: Sequence[ChunkCommit]) -> set[int]:
    """Write Results, counters, answers and finished Chunks in one transaction.

    Returns the ids of the Chunks whose lease was lost: of theirs the answers alone are written, which are true whoever
    computed them, and which Results of other Chunks may have been taken from already. Committing the same again,
    because the outcome of the first time is unknown, changes nothing. Raises DatabaseUnavailable.
    """
    return ledger.write(lambda connection: _commit(connection, commits)) if commits else set()


def read_results(
    ledger: Ledger,
    job_id: str,
    *,
    after: tuple[int, int] = (0, -1),
    up_to_line: int | None = None,
    limit: int = 1000,
) -> list[Result]:
    """The next Results after (line, sample), in that order. Raises DatabaseUnavailable."""
    statement = select(results).where(results.c.job_id == job_id)
    statement = statement.where(tuple_(results.c.line, results.c.sample) > tuple_(*after))
    if up_to_line is not None:
        statement = statement.where(results.c.line <= up_to_line)
    statement = statement.order_by(results.c.line, results.c.sample).limit(limit)
    return ledger.read(lambda connection: [_from_row(row) for row in connection.execute(statement)])


def insert_results(connection: Connection, rows: list[dict[str, Any]]) -> set[tuple[str, int, int]]:
    """Insert rows made by `to_row`; returns the (job_id, line, sample) of those that were not there yet."""
    keys = (results.c.job_id, results.c.line, results.c.sample)
    return {(row.job_id, row.line, row.sample) for row in insert_new(connection, results, rows, returning=keys)}


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


def to_row(job_id: str, attempt: int, result: Result) -> dict[str, Any]:
    """A Result as its table row; exactly one of answer and failure must be set."""
    answer, failure = result.answer, result.failure
    assert (answer is None) != (failure is None), f"line {result.line} needs an answer or a failure"
    return {
        "job_id": job_id,
        "line": result.line,
        "sample": result.sample,
        "custom_id": result.custom_id,
        "endpoint": result.endpoint,
        "text": answer and answer.text,
        "finish_reason": answer and answer.finish_reason,
        "prompt_tokens": answer and answer.prompt_tokens,
        "completion_tokens": answer and answer.completion_tokens,
        "logprobs": answer and answer.logprobs,
        "score": answer and answer.score,
        "embedding": answer and answer.embedding,
        "classification": answer and answer.classification,
        "error_code": failure and failure.code,
        "error_message": failure and failure.message,
        "params": result.params and _encode_params(result.params).decode(),
        "is_cached": result.is_cached,
        "seconds": result.seconds,
        "attempt": attempt,
    }


def _from_row(row: Any) -> Result:
    answer = failure = None
    if row.error_code is None:
        answer = to_answer(row)
    else:
        failure = Failure(row.error_code, row.error_message)
    return Result(
        line=row.line,
        sample=row.sample,
        custom_id=row.custom_id,
        endpoint=row.endpoint,
        answer=answer,
        failure=failure,
        is_cached=row.is_cached,
        params=None if row.params is None else _decode_params(row.params),
        seconds=row.seconds,
    )


# The rows are locked and their leases have been checked, so the id is fence enough.
_COUNT = (
    update(chunks)
    .where(chunks.c.id == bindparam("chunk"))
    .values({name: chunks.c[name] + bindparam(f"new_{name}") for name in COUNTERS})
)
_FINISH = update(chunks).where(chunks.c.id == bindparam("chunk")).values(state="finished")


def _commit(connection: Connection, commits: Sequence[ChunkCommit]) -> set[int]:
    writable, lost = _fence(connection, commits)
    wanted: dict[tuple[str, int, int], tuple[Lease, Result]] = {}
    for each in writable:
        for result in each.results:
            wanted.setdefault((each.lease.job_id, result.line, result.sample), (each.lease, result))
    new = insert_results(connection, [to_row(lease.job_id, lease.attempt, result) for lease, result in wanted.values()])
    # Only new rows count: an earlier try or an earlier attempt may have stored the others.
    stored = defaultdict(list)
    for key in new:
        lease, result = wanted[key]
        stored[lease.chunk_id].append(result)
    if stored:
        connection.execute(_COUNT, [{"chunk": chunk_id, **_added(of_chunk)} for chunk_id, of_chunk in stored.items()])
    finished = [{"chunk": each.lease.chunk_id} for each in writable if each.is_finished]
    if finished:
        connection.execute(_FINISH, finished)
    insert_answers(connection, {key: answer for each in commits for key, answer in each.answers.items()})
    return lost


def _added(stored: list[Result]) -> dict[str, int]:
    return {f"new_{name}": value for name, value in count(stored).items()}


def _fence(connection: Connection, commits: Sequence[ChunkCommit]) -> tuple[list[ChunkCommit], set[int]]:
    """Lock the Chunks; which commits may be written, and the ids of lost Chunks."""
    found = lock_chunks(connection, (each.lease.chunk_id for each in commits))
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
