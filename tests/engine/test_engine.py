"""The engine in-process: stops, limits, cancels, seeded draws, and what its frames report."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from batching.scheduler import StepPlan
from protocol.errors import ConfigurationError
from protocol.frames import NewSequence
from protocol.settings import EngineSettings
from tests.engine.reference import Reference, Run, collect, drive, new_sequence, random_prompts, settings_for
from worker.engine.engine import Engine
from worker.engine.loader import load_model
from worker.engine.pooled_model import load_pooled
from worker.engine.runner import StepHandle

LOOKAHEADS = pytest.mark.parametrize("lookahead", [0, 1])


def drawing(prompts: list[list[int]], *, seed: int = 11, max_tokens: int = 24) -> list[NewSequence]:
    """Every mix of limits, one prompt after the other."""
    limits = [(1.0, 0), (0.9, 0), (1.0, 20), (0.8, 50), (0.5, 3)]
    return [
        new_sequence(i, prompt, max_tokens, temperature=1.1, top_p=top_p, top_k=top_k, seed=seed + i)
        for i, prompt in enumerate(prompts)
        for top_p, top_k in [limits[i % len(limits)]]
    ]


@LOOKAHEADS
def test_engine_ends_at_a_stop_token_and_drops_what_was_sampled_behind_it(
    lookahead: int, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("llama")
    stops = [output[7 + i % 20] for i, output in enumerate(expected.outputs)]
    engine = Engine.start(settings_for(model_folder("llama"), lookahead=lookahead))
    sequences = [
        new_sequence(i, prompt, 40, stop=(stop, 100_000))
        for i, (prompt, stop) in enumerate(zip(expected.prompts, stops, strict=True))
    ]

    run = drive(engine, sequences)

    for i, (output, stop) in enumerate(zip(expected.outputs, stops, strict=True)):
        assert run.outputs[i] == output[: output.index(stop) + 1]
        assert run.reasons[i] == "stop"


@LOOKAHEADS
def test_engine_says_stop_when_the_last_allowed_token_is_a_stop_token(
    lookahead: int, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("llama")
    output = expected.outputs[0]
    last = output.index(output[5]) + 1
    engine = Engine.start(settings_for(model_folder("llama"), lookahead=lookahead))

    run = drive(engine, [new_sequence(0, expected.prompts[0], last, stop=(output[5],))])

    assert (run.outputs[0], run.reasons[0]) == (output[:last], "stop")


@LOOKAHEADS
def test_engine_forgets_a_finished_sequence_at_once_and_others_go_on(
    lookahead: int, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("qwen3")
    engine = Engine.start(settings_for(model_folder("qwen3"), lookahead=lookahead, max_num_seqs=4))
    run = Run()
    for i, prompt in enumerate(expected.prompts[:8]):
        engine.add(new_sequence(i, prompt, 40))
    for _ in range(5):
        collect(engine, run)

    engine.finish(1, 3)  # running
    engine.finish(7, 0)  # waiting
    engine.finish(1234, 0)  # never seen
    known = {seq_id: len(tokens) for seq_id, tokens in run.outputs.items()}
    while engine.has_work:
        collect(engine, run)

    assert set(run.reasons) == {0, 2, 3, 4, 5, 6}
    assert len(run.outputs[1]) == known[1]
    assert 7 not in run.outputs
    assert all(run.outputs[i] == expected.outputs[i] for i in run.reasons)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_engine_refuses_what_can_never_finish_and_reports_it(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), kv_tokens=64))
    engine.add(new_sequence(1, [3] * 500, 13))
    engine.add(new_sequence(2, [3] * 60, 5))
    engine.add(new_sequence(3, [512], 5))
    engine.add(new_sequence(4, [], 5))
    engine.add(new_sequence(5, [3] * 60, 4))

    frame = engine.step()

    assert frame is not None
    messages = dict(frame.refused)
    assert set(messages) == {1, 2, 3, 4}
    assert "512 tokens (max_model_len)" in messages[1]
    assert "64 tokens (kv_tokens)" in messages[2]
    assert "vocabulary of 512" in messages[3]
    assert frame.num_running == 1


@LOOKAHEADS
def test_seeded_draws_do_not_depend_on_batch_chunks_or_preemption(
    lookahead: int, model_folder: Callable[[str], Path]
) -> None:
    sequences = drawing(random_prompts(15, seed=5, max_len=40))
    alone: dict[int, list[int]] = {}
    engine = Engine.start(settings_for(model_folder("qwen3")))
    for sequence in sequences:
        alone |= drive(engine, [sequence]).outputs
    crowded = Engine.start(settings_for(model_folder("qwen3"), lookahead=lookahead, kv_tokens=160, max_batch_tokens=17))

    together = drive(crowded, sequences, wave=8)

    assert crowded.scheduler.num_preemptions > 0
    assert together.outputs == alone
    assert len({tuple(output) for output in alone.values()}) == len(sequences)


def test_draws_beside_greedy_rows_leave_them_greedy(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("llama")
    greedy = [new_sequence(100 + i, prompt, 40) for i, prompt in enumerate(expected.prompts[:6])]
    mixed = [x for pair in zip(greedy, drawing(expected.prompts[:6], max_tokens=40), strict=True) for x in pair]

    run = drive(Engine.start(settings_for(model_folder("llama"))), mixed, wave=12)

    assert [run.outputs[100 + i] for i in range(6)] == expected.outputs[:6]
    assert all(run.outputs[i] != expected.outputs[i] for i in range(6))


def test_samples_and_seeds_give_other_draws(model_folder: Callable[[str], Path]) -> None:
    variants = [(0, 0), (0, 1), (0, 2), (1, 0), (-1, 0), (2**63 - 1, 0), (2**64 - 1, 1)]
    sequences = [
        new_sequence(i, [1, 2, 3], 16, temperature=1.0, seed=seed, sample=sample)
        for i, (seed, sample) in enumerate(variants)
    ]

    run = drive(Engine.start(settings_for(model_folder("llama"))), sequences)

    assert len({tuple(output) for output in run.outputs.values()}) == len(variants)


def test_engine_states_its_limits_and_versions(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("gpt2")
    engine = Engine.start(settings_for(folder, kv_tokens=1000, max_model_len=300, max_num_seqs=9, max_batch_tokens=7))

    ready = engine.ready()

    assert (ready.kv_tokens, ready.block_size, ready.max_model_len, ready.max_num_seqs) == (992, 16, 300, 7)
    assert len(ready.fingerprint) == 64
    assert ready.fingerprint != Engine.start(settings_for(folder, dtype="bfloat16")).ready().fingerprint
    assert set(ready.versions) == {"engine", "python", "torch", "transformers"}


def test_engine_without_kv_tokens_takes_a_bounded_cache_on_a_cpu(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), kv_tokens=None, max_num_seqs=8))

    assert engine.ready().kv_tokens == 8 * 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "flash-attn-2"}, "flash-attn needs CUDA"),
        ({"attention": "triton"}, "Triton needs CUDA"),
        ({"attention": "sparse", "dtype": "bfloat16"}, "not in bfloat16"),
        ({"attention": "xformers"}, "auto, sdpa, sparse, flash-attn-2, triton"),
        ({"dtype": "int4"}, "float32, bfloat16, float16"),
        ({"device": "tpu"}, "auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"lookahead": 2}, "it is 0 or 1"),
        ({"kv_tokens": 15}, "a block of 16 tokens: make it that or more"),
        ({"max_batch_tokens": 0}, "at least 1"),
        ({"max_model_len": 1}, "at least 2"),
        ({"memory_fraction": 0.0}, "above 0"),
        ({"revision": "main"}, "leave the revision out"),
    ],
)
def test_engine_refuses_settings_that_do_not_fit(
    changes: dict[str, object], words: str, model_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Engine.start(settings_for(model_folder("llama"), **changes))


def test_an_engine_of_a_further_gpu_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, wherever its tensors are."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    settings = EngineSettings(device="cuda:1")

    with pytest.raises(ConfigurationError):
        load_model(Path("/nowhere"), settings)
    with pytest.raises(ConfigurationError):
        load_pooled(Path("/nowhere"), "embed", settings)

    assert current == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_warm_up_leaves_no_trace(
    layout: str, model_folder: Callable[[str], Path], reference: Callable[[str], Reference]
) -> None:
    expected = reference("llama")
    engine = Engine.start(settings_for(model_folder("llama"), layout=layout, max_num_seqs=4))

    engine.warm_up()

    assert not engine.has_work
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert engine.telemetry.num_steps == 0
    run = drive(engine, [new_sequence(i, prompt, 12) for i, prompt in enumerate(expected.prompts)])
    assert [run.outputs[i] for i in range(len(expected.prompts))] == [output[:12] for output in expected.outputs]


def test_what_a_cpu_takes_for_a_forward_pass_is_neither_a_gap_nor_the_hosts_time(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, now = Engine.start(settings_for(model_folder("llama"))), 0.0
    launch = engine.runner.launch

    def compute(plan: StepPlan) -> StepHandle:
        nonlocal now
        now += 10
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", compute)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    run = drive(engine, [new_sequence(i, [5, 6, 7], 4) for i in range(3)])

    telemetry = engine.telemetry
    assert telemetry.num_steps == run.num_steps > 3
    assert (telemetry.wait_s, telemetry.host_s, telemetry.gap_s) == (10 * run.num_steps, 0, 0)


def test_a_warm_up_in_the_smallest_cache_does_what_it_can(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), kv_tokens=16, max_model_len=6))

    engine.warm_up()

    assert not engine.has_work
