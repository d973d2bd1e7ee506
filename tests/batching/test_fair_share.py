"""Who gets how many tokens among tenants and Jobs, and how soon a more urgent class gets on."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.fair_share import FairShare
from batching.sequence import Sequence, SequenceState
from batching.urgency_queue import UrgencyQueue
from tests.batching.loop import Arrival, Limits, Loop, sequential

#: Jobs as (tenant, tokens of each of its Sequences).
JOBS = st.lists(st.tuples(st.sampled_from("ABC"), st.lists(st.integers(2, 9), min_size=1)), min_size=1, max_size=6)


class Server:
    """One that serves a Sequence at a time."""

    def __init__(self) -> None:
        self.share = FairShare()
        self.queue = UrgencyQueue(SequenceState.WAITING)
        self.served: Counter[tuple[str, str]] = Counter()  # tokens
        self.num = 0

    def add(self, tenant: str, job: str, num_tokens: int, priority: int = 0) -> None:
        self.num += 1
        prompt = np.zeros(num_tokens - 1, dtype=np.int32)
        seq = Sequence(self.num, prompt, max_tokens=1, tenant=tenant, job=job, priority=priority)
        seq.arrival = self.num
        self.share.join(seq)
        self.queue.push(seq)

    def serve(self) -> Sequence:
        seq = self.queue.first()
        assert seq is not None
        self.queue.pop()
        self.share.admit(seq)
        self.share.leave(seq)
        seq.state = SequenceState.FINISHED
        self.served[seq.tenant, seq.job] += seq.num_prompt_tokens + 1
        return seq


def with_work(server: Server, jobs: list[tuple[str, int]], num_served: int) -> Server:
    """All of (tenant, tokens each) always have two Sequences waiting while so many are served."""
    for _ in range(2):
        for i, (tenant, num_tokens) in enumerate(jobs):
            server.add(tenant, str(i), num_tokens)
    for _ in range(num_served):
        seq = server.serve()
        server.add(seq.tenant, seq.job, seq.num_prompt_tokens + 1)
    return server


@given(st.lists(st.integers(2, 9), min_size=2, max_size=6))
def test_jobs_of_one_tenant_get_equal_tokens_whatever_their_sequences_size(sizes: list[int]) -> None:
    served = with_work(Server(), [("A", size) for size in sizes], 300).served

    # Start-time fair queueing is off by two of the largest at most, and by what the first round did not yet know.
    most = max(sizes) * (2 + 2 * len(sizes))
    assert max(served.values()) - min(served.values()) <= most


@given(st.integers(1, 5), st.integers(1, 5), st.integers(2, 9))
def test_a_tenant_gets_no_more_for_having_many_jobs(num_a: int, num_b: int, size: int) -> None:
    server = with_work(Server(), [("A", size)] * num_a + [("B", size)] * num_b, 400)
    by_tenant: Counter[str] = Counter()
    for (tenant, _), tokens in server.served.items():
        by_tenant[tenant] += tokens

    assert abs(by_tenant["A"] - by_tenant["B"]) <= 4 * size * (num_a + num_b)


@given(JOBS)
def test_all_are_served_and_nothing_is_kept_of_those_who_have_left(jobs: list[tuple[str, list[int]]]) -> None:
    server = Server()
    for i, (tenant, sizes) in enumerate(jobs):
        for size in sizes:
            server.add(tenant, str(i), size, priority=i % 2)
    served = [server.serve() for _ in range(server.num)]

    assert server.queue.first() is None
    assert [seq.priority for seq in served] == sorted(seq.priority for seq in served)
    share = server.share
    assert not share._num_alive
    assert not share._ends
    assert not share._num_jobs


def test_a_job_that_comes_later_neither_waits_for_all_before_it_nor_catches_up() -> None:
    server = Server()
    for _ in range(1000):
        server.add("A", "large", 5)
    for _ in range(500):
        server.serve()
    for _ in range(10):
        server.add("B", "small", 5)

    jobs = [server.serve().job for _ in range(20)]
    assert Counter(jobs) == {"large": 10, "small": 10}
    assert all(Counter(jobs[:n])["small"] >= n // 2 - 1 for n in range(20))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_call_under_a_full_engine_starts_within_two_steps(lookahead: int) -> None:
    limits = Limits(num_blocks=16, block_size=4, max_num_seqs=4, max_batch_tokens=8, lookahead=lookahead)
    loop = Loop(limits)
    for seq_id in range(100):
        loop.add(seq_id, Arrival([seq_id, 1, 2], 10, priority=2))
    for _ in range(5):
        loop.step()
    assert loop.scheduler.num_running == 4
    # Several at once, one with a prompt longer than a step.
    calls = {100: [7, 8, 9], 101: [7, 8, 9, 10], 102: list(range(10))}
    for seq_id, prompt in calls.items():
        loop.add(seq_id, Arrival(prompt, 3, priority=0))
    num_before = len(loop.admitted)
    loop.step()
    loop.step()

    assert set(loop.admitted[num_before:]) >= set(calls) - {102}
    loop.run()
    assert {seq_id: loop.outputs[seq_id] for seq_id in calls} == {i: sequential(p, 3) for i, p in calls.items()}
    assert all(loop.outputs[seq_id] == sequential([seq_id, 1, 2], 10) for seq_id in range(100))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_what_a_call_has_in_common_with_bulk_starts_within_two_steps(lookahead: int, num_samples: int) -> None:
    loop = Loop(Limits(num_blocks=16, block_size=4, max_num_seqs=4, max_batch_tokens=8, lookahead=lookahead))
    for seq_id in range(0, 300, num_samples):
        loop.add(seq_id, Arrival([seq_id, 1, 2], 10, priority=2, num_samples=num_samples))
    for _ in range(5):
        loop.step()
    assert loop.scheduler.num_running == 4
    # The last of a Request's samples, whose prompt is the first one's to compute.
    wanted = 299
    assert wanted not in loop.admitted
    for seq_id in (wanted, 1000):
        loop.scheduler.change_priority(seq_id, 0)
    loop.step()
    loop.step()

    assert wanted in loop.admitted
    # It gives way to nobody of its old class any more.
    while wanted not in loop.finished:
        loop.step()
        assert loop.admitted.count(wanted) == 1
    loop.run()
    assert loop.outputs[wanted] == sequential([300 - num_samples, 1, 2], 10, sample=num_samples - 1)
    share = loop.scheduler._fair_share
    assert not share._num_alive
    assert not share._num_jobs


def test_a_running_one_that_a_call_waits_for_is_not_preempted_for_its_old_class() -> None:
    loop = Loop(Limits(num_blocks=4, block_size=4, max_num_seqs=4, max_batch_tokens=8, lookahead=0))
    loop.add(0, Arrival([1, 2, 3], 4, priority=1))
    loop.add(1, Arrival([4, 5, 6], 12, priority=2))
    loop.step()
    loop.scheduler.change_priority(1, 0)
    loop.add(2, Arrival([7, 8, 9], 12, priority=0))
    loop.run()

    assert loop.admitted.count(1) == 1
    assert loop.outputs[1] == sequential([4, 5, 6], 12)
    assert loop.outputs[0] == sequential([1, 2, 3], 4)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_what_a_call_no_longer_waits_for_gives_way_again(lookahead: int) -> None:
    loop = Loop(Limits(num_blocks=8, block_size=4, max_num_seqs=2, max_batch_tokens=8, lookahead=lookahead))
    for seq_id in range(4):
        loop.add(seq_id, Arrival([seq_id, 1, 2], 12, priority=2, job=str(seq_id)))
    loop.step()
    running, waiting = 1, 3
    assert loop.scheduler.num_running == 2
    for seq_id in (running, waiting):
        for priority in (0, 2, 0, 2):
            loop.scheduler.change_priority(seq_id, priority)
    loop.add(4, Arrival([7, 8, 9], 12, priority=0))
    loop.add(5, Arrival([8, 8, 9], 12, priority=1))
    loop.run()

    assert loop.admitted.count(running) == 2, "it was preempted for those of more urgent classes"
    assert loop.admitted.index(5) < loop.admitted.index(waiting)
    assert next(iter(loop.finished)) == 4
    prompts = {4: [7, 8, 9], 5: [8, 8, 9], **{i: [i, 1, 2] for i in range(4)}}
    assert loop.outputs == {seq_id: sequential(prompt, 12) for seq_id, prompt in prompts.items()}


def test_a_call_goes_before_a_long_prompt_that_is_being_computed() -> None:
    loop = Loop(Limits(num_blocks=16, block_size=4, max_num_seqs=4, max_batch_tokens=4, lookahead=0))
    loop.add(0, Arrival(list(range(20)), 2, priority=2))
    loop.step()
    loop.add(1, Arrival([1, 2, 3], 2))
    loop.step()

    assert len(loop.outputs[1]) == 1
    loop.run()
    assert loop.outputs[0] == sequential(list(range(20)), 2)


def test_nothing_is_taken_from_those_of_the_same_class() -> None:
    loop = Loop(Limits(num_blocks=8, block_size=4, max_num_seqs=2, max_batch_tokens=8, lookahead=0))
    for seq_id in range(6):
        loop.add(seq_id, Arrival([seq_id, 1, 2], 8, tenant="AB"[seq_id % 2], job=str(seq_id)))
    loop.run()

    assert loop.scheduler.num_preemptions == 0
