"""Greedy text of the engine, batched, chunked, preempted and one step ahead, against transformers one at a time."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.reference import (
    FAMILIES,
    SPECIAL_FAMILIES,
    Reference,
    assert_equal_where_decided,
    drive,
    make_reference,
    new_sequence,
    random_prompts,
    settings_for,
)
from worker.engine.engine import Engine

BUNDLED = Path(__file__).parents[2] / "models" / "millrace-tiny"


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers_one_at_a_time(
    family: str, lookahead: int, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference(family)
    assert expected.num_tokens >= 1000
    assert expected.num_distinct >= 50
    engine = Engine.start(settings_for(model_folder(family), lookahead=lookahead))

    run = drive(engine, [new_sequence(i, prompt, 40) for i, prompt in enumerate(expected.prompts)])

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
    assert set(run.reasons.values()) == {"length"}


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_survives_chunked_prefill_and_preemption(
    family: str, lookahead: int, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference(family)
    settings = settings_for(model_folder(family), lookahead=lookahead, kv_tokens=256, max_batch_tokens=23)
    engine = Engine.start(settings)

    run = drive(engine, [new_sequence(i, prompt, 40) for i, prompt in enumerate(expected.prompts)], wave=8)

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
    assert run.max_step_tokens <= 23
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("family", SPECIAL_FAMILIES)
def test_greedy_text_honours_windows_and_softcaps(
    family: str, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference(family)
    assert expected.num_distinct >= 50
    engine = Engine.start(settings_for(model_folder(family), lookahead=1, max_batch_tokens=37))

    run = drive(engine, [new_sequence(i, prompt, 40) for i, prompt in enumerate(expected.prompts)])

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_greedy_text_of_the_bundled_model_equals_transformers(lookahead: int) -> None:
    if not (BUNDLED / "model.safetensors").is_file() and os.environ.get("CI") != "true":
        pytest.skip("models/millrace-tiny has no weights here")
    expected = make_reference(BUNDLED, random_prompts(12, seed=2, max_len=40, vocab_size=256), num_tokens=24)
    engine = Engine.start(settings_for(BUNDLED, lookahead=lookahead, max_batch_tokens=64))

    run = drive(engine, [new_sequence(i, prompt, 24) for i, prompt in enumerate(expected.prompts)])

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
