"""Any order of claims, expiries, commits and repetitions: every sample one row, counters as the rows say, and only the
attempt that holds the Chunk writes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from protocol.requests import Request, Result
from storage.dead_letters import DEAD_CODES, list_dead_letters
from storage.digest import EMPTY, added
from storage.jobs import append_chunk, cancel_job, reopen_errors
from storage.leases import Lease, claim_next, release, renew, still_leased
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit, count, read_results
from tests.storage.samples import answered, chunk_row, died, expire, failed, new_job, new_lease

_NUM_SAMPLES = 2
_OWNERS = st.sampled_from(["worker-1", "worker-2"])
_CHUNKS = st.integers(0, 1)

#: Jobs of all examples share one ledger, which is faster than one for each.
_numbers = itertools.count()


@dataclass
class _Chunk:
    """What the ledger should say of a Chunk."""

    id: int
    lines: range
    state: str = "waiting"
    owner: str | None = None
    attempt: int = 0
    is_expired: bool = False
    rows: dict[tuple[int, int], Result] = field(default_factory=dict)

    def left(self) -> tuple[list[int], set[tuple[int, int]]]:
        refused = {line for (line, _), row in self.rows.items() if row.failure and row.params is None}
        lines = [
            line for line in self.lines if line not in refused and sum(at == line for at, _ in self.rows) < _NUM_SAMPLES
        ]
        return lines, {key for key in self.rows if key[0] in lines}


class _LeaseMachine(RuleBasedStateMachine):
    leases = Bundle("leases")

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.last: list[ChunkCommit] = []

    @initialize()
    def submit(self) -> None:
        self.model = f"model-{next(_numbers)}"
        self.job = new_job(self.ledger, self.model, model=self.model, n=_NUM_SAMPLES)
        self.chunks = []
        for lines in (range(1, 4), range(4, 6)):
            chunk_id = append_chunk(
                self.ledger,
                self.job.id,
                first_line=lines[0],
                last_line=lines[-1],
                requests=[Request(line=line, prompt="p") for line in lines],
                failures=[],
            )
            assert chunk_id is not None
            self.chunks.append(_Chunk(chunk_id, lines))

    @rule(target=leases, number=_CHUNKS, owner=_OWNERS)
    def claim(self, number: int, owner: str) -> object:
        chunk = self.chunks[number]
        is_free = chunk.state == "waiting" or (chunk.state == "leased" and chunk.is_expired)
        return self._claimed(chunk, new_lease(self.ledger, chunk.id, owner, 600), owner) if is_free else multiple()

    @rule(target=leases, owner=_OWNERS)
    def claim_next(self, owner: str) -> object:
        free = [chunk for chunk in self.chunks if chunk.state == "leased" and chunk.is_expired]
        free = free or [chunk for chunk in self.chunks if chunk.state == "waiting"][:1]
        lease = claim_next(self.ledger, [self.model], owner, 600, min_age_s=0)
        if lease is None:
            assert free == []
            return multiple()
        (chunk,) = [chunk for chunk in free if chunk.id == lease.chunk_id]
        return self._claimed(chunk, lease, owner)

    def _claimed(self, chunk: _Chunk, lease: Lease, owner: str) -> Lease:
        chunk.state, chunk.owner, chunk.is_expired = "leased", owner, False
        chunk.attempt += 1
        assert lease.attempt == chunk.attempt
        lines, done = chunk.left()
        assert [request.line for request in lease.requests] == lines
        assert lease.done == done
        return lease

    @rule(number=_CHUNKS)
    def expire(self, number: int) -> None:
        chunk = self.chunks[number]
        if chunk.state == "leased":
            expire(self.ledger, chunk.id)
            chunk.is_expired = True

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        chunk = self._chunk(lease)
        is_held = self._is_held(lease)
        assert still_leased(self.ledger, lease.owner, {chunk.id: lease.attempt}) == ({chunk.id} if is_held else set())
        assert renew(self.ledger, lease.owner, {chunk.id: lease.attempt}, 600) == ({chunk.id} if is_held else set())
        if is_held:
            chunk.is_expired = False

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        chunk = self._chunk(lease)
        release(self.ledger, lease.owner, {chunk.id: lease.attempt})
        if self._is_held(lease):
            chunk.state, chunk.owner = "waiting", None

    @rule(group=st.lists(leases, min_size=1, max_size=3), data=st.data())
    def commit(self, group: Sequence[Lease], data: st.DataObject) -> None:
        self.last = []
        for lease in group:
            lines = st.sampled_from(self._chunk(lease).lines)
            keys = data.draw(st.lists(st.tuples(lines, st.integers(0, _NUM_SAMPLES - 1)), max_size=4))
            made = [data.draw(st.sampled_from([self._answered, self._cached, failed, died]))(*key) for key in keys]
            # The last of a lease's commits in a group is the one that may finish it.
            is_last = not any(other is lease for other in group[len(self.last) + 1 :])
            self.last.append(ChunkCommit(lease, made, is_finished=is_last and data.draw(st.booleans())))
        self._commit()

    @rule()
    def commit_again(self) -> None:
        self._commit()

    @rule(codes=st.sets(st.sampled_from(["too_long", "engine_died"]), min_size=1))
    def reopen_errors(self, codes: set[str]) -> None:
        num_reopened = 0
        for chunk in self.chunks:
            errors = [key for key, row in chunk.rows.items() if row.failure and row.failure.code in codes]
            if errors and chunk.state in ("waiting", "finished"):
                chunk.state, chunk.owner = "waiting", None
                num_reopened += len(errors)
                for key in errors:
                    del chunk.rows[key]
        assert reopen_errors(self.ledger, self.job.id, codes) == num_reopened

    @rule()
    def cancel(self) -> None:
        cancel_job(self.ledger, self.job.id)
        for chunk in self.chunks:
            if chunk.state in ("waiting", "leased"):
                chunk.state = "cancelled"

    def _commit(self) -> None:
        lost = set()
        writable = []
        for each in self.last:
            chunk = self._chunk(each.lease)
            if self._is_held(each.lease):
                writable.append((chunk, each))
            elif (chunk.state, chunk.owner, chunk.attempt) != ("finished", each.lease.owner, each.lease.attempt):
                lost.add(chunk.id)
        for chunk, each in writable:
            for result in each.results:
                chunk.rows.setdefault((result.line, result.sample), result)
            if each.is_finished:
                chunk.state = "finished"
        assert commit(self.ledger, self.last) == lost

    def _chunk(self, lease: Lease) -> _Chunk:
        (chunk,) = [chunk for chunk in self.chunks if chunk.id == lease.chunk_id]
        return chunk

    def _is_held(self, lease: Lease) -> bool:
        chunk = self._chunk(lease)
        return (chunk.state, chunk.owner, chunk.attempt) == ("leased", lease.owner, lease.attempt)

    def _answered(self, line: int, sample: int) -> Result:
        return answered(line, sample, text=f"draw {next(_numbers)}")

    def _cached(self, line: int, sample: int) -> Result:
        return answered(line, sample, text=f"draw {next(_numbers)}", is_cached=True)

    @invariant()
    def rows_and_counters_are_as_they_should_be(self) -> None:
        expected = {key: row for chunk in self.chunks for key, row in chunk.rows.items()}
        assert read_results(self.ledger, self.job.id) == [expected[key] for key in sorted(expected)]
        dead = {(letter.line, letter.sample) for letter in list_dead_letters(self.ledger, "acme", self.job.id)}
        assert dead == {key for key, row in expected.items() if row.failure and row.failure.code in DEAD_CODES}
        for chunk in self.chunks:
            row = chunk_row(self.ledger, chunk.id)
            assert (row.state, row.attempt) == (chunk.state, chunk.attempt)
            counters = count(chunk.rows.values())
            assert {name: getattr(row, name) for name in counters} == counters
            assert row.digest == added(EMPTY, chunk.rows.values())


def test_leases_and_commits_keep_their_promises_in_any_order(ledger: Ledger) -> None:
    class LeaseMachine(_LeaseMachine):
        def __init__(self) -> None:
            super().__init__(ledger)

    # Without shrinking, which could take many minutes of database time: the steps that failed are printed anyway.
    run = settings(max_examples=25, stateful_step_count=20, deadline=None, phases=[Phase.generate], derandomize=True)
    run_state_machine_as_test(LeaseMachine, settings=run)
