"""The scheduler drives a fake runner through whatever arrives: texts, limits and blocks must come out right."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from batching.block_manager import BlockManager
from batching.scheduler import Scheduler, StepPlan
from batching.sequence import Sequence, SequenceState
from protocol.errors import InvalidRequest
from tests.batching.fake_runner import VOCAB_SIZE, FakeRunner, next_token

MAX_MODEL_LEN = 24


@dataclass(frozen=True)
class Arrival:
    prompt: list[int]
    max_tokens: int
    stops: frozenset[int]
    step: int
    cancel_step: int | None
    num_kept: int


@dataclass(frozen=True)
class Limits:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    lookahead: int
    headroom_tokens: int = 0


arrivals = st.lists(
    st.builds(
        Arrival,
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8),
        max_tokens=st.integers(1, 10),
        stops=st.just(frozenset()) | st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=12),
        step=st.integers(0, 3) | st.integers(0, 20),
        cancel_step=st.none() | st.none() | st.integers(0, 30),
        num_kept=st.integers(0, 4),
    ),
    min_size=1,
    max_size=14,
)
limits = st.builds(
    Limits,
    num_blocks=st.integers(2, 12),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 8),
    max_batch_tokens=st.integers(1, 20),
    lookahead=st.integers(0, 1),
    headroom_tokens=st.sampled_from([0, 0, 0, 2, 100]),
)


def sequential(prompt: list[int], max_tokens: int, stops: Iterable[int]) -> list[int]:
    """The text by definition: one token after the other, alone."""
    text = list(prompt)
    for _ in range(max_tokens):
        text.append(next_token(np.array(text)))
        if text[-1] in stops:
            break
    return text[len(prompt) :]


@dataclass
class Loop:
    """The engine's loop without an engine."""

    limits: Limits
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, tuple[str, int]] = field(default_factory=dict)
    num_steps: int = 0

    def __post_init__(self) -> None:
        limits = self.limits
        self.scheduler = Scheduler(
            BlockManager(limits.num_blocks, limits.block_size),
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_len=MAX_MODEL_LEN,
            headroom_tokens=limits.headroom_tokens,
        )
        self.runner = FakeRunner(limits.max_num_seqs, limits.num_blocks, limits.block_size, MAX_MODEL_LEN)
        self.in_flight: deque[tuple[StepPlan, np.ndarray]] = deque()
        self.alive: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.in_flight or self.scheduler.num_running or self.scheduler.num_waiting)

    def add(self, seq_id: int, arrival: Arrival) -> None:
        prompt = np.array(arrival.prompt, dtype=np.int32)
        seq = Sequence(seq_id, prompt, max_tokens=arrival.max_tokens, stop_token_ids=arrival.stops)
        self.scheduler.add(seq)
        self.alive[seq_id] = seq
        self.outputs[seq_id] = []

    def step(self) -> None:
        self.num_steps += 1
        while len(self.in_flight) <= self.limits.lookahead:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self.check(plan)
            self.in_flight.append((plan, self.runner.launch(plan)))
        if not self.in_flight:
            assert not self.scheduler.num_waiting, "nothing runs, yet some wait"
            return
        outcome = self.scheduler.process(*self.in_flight.popleft())
        for seq_id, token in zip(outcome.seq_ids, outcome.token_ids, strict=True):
            self.outputs[seq_id].append(token)
        for seq_id, reason, num_tokens in outcome.finished:
            assert seq_id not in self.finished
            self.finished[seq_id] = (reason, num_tokens)

    def check(self, plan: StepPlan) -> None:
        """What holds of every step, whatever arrived."""
        limits = self.limits
        assert 0 < plan.num_scheduled_tokens <= limits.max_batch_tokens
        assert len({seq.seq_id for seq in plan.sequences}) == len(plan.sequences)
        assert all(num == 1 for num in plan.num_tokens[: plan.num_decode])
        running = [seq for seq in self.alive.values() if seq.state is SequenceState.RUNNING]
        assert len(running) == self.scheduler.num_running <= limits.max_num_seqs
        assert len({seq.row for seq in running}) == len(running)
        assert set(map(id, plan.sequences)) <= set(map(id, running))
        assert all(len(seq.output_ids) + seq.num_in_flight <= seq.max_tokens for seq in running)
        owned = [block for seq in running for block in seq.block_table]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.scheduler.blocks.num_free == limits.num_blocks
        # Every token of the plan has its block.
        assert all(len(seq.block_table) * limits.block_size >= seq.num_computed for seq in plan.sequences)


def fits(arrival: Arrival, limits: Limits) -> bool:
    return len(arrival.prompt) + arrival.max_tokens <= min(limits.num_blocks * limits.block_size, MAX_MODEL_LEN)


@settings(max_examples=400, deadline=None)
@given(arrivals, limits)
def test_every_sequence_gets_its_sequential_text_and_no_block_is_lost(todo: list[Arrival], limits: Limits) -> None:
    loop = Loop(limits)
    todo = [arrival for arrival in todo if fits(arrival, limits)]
    last_step = max((max(arrival.step, arrival.cancel_step or 0) for arrival in todo), default=0)
    cancelled: set[int] = set()

    while loop.has_work or loop.num_steps <= last_step:
        for seq_id, arrival in enumerate(todo):
            if arrival.step == loop.num_steps:
                loop.add(seq_id, arrival)
            if arrival.cancel_step == loop.num_steps and seq_id in loop.alive and seq_id not in loop.finished:
                loop.scheduler.finish(seq_id, arrival.num_kept)
                cancelled.add(seq_id)
        loop.step()
        assert loop.num_steps < 5000, "no progress"

    for seq_id, arrival in enumerate(todo):
        expected = sequential(arrival.prompt, arrival.max_tokens, arrival.stops)
        output = loop.outputs[seq_id]
        if seq_id in cancelled:
            assert seq_id not in loop.finished
            assert output == expected[: len(output)]
        else:
            assert output == expected
            reason = "stop" if expected[-1] in arrival.stops else "length"
            assert loop.finished[seq_id] == (reason, len(expected))
    if limits.headroom_tokens == 100:
        assert loop.scheduler.num_preemptions == 0  # room was kept for all they might need
    event(f"preempted: {loop.scheduler.num_preemptions > 0}")
    assert loop.scheduler.blocks.num_free == limits.num_blocks
    assert sorted(loop.scheduler.blocks.allocate(limits.num_blocks)) == list(range(limits.num_blocks))


def arrival(num_prompt: int, max_tokens: int) -> Arrival:
    return Arrival(list(range(1, num_prompt + 1)), max_tokens, frozenset(), 0, None, 0)


def test_decode_rows_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    loop = Loop(Limits(num_blocks=20, block_size=4, max_num_seqs=8, max_batch_tokens=6, lookahead=0))
    loop.add(0, arrival(3, 9))
    loop.step()
    loop.add(1, arrival(14, 2))

    plan = loop.scheduler.schedule()

    assert plan is not None
    assert [seq.seq_id for seq in plan.sequences] == [0, 1]
    assert (plan.num_decode, plan.starts, plan.num_tokens, plan.sampled) == (1, [3, 0], [1, 5], [0])


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_last_admitted_is_preempted_and_returns_before_others_with_its_outputs(lookahead: int) -> None:
    limits = Limits(num_blocks=5, block_size=4, max_num_seqs=4, max_batch_tokens=16, lookahead=lookahead)
    loop = Loop(limits)
    for seq_id in range(3):
        loop.add(seq_id, arrival(6, 10))
    admitted: list[int] = []
    check = loop.check

    def noting(plan: StepPlan) -> None:
        admitted.extend(seq.seq_id for seq in plan.admitted)
        check(plan)

    loop.check = noting  # type: ignore[method-assign]
    while loop.has_work:
        loop.step()

    assert loop.scheduler.num_preemptions >= 1
    assert admitted[:3] == [0, 1, 1]
    assert admitted[-1] == 2
    assert loop.outputs == {i: sequential(list(range(1, 7)), 10, ()) for i in range(3)}


def test_a_cancelled_waiting_sequence_is_neither_run_nor_counted() -> None:
    loop = Loop(Limits(num_blocks=20, block_size=4, max_num_seqs=1, max_batch_tokens=8, lookahead=0))
    for seq_id in range(3):
        loop.add(seq_id, arrival(2, 2))
    loop.step()
    loop.scheduler.finish(1, 0)

    assert loop.scheduler.num_waiting == 1
    while loop.has_work:
        loop.step()
    assert loop.outputs[1] == []
    assert set(loop.finished) == {0, 2}


def test_a_cancelled_id_may_come_again_while_its_old_place_in_the_queue_lingers() -> None:
    loop = Loop(Limits(num_blocks=20, block_size=4, max_num_seqs=1, max_batch_tokens=8, lookahead=1))
    loop.add(0, arrival(2, 3))
    loop.add(1, arrival(5, 2))
    loop.step()
    loop.scheduler.finish(1, 0)
    loop.add(1, arrival(3, 4))
    while loop.has_work:
        loop.step()

    assert loop.outputs[1] == sequential([1, 2, 3], 4, ())


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "words"),
    [
        (20, 5, ["make 25", "limit of 24"]),
        (10, 7, ["make 17", "KV cache of 16"]),
        (0, 3, ["0 prompt tokens"]),
        (3, 0, ["max_tokens=0"]),
    ],
)
def test_a_sequence_that_can_never_finish_is_refused(num_prompt: int, max_tokens: int, words: list[str]) -> None:
    loop = Loop(Limits(num_blocks=8, block_size=2, max_num_seqs=2, max_batch_tokens=8, lookahead=0))

    with pytest.raises(InvalidRequest) as caught:
        loop.add(0, arrival(num_prompt, max_tokens))

    assert all(word in caught.value.message for word in words)
    assert not loop.has_work


def test_a_sequence_that_just_fits_the_cache_finishes_alone() -> None:
    loop = Loop(Limits(num_blocks=8, block_size=2, max_num_seqs=4, max_batch_tokens=3, lookahead=1))
    for seq_id in range(3):
        loop.add(seq_id, arrival(9, 7))
    while loop.has_work:
        loop.step()

    assert set(loop.finished.values()) == {("length", 7)}
