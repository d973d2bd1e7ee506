"""The padded layout gives what the packed one gives: draws, stops, cancels; and it says what it wastes."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from protocol.errors import ConfigurationError
from tests.engine.reference import (
    Reference,
    Run,
    assert_equal_where_decided,
    collect,
    drive,
    new_sequence,
    random_prompts,
    settings_for,
)
from worker.engine.engine import Engine
from worker.engine.padded_runner import PaddedRunner


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


@pytest.mark.parametrize("family", ["bloom", "gemma3"])
def test_calls_join_rectangles_and_everybody_has_the_text_of_an_undisturbed_run(
    family: str, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference(family)
    settings = settings_for(model_folder(family), layout="padded", max_num_seqs=5, kv_tokens=600)
    engine, run = Engine.start(settings), Run()
    sequences = [
        msgspec.structs.replace(new_sequence(i, prompt, 40 - i % 7), priority=0 if i % 4 == 3 else 2)
        for i, prompt in enumerate(expected.prompts[:20])
    ]
    for bulk in (seq for seq in sequences if seq.priority):
        engine.add(bulk)
    for call in (seq for seq in sequences if not seq.priority):
        for _ in range(6):
            collect(engine, run)
        engine.add(call)
    while engine.has_work:
        collect(engine, run)

    assert engine.scheduler.num_preemptions > 0
    assert_equal_where_decided(
        [run.outputs[i] + expected.outputs[i][40 - i % 7 :] for i in range(20)],
        Reference(expected.prompts[:20], expected.outputs[:20], expected.gaps[:20]),
    )


def test_calls_take_the_places_of_a_whole_rectangle(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("bloom")
    engine, run = Engine.start(settings_for(model_folder("bloom"), max_num_seqs=2)), Run()
    for i in range(4):
        engine.add(msgspec.structs.replace(new_sequence(i, expected.prompts[i], 20), priority=0 if i >= 2 else 2))
        if i == 1:
            for _ in range(4):
                collect(engine, run)
    while engine.has_work:
        collect(engine, run)

    assert engine.scheduler.num_preemptions == 2
    assert [run.outputs[i] for i in range(4)] == [output[:20] for output in expected.outputs[:4]]


def test_rows_that_fit_alone_but_not_side_by_side_run_after_each_other(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        window_size=8,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    # 58 columns of prompt and 60 of output would be more than the model's own mask has.
    sequences = [new_sequence(0, [3] * 58, 6), new_sequence(1, [5], 60)]

    together = drive(Engine.start(settings_for(tmp_path, layout="padded")), sequences)
    alone = drive(Engine.start(settings_for(tmp_path, layout="padded", max_num_seqs=1)), sequences)

    assert together.reasons == {0: "length", 1: "length"}
    assert together.outputs == alone.outputs


def test_cancelled_rows_free_their_cache_with_the_next_step(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("bloom")
    engine = Engine.start(settings_for(model_folder("bloom")))
    runner = engine.runner
    assert isinstance(runner, PaddedRunner)

    def cache_bytes() -> list[int]:
        return [
            part.untyped_storage().nbytes()
            for cache in runner._padded.caches.values()
            for layer in cache.layers
            for part in (layer.keys, layer.values)
        ]

    run = Run()
    for i in range(3):
        engine.add(new_sequence(i, expected.prompts[i], 40))
    for _ in range(2):
        collect(engine, run)
    width = max(map(len, expected.prompts[:3]))
    bytes_each = cache_bytes()[0] // (3 * (width + 1))
    assert cache_bytes() == [3 * (width + 1) * bytes_each] * len(cache_bytes())
    engine.finish(0, 0)
    engine.finish(2, 0)

    frame = engine.step()

    assert frame is not None
    assert frame.num_free_blocks == 8192 - (width + 40)
    assert cache_bytes() == [(width + 2) * bytes_each] * len(cache_bytes())
    run.outputs[1] += np.frombuffer(frame.token_ids, "<i4").tolist()
    while engine.has_work:
        collect(engine, run)
    assert run.outputs[1] == expected.outputs[1]


@pytest.mark.parametrize("kv_tokens", [-5, 0, 1])
def test_a_cache_too_small_for_any_sequence_is_refused_alike_in_both_layouts(
    kv_tokens: int, model_folder: Callable[[str], Path]
) -> None:
    for layout in ("packed", "padded"):
        with pytest.raises(ConfigurationError, match=f"^engine.kv_tokens={kv_tokens} is too small: .* at least 2$"):
            Engine.start(settings_for(model_folder("llama"), layout=layout, kv_tokens=kv_tokens))


@pytest.mark.parametrize(("layout", "is_wasteful"), [("packed", False), ("padded", True)])
def test_waste_is_told_with_each_step_and_in_the_log(
    layout: str, is_wasteful: bool, model_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="millrace.engine")
    engine = Engine.start(settings_for(model_folder("llama"), layout=layout))
    num_scheduled = num_padding = 0
    for i in range(60):
        engine.add(new_sequence(i, [3 + i] * (100 + 10 * (i % 9)), 60))
    while engine.has_work:
        frame = engine.step()
        assert frame is not None
        num_scheduled += frame.num_scheduled_tokens
        num_padding += frame.num_padding_tokens

    assert (num_padding > 0) == is_wasteful
    share = f"layout {layout}: {num_scheduled} tokens scheduled so far and {num_padding} of padding"
    assert any(share in line for line in caplog.messages)
