"""Rectangles: who is in them, that everything in them ends, and what they waste."""

import sys
from types import FrameType
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.padded import PaddedPlan, PaddedScheduler
from batching.sequence import Sequence, SequenceState


def sequence(
    seq_id: int, num_prompt: int, max_tokens: int, *, priority: int = 0, deadline: float | None = None
) -> Sequence:
    return Sequence(
        seq_id,
        np.arange(num_prompt, dtype=np.int32),
        max_tokens=max_tokens,
        stop_token_ids=(7,),
        score_from=None if max_tokens else 1,
        priority=priority,
        deadline=deadline,
    )


def scheduler(
    num_tokens: int = 4096, max_num_seqs: int = 4, max_batch_tokens: int = 64, max_model_len: int = 256
) -> PaddedScheduler:
    return PaddedScheduler(
        num_tokens, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, max_model_len=max_model_len
    )


def step(rectangles: PaddedScheduler) -> PaddedPlan:
    """One step in which nobody stops."""
    plan = rectangles.schedule()
    assert plan is not None
    rectangles.process(plan, np.full(len(plan.sampled), 1))
    return plan


def admissions(rectangles: PaddedScheduler) -> list[set[int]]:
    """Who is in each rectangle from here on."""
    found = []
    while rectangles.num_running or rectangles.num_waiting:
        plan = step(rectangles)
        if plan.is_new:
            found.append({seq.seq_id for seq in plan.rectangle})
    return found


def test_rectangle_holds_the_oldest_and_those_nearest_to_it_in_length() -> None:
    rectangles = scheduler(max_num_seqs=3)
    for i, length in enumerate([20, 90, 19, 3, 21, 95]):
        rectangles.add(sequence(i, length, 5))

    plan = rectangles.schedule()

    assert plan is not None
    assert {seq.seq_id for seq in plan.rectangle} == {0, 2, 4}
    assert plan.width == 21


def test_priority_comes_before_deadline_and_deadline_before_arrival() -> None:
    rectangles = scheduler(max_num_seqs=1)
    for i, priority in enumerate([5, 5, -10]):
        rectangles.add(sequence(i, 4, 2, priority=priority))
    assert admissions(rectangles) == [{2}, {0}, {1}]

    rectangles = scheduler(max_num_seqs=1)
    ranks: list[tuple[int, float | None]] = [(0, None), (0, None), (1, 1.0), (0, 9.0), (0, 5.0), (-1, None), (0, 5.0)]
    for i, (priority, deadline) in enumerate(ranks):
        rectangles.add(sequence(i, 4, 2, priority=priority, deadline=deadline))
    assert admissions(rectangles) == [{5}, {4}, {6}, {3}, {0}, {1}, {2}]


def test_a_row_goes_to_the_more_urgent_priority_before_it_goes_to_the_nearer_length() -> None:
    rectangles = scheduler(max_num_seqs=2)
    for i, (length, priority) in enumerate([(20, 5), (20, 5), (20, -10), (90, -10), (21, 5)]):
        rectangles.add(sequence(i, length, 5, priority=priority))

    assert admissions(rectangles) == [{2, 3}, {0, 1}, {4}]


def test_the_most_urgent_of_many_starts_the_next_rectangle_though_it_came_last() -> None:
    rectangles = scheduler(max_num_seqs=2)
    for i in range(100):
        rectangles.add(sequence(i, 4, 2))
    step(rectangles)
    rectangles.add(sequence(100, 50, 2, deadline=5.0))
    step(rectangles)

    plan = step(rectangles)

    assert plan.is_new
    assert 100 in {seq.seq_id for seq in plan.rectangle}


def test_one_that_somebody_more_urgent_waits_for_starts_the_next_rectangle() -> None:
    rectangles = scheduler(max_num_seqs=1)
    for i in range(4):
        rectangles.add(sequence(i, 4, 2, priority=2))
    step(rectangles)
    for i in (0, 3, 77):  # 0 runs
        rectangles.raise_priority(i, 0)
    rectangles.raise_priority(3, 1)

    assert admissions(rectangles) == [{3}, {1}, {2}]


def test_no_rectangle_has_more_columns_than_the_model_has_positions() -> None:
    rectangles = scheduler(max_model_len=64)
    rectangles.add(sequence(0, 58, 6))
    rectangles.add(sequence(1, 1, 60))  # each fits alone, 58 columns of prompt and 60 of output do not
    rectangles.add(sequence(2, 50, 4))

    assert admissions(rectangles) == [{0, 2}, {1}]


def test_cancelled_rows_give_their_room_back_with_the_next_step() -> None:
    rectangles = scheduler(num_tokens=400)
    for i, (length, max_tokens) in enumerate([(20, 30), (18, 50), (19, 40)]):
        rectangles.add(sequence(i, length, max_tokens))
    step(rectangles)
    assert rectangles.blocks.num_free == 400 - 3 * (20 + 50)

    rectangles.finish(1, 0)
    rectangles.finish(0, 0)
    plan = step(rectangles)

    assert [seq.seq_id for seq in plan.rectangle] == [2]
    assert rectangles.blocks.num_free == 400 - (20 + 40)


def test_rows_that_are_not_worth_a_copy_keep_the_room_of_the_columns_to_come() -> None:
    rectangles = scheduler(num_tokens=400)
    for i, max_tokens in enumerate([50, 4, 4, 4]):
        rectangles.add(sequence(i, 4, max_tokens))
    step(rectangles)
    rectangles.finish(0, 0)

    plan = step(rectangles)  # one row and three steps to come against a copy of three rows

    assert len(plan.rectangle) == 4
    assert rectangles.blocks.num_free == 400 - 4 * (4 + 4)


def test_a_step_costs_the_same_with_ten_and_with_ten_thousand_waiting_or_gone() -> None:
    def num_lines(num_waiting: int, num_gone: int) -> int:
        rectangles = scheduler(max_num_seqs=1)
        for i in range(num_gone + num_waiting):
            rectangles.add(sequence(i, 4, 2))
        for i in range(num_gone):
            rectangles.finish(i, 0)
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            plan = rectangles.schedule()
        finally:
            sys.settrace(before)
        assert plan is not None
        assert [seq.seq_id for seq in plan.rectangle] == [num_gone]
        return lines

    assert num_lines(10_000, 0) == num_lines(10, 0) == num_lines(10, 10_000)


def test_rectangle_takes_no_more_room_than_there_is() -> None:
    rectangles = scheduler(num_tokens=70)
    for i in range(4):
        rectangles.add(sequence(i, 20, 10))

    plan = rectangles.schedule()

    assert plan is not None
    assert len(plan.rectangle) == 2
    assert rectangles.blocks.num_free == 10


def test_rows_that_have_ended_are_dropped_when_it_pays_and_not_before() -> None:
    rectangles = scheduler()
    for i, max_tokens in enumerate([1, 20, 20, 20]):
        rectangles.add(sequence(i, 4, max_tokens))
    sizes, kept = [], []
    while (plan := rectangles.schedule()) is not None:
        sizes.append(len(plan.rectangle))
        kept.append(plan.kept)
        rectangles.process(plan, np.full(len(plan.sampled), 1))

    assert sizes == [4] + [3] * 19
    assert kept[1] == [1, 2, 3]
    assert not any(kept[2:])

    rectangles = scheduler()
    for i, max_tokens in enumerate([1, 3, 3, 3]):
        rectangles.add(sequence(i, 4, max_tokens))
    paddings = []
    while (plan := rectangles.schedule()) is not None:
        paddings.append(plan.num_padding_tokens)
        rectangles.process(plan, np.full(len(plan.sampled), 1))
    assert paddings == [0, 1, 1]  # two steps to come do not pay for a copy of three rows


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), min_size=1, max_size=30),
    ranks=st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([None, 1.0, 2.0])), min_size=30, max_size=30),
    max_model_len=st.integers(90, 130),
    max_batch_tokens=st.integers(1, 40),
    num_tokens=st.integers(90, 600),
    cancels=st.sets(st.integers(0, 29)),
    data=st.data(),
)
def test_everything_ends_within_the_limits_and_all_room_comes_back(
    lengths: list[tuple[int, int]],
    ranks: list[tuple[int, float | None]],
    max_model_len: int,
    max_batch_tokens: int,
    num_tokens: int,
    cancels: set[int],
    data: st.DataObject,
) -> None:
    rectangles = scheduler(num_tokens, 5, max_batch_tokens, max_model_len)
    sequences = [
        sequence(i, prompt, outputs, priority=priority, deadline=deadline)
        for i, ((prompt, outputs), (priority, deadline)) in enumerate(zip(lengths, ranks, strict=False))
    ]
    for seq in sequences:
        rectangles.add(seq)
    scored: dict[int, list[int]] = {}
    finished: set[int] = set()
    num_steps = 0
    while True:
        most_urgent = min(
            (seq for seq in sequences if seq.state is SequenceState.WAITING), key=lambda seq: seq.urgency, default=None
        )
        if (plan := rectangles.schedule()) is None:
            break
        num_steps += 1
        assert not plan.is_new or plan.rectangle[0] is most_urgent
        live = [seq for seq in plan.rectangle if seq.state is SequenceState.RUNNING]
        columns = plan.width + max(seq.max_tokens for seq in live)
        assert plan.first_column + plan.num_columns <= columns <= max_model_len
        assert rectangles.blocks.num_free == num_tokens - len(plan.rectangle) * columns >= 0
        assert plan.num_scheduled_tokens <= max_batch_tokens
        assert len(plan.rectangle) <= 5
        assert plan.num_padding_tokens >= 0
        assert len(plan.rectangle) * (plan.first_column + plan.num_columns) <= num_tokens
        for segment, start, end in plan.scored:
            scored.setdefault(plan.sequences[segment].seq_id, []).extend(range(start, end))
        tokens = data.draw(st.lists(st.integers(5, 9), min_size=len(plan.sampled), max_size=len(plan.sampled)))
        outcome = rectangles.process(plan, np.array(tokens, dtype=np.int64))
        finished.update(seq_id for seq_id, _, _ in outcome.finished)
        for seq_id in [i for i in cancels if i == num_steps]:
            rectangles.finish(seq_id, 0)

    assert (rectangles.num_running, rectangles.num_waiting) == (0, 0)
    assert rectangles.blocks.num_free == num_tokens
    for seq in sequences:
        if seq.seq_id in cancels and seq.seq_id not in finished:
            continue
        assert seq.seq_id in finished
        assert len(seq.output_ids) == seq.max_tokens or seq.output_ids[-1] == 7
        if seq.max_tokens == 0:
            assert scored.get(seq.seq_id, []) == list(range(1, seq.num_prompt_tokens))
