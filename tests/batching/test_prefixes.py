"""What Sequences share: prefixes that are there already, and the prompt of samples."""

import random
from typing import Any

import pytest

from tests.batching.loop import Arrival, Limits, Loop, sequential

LOOKAHEADS = pytest.mark.parametrize("lookahead", [0, 1])


def roomy(**changes: Any) -> Limits:
    fields = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 8, "max_batch_tokens": 64, "lookahead": 0}
    return Limits(**{**fields, **changes})


def alike(num_common: int, *rest: int) -> list[int]:
    return [*range(1, num_common + 1), *rest]


def test_full_blocks_of_a_finished_text_are_read_by_the_next_but_for_its_last_token() -> None:
    loop = Loop(roomy())
    loop.add(0, Arrival(alike(8), 2))
    loop.run()
    loop.add(1, Arrival(alike(8), 2))
    loop.run()
    loop.add(2, Arrival(alike(8, 50), 2))
    loop.run()

    assert loop.num_hit_tokens == 4 + 8
    assert loop.outputs[1] == loop.outputs[0]
    assert loop.outputs[2] == sequential(alike(8, 50), 2)


def test_a_block_is_shared_by_the_step_that_fills_it_and_those_after_it() -> None:
    loop = Loop(roomy(lookahead=1, max_batch_tokens=10))
    loop.add(0, Arrival(alike(10), 3))
    loop.add(1, Arrival(alike(10, 60), 3))
    first = loop.scheduler.schedule()
    second = loop.scheduler.schedule()  # the first has been launched, and nothing of it is known

    assert first is not None
    assert second is not None
    assert [seq.seq_id for seq in first.sequences] == [0]
    assert (second.num_prefix_hit_tokens, second.starts) == (8, [10, 8])

    together = Loop(roomy())
    for seq_id in (0, 1):
        together.add(seq_id, Arrival(alike(10), 3))
    together.run()
    assert together.num_hit_tokens == 8


@LOOKAHEADS
def test_a_preempted_sequence_finds_what_is_left_of_its_own_text(lookahead: int) -> None:
    limits = Limits(num_blocks=6, block_size=2, max_num_seqs=2, max_batch_tokens=16, lookahead=lookahead)
    loop = Loop(limits)
    loop.add(0, Arrival([1, 2, 3], 8))
    loop.add(1, Arrival([9, 8], 8))
    loop.run()

    assert loop.scheduler.num_preemptions > 0
    assert loop.num_hit_tokens > 0
    assert loop.outputs == {0: sequential([1, 2, 3], 8), 1: sequential([9, 8], 8)}


def test_outputs_of_finished_texts_do_not_push_prompts_out() -> None:
    loop = Loop(roomy())
    loop.add(0, Arrival(alike(4, 9), 12))
    loop.run()

    assert loop.scheduler.blocks.num_named == 1


@pytest.mark.parametrize("prefix_reuse", [True, False])
@LOOKAHEADS
@pytest.mark.parametrize("num_prompt", [1, 2, 4, 5, 8, 9])
def test_samples_share_one_prefill_and_differ_from_its_last_token_on(
    num_prompt: int, lookahead: int, prefix_reuse: bool
) -> None:
    loop = Loop(roomy(lookahead=lookahead, prefix_reuse=prefix_reuse))
    loop.add(0, Arrival(alike(num_prompt), 6, num_samples=5))
    loop.run()

    assert loop.outputs == {i: sequential(alike(num_prompt), 6, sample=i) for i in range(5)}
    assert loop.num_hit_tokens == 4 * (num_prompt - 1)
    assert loop.num_copies == (4 if (num_prompt - 1) % 4 else 0)
    if num_prompt > 1:
        assert loop.runner.texts.keys() == set(loop.alive.values())
        assert loop.runner.num_computed_tokens <= num_prompt + 4 + 5 * 6


@LOOKAHEADS
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_samples_that_are_only_scored_share_one_prefill_too(prefix_reuse: bool, lookahead: int) -> None:
    loop = Loop(roomy(lookahead=lookahead, prefix_reuse=prefix_reuse))
    loop.add(0, Arrival(alike(12), 0, score_from=11, num_samples=4))
    loop.run()

    assert len(loop.finished) == 4
    assert loop.num_steps == 2, "all the others together, not one after the other"
    assert not lookahead or loop.num_hit_tokens == 3 * 10  # else the first has ended by then


@LOOKAHEADS
def test_when_the_sample_that_computes_the_prompt_is_cancelled_another_one_does(lookahead: int) -> None:
    for num_steps in range(6):
        loop = Loop(roomy(lookahead=lookahead, max_batch_tokens=8, max_num_seqs=3))
        loop.add(0, Arrival(alike(20), 3, num_samples=4))
        for _ in range(num_steps):
            loop.step()
        if 0 not in loop.finished:
            loop.finish(0, 0)
        loop.run()

        expected = {i: sequential(alike(20), 3, sample=i) for i in range(1, 4)}
        assert {i: loop.outputs[i] for i in range(1, 4)} == expected


def test_samples_that_wait_for_a_prompt_hold_nobody_up() -> None:
    loop = Loop(roomy(max_batch_tokens=8))
    loop.add(0, Arrival(alike(20), 3, num_samples=3))
    loop.add(10, Arrival([70, 71], 3))
    for _ in range(3):
        loop.step()

    assert loop.admitted[:2] == [0, 10]
    assert loop.scheduler.num_waiting == 2


def test_a_score_is_computed_at_every_position_that_is_asked_for_and_no_other() -> None:
    loop = Loop(roomy())
    loop.add(0, Arrival(alike(12), 1))
    loop.run()
    hits = []
    for seq_id, score_from in ((1, 0), (2, 9), (3, 12)):
        before = loop.num_hit_tokens
        loop.add(seq_id, Arrival(alike(12, 80), 0, score_from=score_from))
        loop.run()
        hits.append(loop.num_hit_tokens - before)

    assert hits == [0, 8, 8]  # the token at 12 is scored by the logits at 11


@LOOKAHEADS
@pytest.mark.parametrize("num_prompt", [1, 2, 8, 9])
def test_the_last_token_of_a_text_that_is_only_scored_is_not_computed(num_prompt: int, lookahead: int) -> None:
    loop = Loop(roomy(lookahead=lookahead))
    for seq_id, score_from in enumerate((1, num_prompt - 1)):
        loop.add(seq_id, Arrival(alike(num_prompt - 1, 50 + seq_id), 0, score_from=score_from))
        before = loop.runner.num_computed_tokens + loop.num_hit_tokens
        loop.run()
        # But one has to be, so that there is a step with which it ends.
        num = loop.runner.num_computed_tokens + loop.num_hit_tokens - before
        assert num == max(num_prompt - 1, 1)
    assert len(loop.finished) == 2


@LOOKAHEADS
@pytest.mark.parametrize("max_batch_tokens", [64, 13, 7])
def test_a_context_is_computed_once_for_all_that_is_scored_behind_it(max_batch_tokens: int, lookahead: int) -> None:
    loop = Loop(roomy(max_batch_tokens=max_batch_tokens, lookahead=lookahead))
    for seq_id in range(7):
        loop.add(seq_id, Arrival(alike(11, 50 + seq_id, 60), 0, score_from=11))
    loop.run()

    # All but the context's last token, whose logits everybody needs, and the texts' last ones, whose logits nobody
    # does. Without lookahead nobody may be left from the step before, and then what is beyond full blocks is computed
    # again, once a step.
    num_again = 6 * 10 - loop.num_hit_tokens
    assert num_again == 0 if lookahead or max_batch_tokens == 64 else num_again <= 2 * loop.num_steps
    assert loop.runner.num_computed_tokens == 12 + 6 * 2 + num_again
    assert len(loop.finished) == 7


@LOOKAHEADS
def test_contexts_stay_apart_whatever_is_scored_or_generated_beside_them(lookahead: int) -> None:
    rng = random.Random(lookahead)
    num_hits = num_copies = num_duplicating_steps = 0
    for _ in range(30):
        limits = roomy(max_batch_tokens=rng.choice((9, 40)), num_blocks=16, lookahead=lookahead)
        loop = Loop(limits)
        for seq_id in range(rng.randint(10, 25)):
            context = alike(6, *([7] * rng.randint(0, 1)))
            prompt = [*context, *(rng.randint(1, 3) for _ in range(rng.randint(1, 4)))]
            score_from = rng.choice((len(context), len(context), 1, None))
            loop.add(seq_id, Arrival(prompt, rng.randint(score_from is None, 4), score_from=score_from))
            if rng.random() < 0.2:
                loop.step()
        loop.run()  # the runner looks at every position that is attended to
        num_hits += loop.num_hit_tokens
        num_copies += loop.num_copies
        num_duplicating_steps += loop.num_duplicating_steps
    assert num_hits > 200
    assert num_copies > 20
    assert num_duplicating_steps > 20


def test_answers_behind_prompts_with_nothing_to_score_are_nobodys_context() -> None:
    # A sample is preempted with tokens of its own, and comes back while another one of the same prompt runs.
    loop = Loop(Limits(num_blocks=4, block_size=4, max_num_seqs=3, max_batch_tokens=15, lookahead=0))
    loop.add(0, Arrival([5], 8, score_from=4, num_samples=3))
    for _ in range(3):
        loop.step()
    loop.add(10, Arrival([6], 4, priority=-1))
    loop.run()

    assert loop.scheduler.num_preemptions > 0
    assert loop.outputs == {i: sequential([5], 8, sample=i) for i in range(3)} | {10: sequential([6], 4)}
