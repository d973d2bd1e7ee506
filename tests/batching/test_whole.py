"""Steps of whole Sequences: within the budget, the most urgent first, none left behind."""

import numpy as np
import pytest

from batching.sequence import Sequence
from batching.whole import WholePlan, WholeScheduler
from protocol.errors import InvalidRequest


def scheduler(*, is_padded: bool, max_num_seqs: int = 8, max_batch_tokens: int = 100) -> WholeScheduler:
    return WholeScheduler(
        max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, max_model_len=90, is_padded=is_padded
    )


def text(seq_id: int, length: int, priority: int = 0) -> Sequence:
    return Sequence(seq_id, np.ones(length, dtype=np.int32), max_tokens=0, priority=priority)


def plans(scheduler: WholeScheduler) -> list[WholePlan]:
    found = []
    while (plan := scheduler.schedule()) is not None:
        found.append(plan)
        scheduler.finish(plan)
    assert scheduler.num_running == scheduler.num_waiting == 0
    return found


def ids(plan: WholePlan) -> list[int]:
    return [seq.seq_id for seq in plan.sequences]


def test_a_flat_step_is_filled_with_whatever_fits_behind_the_most_urgent() -> None:
    whole = scheduler(is_padded=False)
    for seq_id, length in enumerate([60, 50, 30, 10, 5]):
        whole.add(text(seq_id, length))

    first, second = plans(whole)

    assert (ids(first), first.num_scheduled_tokens, first.num_padding_tokens) == ([0, 2, 3], 100, 0)
    assert ids(second) == [1, 4]


def test_a_rectangle_takes_like_lengths_and_stays_within_the_budget_with_its_padding() -> None:
    whole = scheduler(is_padded=True)
    for seq_id, length in enumerate([10, 60, 11, 12, 55, 9, 8]):
        whole.add(text(seq_id, length))

    found = plans(whole)

    assert sorted(ids(found[0])) == [0, 2, 3, 5, 6]
    assert found[0].num_padding_tokens == 5 * 12 - 50
    for plan in found:
        width = max(seq.num_prompt_tokens for seq in plan.sequences)
        assert width * len(plan.sequences) == plan.num_scheduled_tokens + plan.num_padding_tokens <= 100


@pytest.mark.parametrize("is_padded", [False, True])
def test_urgent_ones_go_first_and_no_step_has_too_many(is_padded: bool) -> None:
    whole = scheduler(is_padded=is_padded, max_num_seqs=2)
    for seq_id in range(5):
        whole.add(text(seq_id, 10, priority=-1 if seq_id == 4 else 0))

    assert [sorted(ids(plan)) for plan in plans(whole)] == [[0, 4], [1, 2], [3]]


def test_one_that_somebody_more_urgent_waits_for_is_in_the_next_step() -> None:
    whole = scheduler(is_padded=False, max_num_seqs=1)
    for seq_id in range(3):
        whole.add(text(seq_id, 10, priority=2))
    for seq_id in (1, 2, 77):
        whole.change_priority(seq_id, 0)
    whole.change_priority(1, 2)  # and one that he no longer waits for in its turn

    assert [ids(plan) for plan in plans(whole)] == [[2], [0], [1]]


def test_a_cancelled_one_waits_no_longer_and_one_in_a_step_is_finished_with_it() -> None:
    whole = scheduler(is_padded=False, max_num_seqs=1)
    for seq_id in range(3):
        whole.add(text(seq_id, 10))
    plan = whole.schedule()
    assert plan is not None
    for seq_id in (0, 1, 77):
        whole.cancel(seq_id)

    whole.finish(plan)

    assert [ids(plan) for plan in plans(whole)] == [[2]]


@pytest.mark.parametrize(
    ("length", "words"), [(95, r"limit of 90 \(max_model_len\)"), (0, "no tokens"), (10, "already here")]
)
def test_what_fits_no_step_is_refused(length: int, words: str) -> None:
    whole = scheduler(is_padded=False)
    whole.add(text(1, 10))
    with pytest.raises(InvalidRequest, match=words):
        whole.add(text(1 if length == 10 else 2, length))
