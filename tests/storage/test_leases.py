"""Leases: claiming, renewing, giving back, and what they cost in a large ledger."""

import threading
from collections import Counter
from functools import partial
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, Engine, event, text, update

from protocol.requests import Request
from protocol.sampling import SamplingParams, resolve
from storage.clock import now
from storage.jobs import append_chunk
from storage.leases import claim_next, release, release_all, renew
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from storage.tables import chunks
from tests.storage.samples import (
    MODEL,
    add_many_chunks,
    answered,
    chunk_row,
    died,
    expire,
    failed,
    new_chunk,
    new_job,
    new_lease,
    run_threads,
)


def test_claim_leases_a_waiting_chunk_with_its_requests(ledger: Ledger) -> None:
    job = new_job(ledger, n=2)
    chunk_id = new_chunk(ledger, job, [1, 2])

    lease = claim_next(ledger, [MODEL], "worker-1", 60)

    assert lease is not None
    assert (lease.chunk_id, lease.job_id, lease.attempt, lease.owner) == (chunk_id, job.id, 1, "worker-1")
    assert (lease.tenant, lease.model, lease.job_params) == ("acme", MODEL, job.params)
    assert lease.requests == [Request(line=1, prompt="prompt 1"), Request(line=2, prompt="prompt 2")]
    assert lease.done == frozenset()
    row = chunk_row(ledger, chunk_id)
    assert row.leased_until == pytest.approx(lease.claimed_at + 60, abs=5)
    assert (row.state, row.owner) == ("leased", "worker-1")


def test_claim_gives_nothing_of_a_chunk_that_is_leased_or_finished(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job, [1])
    lease = new_lease(ledger, chunk_id)

    assert claim_next(ledger, [MODEL], "worker-2", 60) is None
    # A message that is delivered twice must not start the Chunk twice.
    assert claim_next(ledger, [MODEL], "worker-1", 60) is None

    commit(ledger, [ChunkCommit(lease, [answered(1)], is_finished=True)])
    assert claim_next(ledger, [MODEL], "worker-1", 60) is None


def test_an_expired_lease_can_be_claimed_with_what_is_left_to_do(ledger: Ledger) -> None:
    job = new_job(ledger, n=2)
    requests = [Request(line=line, prompt="p") for line in range(1, 6)]
    chunk_id = append_chunk(ledger, job.id, first_line=1, last_line=6, requests=requests, failures=[failed(6)])
    assert chunk_id is not None
    # Line 1 is complete, of line 2 one sample is there, line 3 failed as a whole, 4 and 5 have nothing.
    stored = [answered(1, 0), answered(1, 1), answered(2, 1), failed(3)]
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), stored, is_finished=False)])
    expire(ledger, chunk_id)

    lease = claim_next(ledger, [MODEL], "worker-2", 60)

    assert lease is not None
    assert (lease.attempt, lease.owner) == (2, "worker-2")
    assert [request.line for request in lease.requests] == [2, 4, 5]
    assert lease.done == {(2, 1)}


def test_a_request_with_its_own_number_of_samples_is_done_with_that_many(ledger: Ledger) -> None:
    job = new_job(ledger, n=2)
    requests = [Request(line=1, prompt="p", params=SamplingParams(n=1)), Request(line=2, prompt="p")]
    chunk_id = append_chunk(ledger, job.id, first_line=1, last_line=2, requests=requests, failures=[])
    assert chunk_id is not None
    stored = [answered(1), answered(2)]
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), stored, is_finished=False)])
    expire(ledger, chunk_id)

    lease = new_lease(ledger, chunk_id, "worker-2")

    assert [request.line for request in lease.requests] == [2]
    assert lease.done == {(2, 0)}


@pytest.mark.parametrize("of_job", [3, None])
def test_a_request_one_of_whose_samples_failed_is_claimed_for_the_others(ledger: Ledger, of_job: int | None) -> None:
    """The worker was killed between the commits of sample 0's failure and of the other samples'."""
    job = new_job(ledger, n=of_job)
    chunk_id = new_chunk(ledger, job, [1, 2])
    resolved = resolve(SamplingParams(temperature=0, n=3), max_tokens=8)
    # Without a number of their own, what earlier rows were written with says how many there must be.
    first = [msgspec.structs.replace(row, params=resolved) for row in (died(1), *(died(2, i) for i in range(3)))]
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), first, is_finished=False)])
    expire(ledger, chunk_id)

    lease = new_lease(ledger, chunk_id, "worker-2")

    assert [request.line for request in lease.requests] == [1]
    assert lease.done == {(1, 0)}


def test_claim_next_takes_waiting_chunks_in_the_order_they_were_made(ledger: Ledger) -> None:
    job = new_job(ledger)
    made = [new_chunk(ledger, job, [line]) for line in range(1, 6)]

    taken = []
    while (lease := claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=0)) is not None:
        taken.append(lease.chunk_id)

    assert taken == made


def test_claim_next_leaves_young_chunks_to_their_messages(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job)
    assert claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=100) is None

    aged = update(chunks).where(chunks.c.id == chunk_id).values(created_at=now() - 101)
    ledger.write(lambda connection: connection.execute(aged))
    lease = claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=100)
    assert lease is not None
    assert lease.chunk_id == chunk_id


def test_claim_next_takes_expired_leases_before_waiting_chunks(ledger: Ledger) -> None:
    job = new_job(ledger)
    first, second, third = (new_chunk(ledger, job, [line]) for line in (1, 2, 3))
    new_lease(ledger, first)
    new_lease(ledger, second)
    expire(ledger, second)

    taken = [claim_next(ledger, [MODEL], "worker-2", 60, min_age_s=0) for _ in range(3)]

    assert [(lease.chunk_id, lease.attempt) if lease else None for lease in taken] == [(second, 2), (third, 1), None]


def test_claim_next_takes_no_chunk_from_an_owner_that_has_just_woken_up_and_holds_it(ledger: Ledger) -> None:
    """A worker was paused for longer than its leases, claimed its own Chunks anew and threw half-done work away."""
    job = new_job(ledger)
    held, given_up, lost = (new_chunk(ledger, job, [line]) for line in (1, 2, 3))
    leases = [new_lease(ledger, chunk_id) for chunk_id in (held, given_up, lost)]
    expire(ledger, lost)
    new_lease(ledger, lost, "worker-2")
    for chunk_id in (held, given_up, lost):
        expire(ledger, chunk_id)

    believed = {held, lost}
    taken = [claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=0, held=believed) for _ in range(3)]

    assert sorted(lease.chunk_id for lease in taken if lease) == [given_up, lost]
    assert taken[2] is None
    assert commit(ledger, [ChunkCommit(leases[0], [answered(1)], is_finished=False)]) == set()
    # Anybody else may have it, until its owner renews it.
    assert renew(ledger, "worker-1", {held: 1}, 60) == {held}
    assert claim_next(ledger, [MODEL], "worker-2", 60, min_age_s=0) is None
    expire(ledger, held)
    assert claim_next(ledger, [MODEL], "worker-2", 60, min_age_s=0, held=[held]) is not None


def test_claim_next_takes_no_expired_lease_of_others_while_it_may_not_take_over(ledger: Ledger) -> None:
    """The database was away for longer than a lease: their owners may live, and be about to renew."""
    job = new_job(ledger)
    others, given_up, held, waiting = (new_chunk(ledger, job, [line]) for line in (1, 2, 3, 4))
    new_lease(ledger, others, "worker-2")
    for chunk_id in (given_up, held):
        new_lease(ledger, chunk_id)
    for chunk_id in (others, given_up, held):
        expire(ledger, chunk_id)

    def claim(*, may_take_over: bool) -> int | None:
        lease = claim_next(ledger, [MODEL], "worker-1", 60, held=[held], may_take_over=lambda: may_take_over)
        return None if lease is None else lease.chunk_id

    assert [claim(may_take_over=False) for _ in range(3)] == [given_up, waiting, None]
    assert [claim(may_take_over=True) for _ in range(2)] == [others, None]


def test_claim_next_takes_chunks_of_its_model_alone(ledger: Ledger) -> None:
    new_chunk(ledger, new_job(ledger))
    assert claim_next(ledger, ["another"], "worker-1", 60, min_age_s=0) is None


def test_a_released_chunk_waits_again_at_once(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job)
    lease = new_lease(ledger, chunk_id)

    release(ledger, "worker-1", {chunk_id: lease.attempt})

    row = chunk_row(ledger, chunk_id)
    assert (row.state, row.owner, row.leased_until) == ("waiting", None, None)
    assert commit(ledger, [ChunkCommit(lease, [answered(1)], is_finished=False)]) == {chunk_id}
    assert new_lease(ledger, chunk_id, "worker-2").attempt == 2


def test_releasing_and_renewing_leave_alone_what_is_not_held(ledger: Ledger) -> None:
    job = new_job(ledger)
    held, lost, others, done = (new_chunk(ledger, job, [line]) for line in (1, 2, 3, 4))
    new_lease(ledger, held)
    new_lease(ledger, lost)
    expire(ledger, lost)
    new_lease(ledger, lost)  # the same owner again, but at its second attempt
    new_lease(ledger, others, "worker-2")
    commit(ledger, [ChunkCommit(new_lease(ledger, done), [answered(4)], is_finished=True)])
    believed = {held: 1, lost: 1, others: 1, done: 1, done + 1: 1}
    before = {chunk_id: chunk_row(ledger, chunk_id) for chunk_id in (lost, others, done)}

    assert renew(ledger, "worker-1", believed, 600) == {held}
    release(ledger, "worker-1", believed)

    assert chunk_row(ledger, held).state == "waiting"
    assert {chunk_id: chunk_row(ledger, chunk_id) for chunk_id in before} == before


def test_renewing_extends_the_lease_also_when_its_time_has_passed(ledger: Ledger) -> None:
    chunk_id = new_chunk(ledger, new_job(ledger))
    lease = new_lease(ledger, chunk_id)
    expire(ledger, chunk_id)

    assert renew(ledger, "worker-1", {chunk_id: 1}, 600) == {chunk_id}

    assert chunk_row(ledger, chunk_id).leased_until == pytest.approx(lease.claimed_at + 600, abs=30)
    assert claim_next(ledger, [MODEL], "worker-2", 60) is None
    assert renew(ledger, "worker-1", {}, 600) == set()


def test_many_leases_are_renewed_and_released_at_once(ledger: Ledger) -> None:
    job = new_job(ledger)
    add_many_chunks(ledger, job, 1200, state="leased")
    ledger.write(lambda connection: connection.execute(update(chunks).values(owner="worker-1", attempt=1)))
    held = {row.id: 1 for row in ledger.read(lambda connection: connection.execute(chunks.select()).all())}

    assert renew(ledger, "worker-1", held, 60) == set(held)
    release(ledger, "worker-1", held)

    states = ledger.read(lambda connection: connection.execute(chunks.select()).all())
    assert Counter(row.state for row in states) == {"waiting": 1200}


def test_a_run_that_is_alone_gives_back_the_leases_of_all_dead_owners(ledger: Ledger) -> None:
    job = new_job(ledger)
    dead, also_dead, waiting, done = (new_chunk(ledger, job, [line]) for line in (1, 2, 3, 4))
    lease = new_lease(ledger, dead)
    new_lease(ledger, also_dead, "worker-2")
    commit(ledger, [ChunkCommit(new_lease(ledger, done), [answered(4)], is_finished=True)])

    assert release_all(ledger) == 2
    assert release_all(ledger) == 0

    states = {chunk_id: chunk_row(ledger, chunk_id).state for chunk_id in (dead, also_dead, waiting, done)}
    assert states == {dead: "waiting", also_dead: "waiting", waiting: "waiting", done: "finished"}
    assert commit(ledger, [ChunkCommit(lease, [answered(1)], is_finished=True)]) == {dead}


def test_threads_that_claim_at_the_same_time_get_each_chunk_once(ledger: Ledger) -> None:
    job = new_job(ledger)
    made = [new_chunk(ledger, job, [line]) for line in range(1, 201)]
    taken: list[int] = []
    barrier = threading.Barrier(8)

    def take_all(number: int) -> None:
        barrier.wait(30)
        # On PostgreSQL a claim may pass over a Chunk that a neighbour is just taking, and so see none too early.
        misses = 0
        while misses < 3:
            lease = claim_next(ledger, [MODEL], f"worker-{number}", 60, min_age_s=0)
            misses = misses + 1 if lease is None else 0
            if lease is not None:
                taken.append(lease.chunk_id)

    run_threads([partial(take_all, number) for number in range(8)])

    assert Counter(taken) == Counter(made)
    assert {chunk_row(ledger, chunk_id).attempt for chunk_id in made} == {1}


def _statements_of_a_claim(ledger: Ledger) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "chunks" in statement:
            seen.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        assert claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=1000) is None
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(seen) == 3
    return seen


def _explain(connection: Connection, statements: list[tuple[str, Any]]) -> str:
    how = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) "
    plans = [connection.exec_driver_sql(how + statement, parameters) for statement, parameters in statements]
    return "\n".join(str(row) for plan in plans for row in plan)


def test_claim_next_searches_indexes_however_many_chunks_there_are(ledger: Ledger) -> None:
    job = new_job(ledger)
    for state in ("finished", "leased", "waiting"):
        add_many_chunks(ledger, job, 3000, state=state, age_s=1)
    ledger.write(lambda connection: connection.execute(text("ANALYZE")))

    statements = _statements_of_a_claim(ledger)
    plan = ledger.write(lambda connection: _explain(connection, statements))

    assert "ix_chunks_leased" in plan
    assert "ix_chunks_waiting" in plan
    # SQLite says SCAN for a table walked from end to end, PostgreSQL Seq Scan; the latter also counts what it read
    # in vain, which is at most the one Chunk that is too young.
    assert "SCAN chunks" not in plan
    assert "Seq Scan on chunks" not in plan
    assert not [line for line in plan.splitlines() if "Rows Removed" in line and not line.strip("',()").endswith(": 1")]


def test_a_claim_on_sqlite_costs_the_same_with_a_hundred_times_as_many_chunks(sqlite_ledger: Ledger) -> None:
    ledger, job = sqlite_ledger, new_job(sqlite_ledger)
    num_steps = 0

    def count_step() -> None:
        nonlocal num_steps
        num_steps += 1

    def watch(connection: Connection) -> None:
        # The pool has one connection here, so this is the one that claims.
        connection.connection.driver_connection.set_progress_handler(count_step, 1)  # type: ignore[union-attr]

    def cost(num_chunks: int) -> int:
        nonlocal num_steps
        for state in ("finished", "leased", "waiting"):
            add_many_chunks(ledger, job, num_chunks, state=state, age_s=1)
        ledger.read(watch)
        num_steps = 0
        assert claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=1000) is None
        return num_steps

    few = cost(50)
    assert few > 0
    assert cost(5000) <= few
