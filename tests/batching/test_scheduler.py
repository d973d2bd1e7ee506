"""The scheduler drives a fake runner through whatever arrives: texts, limits and blocks must come out right."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidRequest
from tests.batching.fake_runner import VOCAB_SIZE
from tests.batching.loop import MAX_MODEL_LEN, Arrival, Limits, Loop, sequential

tokens = st.integers(0, VOCAB_SIZE - 1)
#: Few different beginnings, so that many are shared.
prompts = st.builds(
    lambda first, num, rest: ([first] * num + rest)[:10],
    st.sampled_from([0, 1]),
    st.integers(0, 9),
    st.lists(tokens, max_size=3),
).filter(bool)
one_arrival = st.builds(
    Arrival,
    prompt=prompts,
    max_tokens=st.integers(1, 10),
    score_from=st.sampled_from([None, None, None, 0, 5]),
    stops=st.just(frozenset()) | st.frozensets(tokens, max_size=12),
    step=st.integers(0, 3) | st.integers(0, 20),
    cancels=st.just(()) | st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(0, 4))).map(tuple),
    num_samples=st.sampled_from([1, 1, 2, 3, 5]),
    priority=st.sampled_from([0, 0, 0, -1, 1]),
    urged=st.just(())
    | st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(-1, 1)), max_size=4).map(tuple),
    deadline=st.sampled_from([None, None, 1.0, 2.0]),
)
only_scored = one_arrival.map(lambda a: replace(a, max_tokens=0, score_from=a.score_from or 0))
arrivals = st.lists(one_arrival | one_arrival | one_arrival | only_scored, min_size=1, max_size=10)
limits = st.builds(
    Limits,
    num_blocks=st.integers(2, 12),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 8),
    max_batch_tokens=st.integers(1, 20),
    lookahead=st.integers(0, 1),
    headroom_tokens=st.sampled_from([0, 0, 0, 2, 100]),
    admission=st.sampled_from(["headroom", "headroom", "auto", "peak"]),
    prefix_reuse=st.booleans(),
)


def fits(arrival: Arrival, limits: Limits) -> bool:
    return len(arrival.prompt) + arrival.max_tokens <= min(limits.num_blocks * limits.block_size, MAX_MODEL_LEN)


@settings(max_examples=400, deadline=None)
@given(arrivals, limits, st.just(frozenset()) | st.frozensets(st.integers(1, 30), max_size=4))
def test_every_sequence_gets_its_sequential_text_and_no_block_is_lost(
    todo: list[Arrival], limits: Limits, failing: frozenset[int]
) -> None:
    loop = Loop(limits, failing=failing)
    todo = [arrival for arrival in todo if fits(arrival, limits)]
    cancels = Counter((step, 10 * i + sample, kept) for i, a in enumerate(todo) for sample, step, kept in a.cancels)
    urged = [(step, 10 * i + sample, to) for i, a in enumerate(todo) for sample, step, to in a.urged]
    last_step = max([arrival.step for arrival in todo] + [step for step, _, _ in cancels], default=0)
    cancelled: set[int] = set()

    while loop.has_work or loop.num_steps <= last_step:
        for i, arrival in enumerate(todo):
            if arrival.step == loop.num_steps:
                loop.add(10 * i, arrival)
        for step, seq_id, num_kept in cancels:
            if step == loop.num_steps and seq_id in loop.alive and seq_id not in loop.finished:
                loop.finish(seq_id, num_kept)
                cancelled.add(seq_id)
        for step, seq_id, priority in urged:
            if step == loop.num_steps:
                loop.scheduler.change_priority(seq_id, priority)
        loop.step()
        assert loop.num_steps < 5000, "no progress"

    for i, arrival in enumerate(todo):
        for sample in range(arrival.num_samples):
            expected = sequential(arrival.prompt, arrival.max_tokens, arrival.stops, sample)
            output = loop.outputs[10 * i + sample]
            if 10 * i + sample in cancelled:
                assert 10 * i + sample not in loop.finished
                assert output == expected[: len(output)]
            else:
                assert output == expected
                reason = "stop" if expected[-1:] and expected[-1] in arrival.stops else "length"
                assert loop.finished[10 * i + sample] == (reason, len(expected))
                if arrival.score_from is not None and arrival.score_from < len(arrival.prompt) > 1:
                    assert loop.num_scored[loop.alive[10 * i + sample]] == len(arrival.prompt)
    has_room = limits.admission == "peak" or (limits.admission == "headroom" and limits.headroom_tokens == 100)
    if has_room and len({arrival.priority for arrival in todo}) == 1 and not urged and not loop.num_failures:
        assert loop.scheduler.num_preemptions == 0  # room was kept for all they might need
    event(f"preempted: {loop.scheduler.num_preemptions > 0}")
    event(f"failed: {loop.num_failures > 0}")
    event(f"prefixes hit: {loop.num_hit_tokens > 0}")
    event(f"copied: {loop.num_copies > 0}")
    loop.check_blocks()
    blocks = loop.scheduler.blocks
    assert limits.prefix_reuse or blocks.num_named == 0
    assert sorted(blocks.allocate(limits.num_blocks)) == list(range(limits.num_blocks))
    assert blocks.num_named == 0


def arrival(num_prompt: int, max_tokens: int) -> Arrival:
    return Arrival(list(range(1, num_prompt + 1)), max_tokens)


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
    limits = Limits(
        num_blocks=5, block_size=4, max_num_seqs=4, max_batch_tokens=16, lookahead=lookahead, prefix_reuse=False
    )
    loop = Loop(limits)
    for seq_id in range(3):
        loop.add(seq_id, arrival(6, 10))
    loop.run()

    assert loop.scheduler.num_preemptions >= 1
    assert loop.admitted[:3] == [0, 1, 1]
    assert loop.admitted[-1] == 2
    assert loop.outputs == {i: sequential(list(range(1, 7)), 10, ()) for i in range(3)}


def test_what_was_kept_for_a_sequence_is_anothers_when_it_ends_though_all_its_blocks_are_shared() -> None:
    limits = Limits(num_blocks=8, block_size=4, max_num_seqs=4, max_batch_tokens=64, lookahead=0, headroom_tokens=16)
    loop = Loop(limits)
    loop.add(0, arrival(8, 1))
    loop.add(1, arrival(12, 12))  # begins with all of the first
    loop.add(2, Arrival([9, 9, 9, 9], 4))
    loop.step()
    assert loop.admitted == [0, 1]

    loop.step()

    assert loop.admitted == [0, 1, 2]


def test_a_cancelled_waiting_sequence_is_neither_run_nor_counted() -> None:
    loop = Loop(Limits(num_blocks=20, block_size=4, max_num_seqs=1, max_batch_tokens=8, lookahead=0))
    for seq_id in range(3):
        loop.add(seq_id, arrival(2, 2))
    loop.step()
    loop.scheduler.finish(1, 0)

    assert loop.scheduler.num_waiting == 1
    loop.run()
    assert loop.outputs[1] == []
    assert set(loop.finished) == {0, 2}


def test_a_cancelled_id_may_come_again_while_its_old_place_in_the_queue_lingers() -> None:
    loop = Loop(Limits(num_blocks=20, block_size=4, max_num_seqs=1, max_batch_tokens=8, lookahead=1))
    loop.add(0, arrival(2, 3))
    loop.add(1, arrival(5, 2))
    loop.step()
    loop.scheduler.finish(1, 0)
    loop.add(1, arrival(3, 4))
    loop.run()

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
    loop.run()

    assert set(loop.finished.values()) == {("length", 7)}
