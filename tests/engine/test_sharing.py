"""Prompts that are computed once and read by many: the text must be the one that each would have had alone."""

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from protocol.frames import NewSequence
from tests.engine.families import FAMILIES
from tests.engine.reference import (
    Reference,
    Run,
    assert_equal_where_decided,
    collect,
    drive,
    make_reference,
    new_sequence,
    random_prompts,
    settings_for,
)
from worker.engine.engine import Engine

EVERY_FAMILY = pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.is_packable])
SOME_FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
#: Enough for Sequences to outgrow the room that was seen for them when they were admitted.
NUM_TOKENS = 48
LOOKAHEADS = pytest.mark.parametrize("lookahead", [0, 1])


@pytest.fixture(scope="module")
def alike(model_folder: Callable[[str], Path]) -> Callable[[str], Reference]:
    """Texts of prompts that begin alike: 40 tokens, and 60 in the second half."""
    references: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in references:
            beginning = random_ids(60, seed=21)
            tails = random_prompts(10, seed=22, max_len=20)
            prompts = [beginning[: 40 if i < 5 else 60] + tail for i, tail in enumerate(tails)]
            references[family] = make_reference(model_folder(family), prompts, num_tokens=NUM_TOKENS)
        return references[family]

    return get


def random_ids(num: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(512) for _ in range(num)]


def samples_of(first: NewSequence, num: int) -> list[NewSequence]:
    """`first` and others of the same prompt, as they cross the pipe."""
    others = [
        msgspec.structs.replace(first, seq_id=first.seq_id + i, sample=i, token_ids=b"", sample_of=first.seq_id)
        for i in range(1, num)
    ]
    return [first, *others]


@pytest.mark.parametrize("prefix_reuse", [True, False])
@LOOKAHEADS
@EVERY_FAMILY
def test_prompts_that_begin_alike_get_the_text_they_get_alone(
    family: str,
    lookahead: int,
    prefix_reuse: bool,
    model_folder: Callable[[str], Path],
    alike: Callable[[str], Reference],
) -> None:
    expected = alike(family)
    engine = Engine.start(
        settings_for(
            model_folder(family), lookahead=lookahead, prefix_reuse=prefix_reuse, kv_tokens=272, max_batch_tokens=7
        )
    )

    run = drive(engine, [new_sequence(i, prompt, NUM_TOKENS) for i, prompt in enumerate(expected.prompts)], wave=7)

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
    assert engine.scheduler.num_preemptions > 0
    assert (run.num_prefix_hit_tokens > 0) == prefix_reuse
    assert run.max_step_tokens <= 7


@pytest.mark.parametrize("prefix_reuse", [True, False])
@LOOKAHEADS
@EVERY_FAMILY
def test_greedy_samples_of_one_prompt_get_the_text_it_gets_alone(
    family: str,
    lookahead: int,
    prefix_reuse: bool,
    model_folder: Callable[[str], Path],
    alike: Callable[[str], Reference],
) -> None:
    expected = alike(family)
    engine = Engine.start(
        settings_for(
            model_folder(family), lookahead=lookahead, prefix_reuse=prefix_reuse, kv_tokens=304, max_batch_tokens=7
        )
    )
    sequences = [s for i, p in enumerate(expected.prompts) for s in samples_of(new_sequence(10 * i, p, NUM_TOKENS), 3)]

    run = drive(engine, sequences, wave=6)

    for sample in range(3):
        outputs = [run.outputs[10 * i + sample] for i in range(len(expected.prompts))]
        assert_equal_where_decided(outputs, expected)
    assert engine.scheduler.num_preemptions > 0
    assert run.num_prefix_hit_tokens > 0


@LOOKAHEADS
@SOME_FAMILIES
def test_seeded_samples_of_one_prompt_draw_what_they_draw_alone(
    family: str, lookahead: int, model_folder: Callable[[str], Path]
) -> None:
    # Lengths around the borders of blocks of 16.
    prompts = [random_ids(48, seed=31)[:length] for length in (1, 2, 15, 16, 17, 31, 32, 33, 48)]
    folder, num_samples = model_folder(family), 4
    apart = [
        new_sequence(10 * i + sample, prompt, 16, temperature=1.0, seed=100 + i, sample=sample)
        for i, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]
    alone = drive(Engine.start(settings_for(folder, prefix_reuse=False)), apart, wave=1)
    engine = Engine.start(settings_for(folder, lookahead=lookahead, prefix_reuse=False))

    together = drive(engine, [s for first in apart[::num_samples] for s in samples_of(first, num_samples)], wave=8)

    assert together.outputs == alone.outputs
    assert len({tuple(output) for output in alone.outputs.values()}) == len(apart)
    # Each prompt but for its last token is computed once.
    assert together.num_prefix_hit_tokens == sum((num_samples - 1) * (len(prompt) - 1) for prompt in prompts)


def test_samples_go_on_when_the_one_that_computed_the_prompt_is_cancelled(
    model_folder: Callable[[str], Path], alike: Callable[[str], Reference]
) -> None:
    expected = alike("llama")
    for num_steps in range(12):
        engine = Engine.start(settings_for(model_folder("llama"), lookahead=1, max_batch_tokens=16))
        run = Run()
        for new in samples_of(new_sequence(0, expected.prompts[0], NUM_TOKENS), 3):
            engine.add(new)
        for _ in range(num_steps):
            collect(engine, run)
        engine.finish(0, 0)
        while engine.has_work:
            collect(engine, run)

        assert set(run.reasons) == {1, 2}
        assert run.outputs[1] == run.outputs[2] == expected.outputs[0]
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_a_sequence_whose_logits_are_all_wanted_computes_every_position(
    model_folder: Callable[[str], Path], alike: Callable[[str], Reference]
) -> None:
    prompt = alike("llama").prompts[0]
    engine = Engine.start(settings_for(model_folder("llama")))
    whole = msgspec.structs.replace(new_sequence(2, prompt, 4), score_from=0)

    first, again, all_wanted = (
        drive(engine, [new]) for new in (new_sequence(0, prompt, 4), new_sequence(1, prompt, 4), whole)
    )

    assert [run.num_prefix_hit_tokens for run in (first, again, all_wanted)] == [0, (len(prompt) - 1) // 16 * 16, 0]
    assert list(first.outputs.values()) == list(again.outputs.values()) == list(all_wanted.outputs.values())


def test_admission_by_the_peak_preempts_nobody_in_a_tiny_cache(
    model_folder: Callable[[str], Path], alike: Callable[[str], Reference]
) -> None:
    expected = alike("llama")
    settings = settings_for(
        model_folder("llama"), lookahead=1, admission="auto", kv_tokens=272, max_batch_tokens=7, max_num_seqs=4
    )
    engine = Engine.start(settings)

    run = drive(engine, [new_sequence(i, prompt, NUM_TOKENS) for i, prompt in enumerate(expected.prompts)], wave=7)

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
    assert engine.scheduler.num_preemptions == 0


def test_samples_of_a_refused_prompt_are_refused_with_its_reason(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), kv_tokens=64))
    for new in samples_of(new_sequence(1, [3] * 60, 5), 2):
        engine.add(new)
    engine.add(msgspec.structs.replace(new_sequence(9, [], 5), sample_of=8))

    frame = engine.step()

    assert frame is not None
    messages = dict(frame.refused)
    assert messages[1] == messages[2]
    assert "64 tokens (kv_tokens)" in messages[1]
    assert "unknown here" in messages[9]
