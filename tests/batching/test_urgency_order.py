"""UrgencyOrder against a sorted list, and what one change costs in a large one."""

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import urgency_order
from batching.sequence import Sequence
from batching.urgency_order import UrgencyOrder
from tests.batching.test_order import CountingFloat


def ranked(arrival: int, priority: int = 0, deadline: float | None = None) -> Sequence:
    seq = Sequence(arrival, np.zeros(1, dtype=np.int32), max_tokens=1, priority=priority, deadline=deadline)
    seq.arrival = arrival
    return seq


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), max_piece=st.integers(2, 9), share=st.floats(0.1, 0.9))
def test_it_is_always_sorted_whatever_comes_and_leaves(seed: int, max_piece: int, share: float) -> None:
    rng = random.Random(seed)
    order = UrgencyOrder()
    expected: list[Sequence] = []
    usual, urgency_order._MAX_PIECE = urgency_order._MAX_PIECE, max_piece
    try:
        for arrival in range(150):
            if expected and rng.random() < share:
                order.remove(expected.pop(rng.randrange(len(expected))))
            else:
                seq = ranked(arrival, rng.randint(-2, 2), rng.choice([None, 1.0, 2.0]))
                order.add(seq)
                expected.append(seq)
            expected.sort(key=lambda seq: seq.urgency)
            num = rng.randint(0, 20)
            assert order.first(num) == expected[:num]
            assert len(order) == len(expected)
    finally:
        urgency_order._MAX_PIECE = usual
    assert list(order) == expected


def test_a_change_compares_a_few_however_many_there_are_and_were() -> None:
    num = 20_000
    order = UrgencyOrder()
    members = [ranked(i, deadline=CountingFloat(i * 7919 % num)) for i in range(num)]
    for seq in members:
        order.add(seq)
    by_urgency = sorted(members, key=lambda seq: seq.urgency)
    for seq in by_urgency[: num // 2]:
        order.remove(seq)

    # A dict keeps the places of those that have left its front, and walks over them ever after.
    assert sum(map(len, order._pieces)) == len(order) == num // 2
    assert all(order._pieces)

    CountingFloat.num_comparisons = 0
    order.add(ranked(num, deadline=CountingFloat(0.5)))
    order.remove(by_urgency[-1])
    assert 0 < CountingFloat.num_comparisons <= 3 * 2 * math.log2(num) + 8
    CountingFloat.num_comparisons = 0
    assert [seq.arrival for seq in order.first(2)] == [num, by_urgency[num // 2].arrival]
    # Finding a member by its key compares it with itself alone.
    assert CountingFloat.num_comparisons <= 4
