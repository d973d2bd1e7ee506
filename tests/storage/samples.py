"""Jobs, Chunks and Results as the storage tests need them."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import insert, select, update

from protocol.priority import Priority
from protocol.requests import Answer, Failure, Request, Result
from protocol.sampling import SamplingParams, resolve
from storage.clock import now
from storage.digest import EMPTY
from storage.jobs import Job, append_chunk, open_job
from storage.leases import Lease, lease_chunk
from storage.ledger import Ledger
from storage.results import COUNTERS
from storage.tables import chunks, jobs

MODEL = "tiny"
PARAMS = resolve(SamplingParams(temperature=0), max_tokens=8)


def new_job(
    ledger: Ledger,
    identity: str = "input-1",
    *,
    model: str = MODEL,
    tenant: str = "acme",
    priority: Priority = "normal",
    **params: Any,
) -> Job:
    given = SamplingParams(**params)
    job, _ = open_job(ledger, tenant=tenant, identity=identity, model=model, params=given, priority=priority)
    return job


def new_chunk(ledger: Ledger, job: Job, lines: Iterable[int] = (1, 2, 3)) -> int:
    lines = list(lines)
    requests = [Request(line=line, prompt=f"prompt {line}") for line in lines]
    chunk_id = append_chunk(ledger, job.id, first_line=lines[0], last_line=lines[-1], requests=requests, failures=[])
    assert chunk_id is not None
    return chunk_id


def new_lease(ledger: Ledger, chunk_id: int, owner: str = "worker-1", lease_s: float = 60) -> Lease:
    """Of this Chunk, whoever's turn it is; it must be free."""
    return ledger.write(lambda connection: lease_chunk(connection, chunk_id, owner, lease_s))


def answered(line: int, sample: int = 0, *, text: str = "an answer", is_cached: bool = False) -> Result:
    answer = Answer(text=text, finish_reason="stop", prompt_tokens=3, completion_tokens=5)
    return Result(line=line, sample=sample, answer=answer, is_cached=is_cached, params=PARAMS, seconds=0.25)


def failed(line: int, sample: int = 0) -> Result:
    """Refused before its parameters were resolved: no other sample of the Request gets a Result."""
    return Result(line=line, sample=sample, failure=Failure("too_long", "5000 tokens are more than 4096"))


def died(line: int, sample: int = 0) -> Result:
    """Failed as one sample of several."""
    failure = Failure("engine_died", "the engine process ended three times")
    return Result(line=line, sample=sample, failure=failure, params=PARAMS)


def expire(ledger: Ledger, chunk_id: int) -> None:
    """Let a lease's time have passed."""
    passed = update(chunks).where(chunks.c.id == chunk_id).values(leased_until=now() - 1)
    ledger.write(lambda connection: connection.execute(passed))


def chunk_row(ledger: Ledger, chunk_id: int) -> Any:
    return ledger.read(lambda connection: connection.execute(select(chunks).where(chunks.c.id == chunk_id)).one())


def add_many_chunks(ledger: Ledger, job: Job, num_chunks: int, *, state: str = "waiting", age_s: float = 100) -> None:
    """Chunk rows alone, for plans and counts; they cannot be claimed, as they have no Requests."""
    line = 1 + ledger.read(lambda connection: len(connection.execute(select(chunks.c.id)).all()))
    shared = {"job_id": job.id, "tenant": job.tenant, "model": job.model, "num_requests": 1, "attempt": 0}
    shared |= {"state": state, **dict.fromkeys(COUNTERS, 0), "digest": EMPTY}
    rows = [{**shared, "first_line": n, "last_line": n} for n in range(line, line + num_chunks)]
    statement = insert(chunks).values(created_at=now() - age_s, leased_until=now() + 1000)
    ledger.write(lambda connection: connection.execute(statement, rows))


def num_rows(ledger: Ledger, table: Any = jobs) -> int:
    return ledger.read(lambda connection: len(connection.execute(select(table)).all()))


def run_threads(targets: Sequence[Callable[[], object]]) -> None:
    """Run these at the same time and wait for all; the first error of any of them is raised here."""
    with ThreadPoolExecutor(max_workers=len(targets)) as pool:
        for future in [pool.submit(target) for target in targets]:
            future.result()
