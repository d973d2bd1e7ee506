"""Compiled layers: the same text, one compilation for all layers and lengths."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.settings import EngineSettings
from tests.engine.reference import build_model, drive, new_sequence, random_prompts
from worker.engine import compiling, wide_linears
from worker.engine.engine import Engine
from worker.engine.loader import adopt
from worker.engine.wide_linears import replace_wide_linears


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("quantization", ["none", "float8", "int8"])
def test_compiled_layers_give_the_same_text_from_one_compilation(
    quantization: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    # As many as a hidden state has numbers, as Qwen3-0.6B's 1024 are on a GPU.
    monkeypatch.setattr(compiling, "_CPU_TOKENS", build_model("qwen3").config.hidden_size)
    prompts = random_prompts(10, seed=4)
    outputs = []
    torch._dynamo.utils.counters.clear()
    for is_compiled in (False, True):
        settings = EngineSettings(
            device="cpu", dtype="float32", kv_tokens=4096, quantization=quantization, compile=is_compiled, lookahead=1
        )
        with caplog.at_level(logging.INFO, logger="millrace.engine"):
            engine = Engine(adopt(build_model("qwen3"), settings), settings)
        outputs.append(drive(engine, [new_sequence(i, prompt, 16) for i, prompt in enumerate(prompts)]).outputs)

        Engine(engine.loaded, settings)

    assert outputs[0] == outputs[1]
    assert caplog.text.count("layers compiled in") == 1, "another engine of the model finds them compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3, "of layers, last norm and rotary embedding"
    assert "norm and rotary_emb beside them" in caplog.text


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_residuals_are_added_by_the_products_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(wide_linears, "LEAST_INPUTS", 1)
    monkeypatch.setattr(wide_linears, "LEAST_WEIGHTS", 1)
    folded: list[tuple[int, ...]] = []
    plainly = wide_linears._multiply_plainly

    def watched(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            folded.append(tuple(weight.shape))
        return plainly(x, weight, residual)

    monkeypatch.setattr(wide_linears, "_multiply_plainly", watched)
    prompts = random_prompts(4, seed=6)
    outputs = []
    for is_compiled in (False, True):
        settings = EngineSettings(device="cpu", dtype="float32", kv_tokens=1024, compile=is_compiled)
        loaded = adopt(build_model("llama"), settings)
        replace_wide_linears(loaded.model)
        engine = Engine(loaded, settings)
        outputs.append(drive(engine, [new_sequence(i, prompt, 8) for i, prompt in enumerate(prompts)]).outputs)
        if not is_compiled:
            assert not folded, "what is not compiled adds for itself"

    config: Any = loaded.model.config
    assert outputs[0] == outputs[1]
    attention, mlp = (config.hidden_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    assert set(folded) == {attention, mlp}, "QKV and the head have no residual"
    assert folded.count(attention) == folded.count(mlp)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_layers_of_too_many_kinds_run_as_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-2's whose attention is scaled by each layer's number."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    prompts = random_prompts(3, seed=5)
    outputs = []
    for is_compiled in (False, True):
        model = build_model("gpt2")
        for number, layer in enumerate(model.transformer.h):
            layer.attn.scaling = 0.1 / (number + 1)
        settings = EngineSettings(device="cpu", dtype="float32", kv_tokens=1024, compile=is_compiled)
        engine = Engine(adopt(model, settings), settings)
        outputs.append(drive(engine, [new_sequence(i, prompt, 8) for i, prompt in enumerate(prompts)]).outputs)

    assert outputs[0] == outputs[1]
    assert "layers run uncompiled: Hard failure" in caplog.text
