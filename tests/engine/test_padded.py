"""The padded layout gives what the packed one gives: draws, stops, cancels; and it says what it wastes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.reference import Reference, Run, collect, drive, new_sequence, random_prompts, settings_for
from worker.engine.engine import Engine


def test_draws_are_those_of_the_packed_layout(model_folder: Callable[[str], Path]) -> None:
    limits = [(1.0, 0), (0.9, 0), (1.0, 20), (0.5, 3)]
    sequences = [
        new_sequence(
            i, prompt, 20, temperature=1.1, top_p=limits[i % 4][0], top_k=limits[i % 4][1], seed=i, sample=i % 3
        )
        for i, prompt in enumerate(random_prompts(12, seed=5, max_len=40))
    ]
    packed = drive(Engine.start(settings_for(model_folder("qwen3"))), sequences)

    padded = drive(Engine.start(settings_for(model_folder("qwen3"), layout="padded", max_num_seqs=5)), sequences)

    assert padded.outputs == packed.outputs


def test_stop_tokens_and_cancels_end_rows_and_leave_the_others(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("bloom")
    engine = Engine.start(settings_for(model_folder("bloom"), max_num_seqs=6))
    stop = expected.outputs[0][4]
    run = Run()
    for i, prompt in enumerate(expected.prompts[:8]):
        engine.add(new_sequence(i, prompt, 40, stop=(stop,) if i == 0 else ()))
    for _ in range(4):
        collect(engine, run)
    running = next(i for i in run.outputs if i != 0)
    engine.finish(running, 1)
    while engine.has_work:
        collect(engine, run)

    assert set(run.reasons) == set(range(8)) - {running}
    assert run.reasons[0] == "stop"
    assert run.outputs[0] == expected.outputs[0][: expected.outputs[0].index(stop) + 1]
    assert all(run.outputs[i] == expected.outputs[i] for i in run.reasons if i != 0)


@pytest.mark.parametrize(("layout", "is_wasteful"), [("packed", False), ("padded", True)])
def test_waste_is_told_with_each_step_and_in_the_log(
    layout: str, is_wasteful: bool, model_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="millrace.engine")
    engine = Engine.start(settings_for(model_folder("llama"), layout=layout))
    num_scheduled = num_padding = 0
    for i in range(60):
        engine.add(new_sequence(i, [3] * (100 + 10 * (i % 9)), 60))
    while engine.has_work:
        frame = engine.step()
        assert frame is not None
        num_scheduled += frame.num_scheduled_tokens
        num_padding += frame.num_padding_tokens

    assert (num_padding > 0) == is_wasteful
    share = f"layout {layout}: {num_scheduled} tokens scheduled so far and {num_padding} of padding"
    assert any(share in line for line in caplog.messages)
