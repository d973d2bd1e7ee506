"""Who is next, who has to give way, and what a step costs with many waiting."""

import math

import pytest

from batching.scheduler import Scheduler
from batching.sequence import SequenceState
from batching.urgency_queue import UrgencyQueue
from tests.batching.counting import num_lines
from tests.batching.loop import Arrival, Limits, Loop, sequential


class CountingFloat(float):
    """A deadline that counts how often it is compared."""

    num_comparisons = 0

    def __lt__(self, other: float) -> bool:
        CountingFloat.num_comparisons += 1
        return float.__lt__(self, other)

    def __eq__(self, other: object) -> bool:
        CountingFloat.num_comparisons += 1
        return float.__eq__(self, other)

    def __neg__(self) -> "CountingFloat":
        return CountingFloat(float.__neg__(self))

    def __rmul__(self, other: float) -> "CountingFloat":
        return CountingFloat(float.__rmul__(self, other))

    __hash__ = float.__hash__


def one_by_one() -> Loop:
    return Loop(Limits(num_blocks=40, block_size=4, max_num_seqs=1, max_batch_tokens=8, lookahead=0))


def test_priority_comes_before_deadline_and_deadline_before_arrival() -> None:
    loop = one_by_one()
    ranks: list[tuple[int, float | None]] = [(0, None), (0, None), (1, 1.0), (0, 9.0), (0, 5.0), (-1, None), (0, 5.0)]
    for seq_id, (priority, deadline) in enumerate(ranks):
        loop.add(seq_id, Arrival([seq_id + 1], 2, priority=priority, deadline=deadline))
    loop.run()

    assert loop.admitted == [5, 4, 6, 3, 0, 1, 2]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_least_urgent_gives_way_also_when_it_came_first(lookahead: int) -> None:
    limits = Limits(num_blocks=6, block_size=4, max_num_seqs=3, max_batch_tokens=16, lookahead=lookahead)
    loop = Loop(limits)
    loop.add(0, Arrival([1, 2, 3], 14, priority=1))
    loop.step()
    loop.add(1, Arrival([4, 5, 6], 14))
    loop.run()

    assert loop.admitted[:3] == [0, 1, 0]
    assert loop.outputs == {0: sequential([1, 2, 3], 14), 1: sequential([4, 5, 6], 14)}


def test_nothing_is_admitted_past_one_that_does_not_fit_yet() -> None:
    loop = Loop(Limits(num_blocks=6, block_size=4, max_num_seqs=4, max_batch_tokens=32, lookahead=0))
    loop.add(0, Arrival(list(range(1, 13)), 6))
    loop.step()
    loop.add(1, Arrival(list(range(20, 40)), 2))
    loop.add(2, Arrival([60], 2))
    loop.run()

    assert loop.admitted == [0, 1, 2]


def test_with_known_lengths_room_that_ends_free_is_counted_and_nobody_is_preempted() -> None:
    # When the first ends, the second still has 2 blocks to go: at no time do both need all of theirs.
    arrivals = {0: Arrival([1, 2, 3, 4], 5), 1: Arrival([5, 6], 15)}
    by_admission: dict[str, Loop] = {}
    for admission in ("peak", "headroom"):
        limits = Limits(5, 4, 4, 32, 0, headroom_tokens=100, admission=admission)
        loop = by_admission[admission] = Loop(limits)
        for seq_id, arrival in arrivals.items():
            loop.add(seq_id, arrival)
        loop.run()
        assert loop.scheduler.num_preemptions == 0

    assert by_admission["peak"].num_steps < by_admission["headroom"].num_steps


def costs(num_waiting: int) -> tuple[int, int, int]:
    """Lines executed and comparisons made by one step that admits one, and comparisons made by one arrival."""
    loop = Loop(Limits(num_blocks=200, block_size=4, max_num_seqs=2, max_batch_tokens=8, lookahead=0))
    deadlines = [CountingFloat(i * 7919 % num_waiting) for i in range(num_waiting)]
    for seq_id, deadline in enumerate(deadlines):
        loop.add(seq_id, Arrival([1, 2], 2, deadline=deadline))
    loop.step()
    loop.step()
    assert loop.scheduler.num_running < 2

    CountingFloat.num_comparisons = 0
    num_executed = num_lines(loop.scheduler.schedule)
    assert loop.scheduler.num_running == 2
    num_step = CountingFloat.num_comparisons
    CountingFloat.num_comparisons = 0
    loop.add(num_waiting, Arrival([1, 2], 2, deadline=CountingFloat(0.5)))
    return num_executed, num_step, CountingFloat.num_comparisons


def test_a_step_costs_the_same_with_ten_and_with_ten_thousand_waiting() -> None:
    few, many = costs(10), costs(10_000)

    assert many[0] == few[0]
    assert few[1] > 0
    # Two children a level, each compared for equality and for order.
    assert many[1] <= 4 * 2 * math.log2(10_000)
    assert many[2] <= 4 * math.log2(10_000)


def test_the_queue_forgets_what_has_left_it_in_the_middle() -> None:
    loop = one_by_one()
    queue = UrgencyQueue(SequenceState.WAITING)
    for seq_id in range(1000):
        loop.add(seq_id, Arrival([1], 1))
        queue.push(loop.alive[seq_id])
        if seq_id >= 10:
            loop.alive[seq_id].state = SequenceState.FINISHED

    assert len(queue) <= 64
    first = queue.first()
    assert first is not None
    assert first.seq_id == 0


def test_ended_sequences_are_not_kept_by_the_order_of_preemption() -> None:
    loop = Loop(Limits(num_blocks=40, block_size=4, max_num_seqs=4, max_batch_tokens=8, lookahead=1))
    for seq_id in range(300):
        loop.add(seq_id, Arrival([1], 1))
    loop.run()

    scheduler: Scheduler = loop.scheduler
    assert len(scheduler._preemptible) <= 64
    assert len(scheduler._waiting) == 0
