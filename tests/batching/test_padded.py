"""Rectangles: who is in them, that everything in them ends, and what they waste."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.padded import PaddedScheduler
from batching.sequence import Sequence


def sequence(seq_id: int, num_prompt: int, max_tokens: int) -> Sequence:
    return Sequence(
        seq_id,
        np.arange(num_prompt, dtype=np.int32),
        max_tokens=max_tokens,
        stop_token_ids=(7,),
        score_from=None if max_tokens else 1,
    )


def scheduler(num_tokens: int = 4096, max_num_seqs: int = 4, max_batch_tokens: int = 64) -> PaddedScheduler:
    return PaddedScheduler(num_tokens, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, max_model_len=256)


def test_rectangle_holds_the_oldest_and_those_nearest_to_it_in_length() -> None:
    rectangles = scheduler(max_num_seqs=3)
    for i, length in enumerate([20, 90, 19, 3, 21, 95]):
        rectangles.add(sequence(i, length, 5))

    plan = rectangles.schedule()

    assert plan is not None
    assert {seq.seq_id for seq in plan.rectangle} == {0, 2, 4}
    assert plan.width == 21


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
    max_batch_tokens=st.integers(1, 40),
    num_tokens=st.integers(90, 600),
    cancels=st.sets(st.integers(0, 29)),
    data=st.data(),
)
def test_everything_ends_within_the_limits_and_all_room_comes_back(
    lengths: list[tuple[int, int]], max_batch_tokens: int, num_tokens: int, cancels: set[int], data: st.DataObject
) -> None:
    rectangles = scheduler(num_tokens, max_num_seqs=5, max_batch_tokens=max_batch_tokens)
    sequences = [sequence(i, prompt, outputs) for i, (prompt, outputs) in enumerate(lengths)]
    for seq in sequences:
        rectangles.add(seq)
    scored: dict[int, list[int]] = {}
    finished: set[int] = set()
    num_steps = 0
    while (plan := rectangles.schedule()) is not None:
        num_steps += 1
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
