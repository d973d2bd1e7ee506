"""Greedy text of the engine, batched, chunked, preempted and one step ahead, against transformers one at a time."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.families import CASES, VARIANTS
from tests.engine.reference import (
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


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_greedy_text_equals_transformers_one_at_a_time(
    family: str, variant: str, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference(family)
    assert expected.num_tokens >= 1000
    assert expected.num_distinct >= 50
    way = VARIANTS[variant]
    engine = Engine.start(settings_for(model_folder(family), **way.settings))

    run = drive(engine, [new_sequence(i, prompt, 40) for i, prompt in enumerate(expected.prompts)], way.wave)

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
    assert set(run.reasons.values()) == {"length"}
    assert way.check(engine, run)
    assert engine.ready().layout == way.layout


@pytest.mark.parametrize("lookahead", [0, 1])
def test_greedy_text_of_the_bundled_model_equals_transformers(lookahead: int) -> None:
    if not (BUNDLED / "model.safetensors").is_file() and os.environ.get("CI") != "true":
        pytest.skip("models/millrace-tiny has no weights here")
    expected = make_reference(BUNDLED, random_prompts(12, seed=2, max_len=40, vocab_size=256), num_tokens=24)
    engine = Engine.start(settings_for(BUNDLED, lookahead=lookahead, max_batch_tokens=64))

    run = drive(engine, [new_sequence(i, prompt, 24) for i, prompt in enumerate(expected.prompts)])

    assert_equal_where_decided([run.outputs[i] for i in range(len(expected.prompts))], expected)
