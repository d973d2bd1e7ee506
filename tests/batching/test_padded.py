"""Rectangles: who is in them, that everything in them ends, and what they waste."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from batching.padded import PaddedPlan, PaddedScheduler
from batching.sequence import Sequence, SequenceState
from tests.batching.counting import num_lines
from tests.batching.loop import sequential
from tests.batching.padded_loop import PaddedLoop


def sequence(
    seq_id: int,
    num_prompt: int,
    max_tokens: int,
    *,
    priority: int = 0,
    deadline: float | None = None,
    tenant: str = "",
    stops: Iterable[int] = (),
) -> Sequence:
    return Sequence(
        seq_id,
        np.arange(seq_id, seq_id + num_prompt, dtype=np.int32),
        max_tokens=max_tokens,
        stop_token_ids=stops,
        score_from=None if max_tokens else 1,
        priority=priority,
        deadline=deadline,
        tenant=tenant,
    )


def assert_sequential(loop: PaddedLoop, sequences: Iterable[Sequence]) -> None:
    """They have the texts that they have alone, and every score that they asked for once."""
    for seq in sequences:
        prompt = seq.prompt_ids.tolist()
        expected = sequential(prompt, seq.max_tokens, seq.stop_token_ids)
        assert seq.output_ids == expected
        assert loop.texts[seq] == prompt + expected
        assert loop.finished[seq.seq_id][1] == len(expected)
        if not seq.max_tokens:
            assert loop.scored.get(seq, []) == list(range(1, len(prompt)))


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
    assert plan.num_columns == 21


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
        rectangles.change_priority(i, 0)
    rectangles.change_priority(3, 1)

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
    def cost(num_waiting: int, num_gone: int) -> int:
        rectangles = scheduler(max_num_seqs=1)
        for i in range(num_gone + num_waiting):
            rectangles.add(sequence(i, 4, 2))
        for i in range(num_gone):
            rectangles.finish(i, 0)
        plans: list[PaddedPlan | None] = []
        num_executed = num_lines(lambda: plans.append(rectangles.schedule()))
        assert plans[0] is not None
        assert [seq.seq_id for seq in plans[0].rectangle] == [num_gone]
        return num_executed

    assert cost(10_000, 0) == cost(10, 0) == cost(10, 10_000)


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
    assert kept[1] == {1: [1, 2, 3]}
    assert not any(kept[2:])

    rectangles = scheduler()
    for i, max_tokens in enumerate([1, 3, 3, 3]):
        rectangles.add(sequence(i, 4, max_tokens))
    paddings = []
    while (plan := rectangles.schedule()) is not None:
        paddings.append(plan.num_padding_tokens)
        rectangles.process(plan, np.full(len(plan.sampled), 1))
    assert paddings == [0, 1, 1]  # two steps to come do not pay for a copy of three rows


def test_a_call_under_full_rectangles_starts_within_two_steps() -> None:
    for num_steps in (1, 2, 3, 9):
        # Enough room beside the rectangle; none; prompts that take several steps; no column left to join in.
        for num_tokens, max_batch_tokens, max_model_len in (
            (4096, 64, 256),
            (4 * 30, 64, 256),
            (4096, 8, 256),
            (4096, 64, 31),
        ):
            loop = PaddedLoop(scheduler(num_tokens, 4, max_batch_tokens, max_model_len))
            bulk = [sequence(i, 10 + i % 3, 18, priority=2) for i in range(40)]
            for seq in bulk:
                loop.add(seq)
            for _ in range(num_steps):
                loop.step()
            assert loop.scheduler.num_running == 4
            calls = [sequence(100, 6, 20), sequence(101, 4, 2), sequence(102, 5, 9)]
            for call in calls:
                loop.add(call)
                for _ in range(2):
                    loop.step()
                assert call.num_computed > 0
            loop.run()
            assert_sequential(loop, [*calls, *bulk])


def test_a_call_takes_the_place_of_the_least_urgent_alone_and_the_others_go_on_beside_it() -> None:
    loop = PaddedLoop(scheduler())
    bulk = [sequence(i, 8, 20, priority=1 + i // 3) for i in range(4)]
    for seq in bulk:
        loop.add(seq)
    for _ in range(3):
        loop.step()

    loop.add(sequence(100, 4, 10))
    loop.step()
    loop.step()

    assert loop.scheduler.num_preemptions == 1
    assert bulk[3].state is SequenceState.WAITING
    assert [[seq.seq_id for seq in plan.rectangle] for plan in loop.plans[-2:]] == [[100], [0, 1, 2, 100]]
    loop.run()
    assert_sequential(loop, bulk)


def test_calls_that_keep_coming_stop_neither_each_other_nor_what_has_room_beside_them() -> None:
    loop = PaddedLoop(scheduler(max_num_seqs=16))
    bulk = [sequence(i, 8, 30, priority=2) for i in range(4)]
    for seq in bulk:
        loop.add(seq)
    for i in range(80):
        loop.add(sequence(100 + i, 4, 6))
        loop.step()

    assert loop.scheduler.num_preemptions == 0
    assert {seq.seq_id for seq in bulk} <= set(loop.finished)
    assert len(loop.finished) > 60


def test_what_is_less_urgent_starts_beside_few_calls_and_waits_for_many() -> None:
    for num_calls, is_beside in ((2, True), (3, False)):
        loop = PaddedLoop(scheduler())
        for i in range(num_calls):
            loop.add(sequence(i, 4, 20))
        loop.step()
        for i in range(10, 14):
            loop.add(sequence(i, 4, 20, priority=2))
        for _ in range(4):
            loop.step()

        assert any(seq.priority for seq in loop.plans[-1].rectangle) == is_beside


def test_one_class_alone_runs_in_as_many_steps_as_there_are_columns() -> None:
    """Rectangles are left alone: what arrives meanwhile neither interrupts them nor joins them."""
    loop = PaddedLoop(scheduler())
    for i in range(12):
        loop.add(sequence(i, 6 + i % 2, 10 + i % 4, tenant=str(i % 2), deadline=float(-i)))
        loop.step()
    loop.run()

    assert not any(plan.joins for plan in loop.plans)
    starts = [i for i, plan in enumerate(loop.plans) if plan.is_new] + [len(loop.plans)]
    for start, end in pairwise(starts):
        assert end - start == max(len(loop.texts[seq]) - seq.num_prompt_tokens for seq in loop.plans[start].rectangle)


def test_a_step_without_a_token_is_left_out_when_only_the_padded_rows_are_left() -> None:
    loop = PaddedLoop(scheduler(max_batch_tokens=16))
    long, short = sequence(0, 60, 5), sequence(1, 4, 5)
    loop.add(long)
    loop.add(short)
    loop.step()
    loop.scheduler.finish(0, 0)
    loop.run()

    assert len(loop.plans) == 1 + 5
    assert_sequential(loop, [short])


@settings(deadline=None, max_examples=200)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(1, 60),  # prompt
            st.integers(0, 30),  # outputs
            st.sampled_from([0, 0, 0, 1, 2]),  # priority
            st.sampled_from([None, None, 1.0, 2.0]),  # deadline
            st.integers(0, 5) | st.integers(0, 60),  # step
            st.none() | st.integers(0, 60),  # step of its cancel
            st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=3),  # steps and priorities from then on
        ),
        min_size=1,
        max_size=30,
    ),
    max_model_len=st.integers(90, 130),
    max_batch_tokens=st.integers(1, 40),
    num_tokens=st.integers(90, 600),
    most_cells=st.none() | st.integers(130, 300),
)
def test_everything_gets_its_sequential_text_within_the_limits_and_all_room_comes_back(
    arrivals: list[tuple[int, int, int, float | None, int, int | None, list[tuple[int, int]]]],
    max_model_len: int,
    max_batch_tokens: int,
    num_tokens: int,
    most_cells: int | None,
) -> None:
    def is_too_large(plan: PaddedPlan) -> bool:
        num_cells = plan.num_rows * (plan.first_column + plan.num_columns)
        return most_cells is not None and num_cells > most_cells and plan.num_rows > 1

    loop = PaddedLoop(scheduler(num_tokens, 5, max_batch_tokens, max_model_len), is_too_large)
    sequences = [
        sequence(i, prompt, outputs, priority=priority, deadline=deadline, stops=range(i % 12))
        for i, (prompt, outputs, priority, deadline, _, _, _) in enumerate(arrivals)
    ]
    cancelled: set[int] = set()
    for now in range(62):
        for seq, (_, _, _, _, step, cancel, urged) in zip(sequences, arrivals, strict=True):
            if step == now:
                loop.add(seq)
            for when, to in urged:
                if when == now:
                    loop.scheduler.change_priority(seq.seq_id, to)
            if cancel == now and seq in loop.texts and seq.state is not SequenceState.FINISHED:
                loop.scheduler.finish(seq.seq_id, 0)
                cancelled.add(seq.seq_id)
        if loop.has_work:
            loop.step()
    loop.run()

    assert loop.scheduler.blocks.num_free == num_tokens
    assert len(loop.scheduler._free_rows) == loop.scheduler.max_num_seqs
    assert_sequential(loop, [seq for seq in sequences if seq.seq_id not in cancelled])
    event(f"preempted: {loop.scheduler.num_preemptions > 0}")
    event(f"joined: {any(plan.joins for plan in loop.plans)}")
    event(f"failed: {loop.num_failures > 0}")
