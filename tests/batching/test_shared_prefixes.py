"""Decode rows that read a common prefix together: who is with whom, and when it pays."""

import random

import pytest

from batching import shared_prefixes
from batching.scheduler import StepPlan
from tests.batching.loop import Arrival, Limits, Loop, sequential


@pytest.fixture(autouse=True)
def _any_saving_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "_MIN_SAVED_TOKENS", 1)
    monkeypatch.setattr(shared_prefixes, "_MIN_SAVED_SHARE", 0)


def loop_of(num_blocks: int = 80, max_num_seqs: int = 40, max_batch_tokens: int = 64, lookahead: int = 0) -> Loop:
    return Loop(Limits(num_blocks, 2, max_num_seqs, max_batch_tokens, lookahead))


def decode_plan(loop: Loop) -> StepPlan:
    while True:
        plan = loop.scheduler.schedule()
        assert plan is not None
        loop.check(plan)
        tokens = loop.runner.launch(plan)
        if plan.num_decode:
            return plan
        loop.scheduler.process(plan, tokens)


def groups(plan: StepPlan) -> list[tuple[list[int], int]]:
    """Sequences that read together, and how many tokens."""
    if plan.prefixes is None:
        return []
    tiles = zip(plan.prefixes.members.tolist(), plan.prefixes.lens.tolist(), strict=True)
    return [([plan.sequences[i].seq_id for i in members if i >= 0], num) for members, num in tiles]


def test_rows_of_one_prefix_read_it_together_with_the_one_that_computed_it() -> None:
    loop = loop_of()
    for seq_id, prompt in enumerate([[1, 2, 3, 4, 5], [9, 9, 9], [1, 2, 3, 4, 6], [1, 2, 3, 4, 7], [9, 8, 9]]):
        loop.add(seq_id, Arrival(prompt, 3))

    plan = decode_plan(loop)

    assert groups(plan) == [([0, 2, 3], 4)]
    assert plan.prefixes is not None
    assert plan.prefixes.starts.tolist() == [4, 0, 4, 4, 0]


def test_a_group_reads_as_deep_as_spares_most() -> None:
    """All begin alike; some go on alike: with two of them it does not pay to read apart, with six it does."""
    common = [1, 2, 3, 4]
    loop = loop_of(max_batch_tokens=200)
    few, many = [[*common, 5, 6, i] for i in (10, 11)], [[*common, 7, 7, 8, 8, i] for i in range(20, 26)]
    for seq_id, prompt in enumerate([*([*common, 40 + i] for i in range(8)), *few, *many]):
        loop.add(seq_id, Arrival(prompt, 3))

    found = groups(decode_plan(loop))

    assert {frozenset(members): num for members, num in found} == {
        frozenset(range(11)): 4,  # the first of the six came when nobody else went on as it does
        frozenset(range(11, 16)): 8,
    }


def test_large_groups_have_several_tiles() -> None:
    loop = loop_of(num_blocks=200, max_num_seqs=70, max_batch_tokens=1000)
    for i in range(70):
        loop.add(i, Arrival([1, 2, 3, 4 + i], 2))

    found = groups(decode_plan(loop))

    assert [len(members) for members, _ in found] == [32, 32, 6]
    assert sorted(i for members, _ in found for i in members) == list(range(70))


def test_samples_of_a_prompt_are_a_group_and_one_that_is_left_alone_is_none() -> None:
    loop = loop_of()
    loop.add(0, Arrival([1, 2, 3, 4, 5], 6, num_samples=3))
    loop.step()
    loop.step()
    assert groups(decode_plan(loop)) == [([0, 1, 2], 4)]
    loop.finish(0, 0)
    loop.finish(2, 0)

    assert groups(decode_plan(loop)) == []


def test_nothing_is_read_together_where_little_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_MIN_SAVED_TOKENS", 9), ("_MIN_SAVED_SHARE", 0.6)):
        with monkeypatch.context() as patch:
            patch.setattr(shared_prefixes, name, value)
            loop = loop_of()
            for i in range(3):
                loop.add(i, Arrival([1, 2, 3, 4, 5 + i], 3))
            assert groups(decode_plan(loop)) == []  # 8 of 15 tokens


@pytest.mark.parametrize("lookahead", [0, 1])
def test_groups_stay_right_while_texts_come_finish_and_are_preempted(lookahead: int) -> None:
    rng = random.Random(lookahead)
    loop = loop_of(num_blocks=30, max_num_seqs=9, max_batch_tokens=20, lookahead=lookahead)
    expected: dict[int, list[int]] = {}
    for seq_id in range(0, 150, 3):
        stem = [rng.randint(1, 2) for _ in range(6)]
        prompt = [*stem[: rng.choice((0, 2, 4, 6))], *(rng.randint(1, 3) for _ in range(rng.randint(1, 6)))]
        arrival = Arrival(prompt, rng.randint(1, 9), num_samples=rng.randint(1, 2))
        loop.add(seq_id, arrival)
        expected |= {seq_id + i: sequential(prompt, arrival.max_tokens, sample=i) for i in range(arrival.num_samples)}
        for _ in range(rng.randint(0, 2)):
            loop.step()
    loop.run()

    assert loop.outputs == expected
    assert loop.num_grouped_steps > 30
    assert loop.scheduler.num_preemptions > 0
    assert loop.scheduler.prefixes.num_groups == 0
