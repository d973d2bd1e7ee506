"""Quantized weights: exactly what rounding weights and inputs by the definition gives, and half the bytes."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from tests.engine import pooled_families
from tests.engine.families import FAMILIES, Family
from tests.engine.pooled_families import plain_embedding
from tests.engine.reference import build_model, drive, new_sequence, random_prompts, reference_of, settings_for
from worker.engine import memory, pooled_model, quantizing
from worker.engine.engine import Engine
from worker.engine.loader import adopt, load_model
from worker.engine.pooled_model import load_pooled
from worker.engine.pooling_engine import PoolingEngine
from worker.engine.quantizing import FORMATS, QuantizedLinear, check_quantization

LARGEST = {"float8": 448, "int8": 127}


def rounded(x: Tensor, name: str) -> Tensor:
    """By the definition: the largest of each row becomes the format's largest, and each the format's nearest."""
    x = x.float()
    scale = x.abs().max(dim=-1, keepdim=True).values / LARGEST[name]
    steps = torch.where(scale > 0, x / scale, 0)
    steps = steps.round() if name == "int8" else steps.to(torch.float8_e4m3fn)
    return steps.double() * scale.double()


class PlainLinear(nn.Module):
    """In float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None, name: str) -> None:
        super().__init__()
        self.rounded, self.bias, self.name = rounded(weight, name), bias, name

    def forward(self, x: Tensor) -> Tensor:
        output = rounded(x, self.name) @ self.rounded.T
        return (output if self.bias is None else output + self.bias.double()).to(x.dtype)


def round_layers(model: Any, name: str) -> Any:
    """A model of transformers whose layers' linears are plain ones."""
    config = model.config
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    for parent in list(layers.modules()):
        children: dict[str, Any] = dict(parent.named_children())
        for child_name, child in children.items():
            if type(child) in (nn.Linear, Conv1D):
                weight = child.weight.T if type(child) is Conv1D else child.weight
                setattr(parent, child_name, PlainLinear(weight.detach(), child.bias, name))
    return model


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_layer_gives_what_rounded_weights_and_inputs_give(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "_PIECE", 1000)  # weights are rounded in several pieces
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 80, dtype=dtype) * torch.logspace(-6, 3, 48)[:, None].to(dtype), torch.randn(48)
    weight[5] = 0
    for shape in ((1, 80), (2, 37, 80), (300, 80)):
        x = torch.randn(shape, dtype=dtype) ** 3
        x[..., -1, :] = 0
        for some_bias in (None, bias.to(dtype)):
            found = QuantizedLinear(weight, some_bias, FORMATS[name])(x)
            expected = PlainLinear(weight, some_bias, name)(x.float()).double()
            assert found.dtype == dtype
            error = (found.double() - expected).abs()
            assert (error <= 4 * torch.finfo(dtype).eps * expected.abs().flatten(0, -2).amax(dim=0)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2", "bloom"])  # biases; fused; weights transposed; padded
def test_texts_are_those_of_a_model_that_rounds(family: str, name: str, model_folder: Callable[[str], Path]) -> None:
    prompts = random_prompts(10, seed=3)
    engine = Engine.start(settings_for(model_folder(family), quantization=name, kv_tokens=256, max_batch_tokens=23))
    run = drive(engine, [new_sequence(i, prompt, 24) for i, prompt in enumerate(prompts)], wave=8)
    texts = list(run.outputs.values())

    reference = reference_of(round_layers(build_model(family), name), prompts, num_tokens=24)
    assert texts == reference.outputs
    assert texts != reference_of(build_model(family), prompts, num_tokens=24).outputs, "rounding must be seen"
    assert reference.num_distinct > 40


@pytest.mark.parametrize("name", FORMATS)
def test_embeddings_are_those_of_a_model_that_rounds(name: str, tmp_path: Path) -> None:
    texts = [[5 + token for token in ids] for ids in random_prompts(6, seed=3, vocab_size=290)]
    pooled_families.build("bert").save_pretrained(tmp_path)
    engine = PoolingEngine.start(settings_for(tmp_path, quantization=name, normalize=False), "embed")

    vectors = pooled_families.drive(engine, texts)

    model = round_layers(pooled_families.build("bert"), name)
    for number, text in enumerate(texts):
        assert torch.allclose(torch.tensor(vectors[number]), plain_embedding(model, text, "mean"), atol=1e-3)
    plain = PoolingEngine.start(settings_for(tmp_path, normalize=False), "embed")
    assert engine.fingerprint != plain.fingerprint


def test_weights_take_half_and_never_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").bfloat16()
    linears = [m for m in model.model.layers.modules() if type(m) is nn.Linear]
    num_weights, alive = sum(m.weight.numel() for m in linears), [weakref.ref(m.weight) for m in linears]
    num_linears = len(linears)
    del linears
    own_init, num_alive = QuantizedLinear.__init__, []

    def init(self: Any, *arguments: Any) -> None:
        num_alive.append(sum(weight() is not None for weight in alive))
        own_init(self, *arguments)

    monkeypatch.setattr(QuantizedLinear, "__init__", init)
    settings = EngineSettings(device="cpu", quantization="int8", fuse_weights=False)
    adopt(model, settings)

    assert num_alive == list(range(num_linears, 0, -1)), "each weight goes as soon as it is rounded"
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert sum(m.weight.nbytes for m in quantized) == num_weights
    assert sum(m.scale.nbytes for m in quantized) < 0.1 * num_weights
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.int8}
    for kept in (
        model.lm_head,
        model.get_input_embeddings(),
        model.model.layers[0].input_layernorm,
    ):
        assert kept.weight.dtype == torch.bfloat16


def test_weights_are_counted_as_they_will_be_quantized(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, dtype = model_folder("llama"), torch.bfloat16
    loaded = load_model(folder, settings_for(folder, quantization="int8", dtype="bfloat16"))
    scales = [m.scale for m in loaded.model.modules() if isinstance(m, QuantizedLinear)]
    num_bytes, cuda = memory.weight_bytes(folder, dtype), torch.device("cuda", 0)
    assert memory.weight_bytes(folder, dtype, "int8") == sum(x.nbytes for x in (*loaded.model.parameters(), *scales))

    monkeypatch.setattr(memory, "available_bytes", lambda device, settings: num_bytes - 1)
    memory.check_memory(folder, cuda, dtype, EngineSettings(quantization="int8"))
    with pytest.raises(ConfigurationError, match=r"in bfloat16, and .* on cuda:0.*quantization=int8 or float8"):
        memory.check_memory(folder, cuda, dtype, EngineSettings())
    # Models that embed are quantized where they run, so it is no way out for them, be it taken or not.
    for quantization in ("none", "int8"):
        monkeypatch.setattr(pooled_model, "take_device", lambda settings: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        with pytest.raises(ConfigurationError, match=r"in bfloat16, and .* on cuda:0") as refusal:
            load_pooled(folder, "embed", EngineSettings(quantization=quantization, pooling="last"))
        assert "quantization" not in str(refusal.value)


def test_experts_are_counted_as_they_are_since_they_stay_so(tmp_path: Path) -> None:
    fields = {**FAMILIES["llama"].fields, "num_local_experts": 4}
    Family("MixtralConfig", fields).build().save_pretrained(tmp_path)
    stored = [tensor for tensor in memory.stored_tensors(tmp_path) if "experts" in tensor.name]
    assert len(stored) == 2 * 4 * 3, "one by one"
    loaded = load_model(tmp_path, settings_for(tmp_path, quantization="int8", dtype="bfloat16"))

    quantized = [m for m in loaded.model.modules() if isinstance(m, QuantizedLinear)]
    num_bytes = sum(x.nbytes for x in (*loaded.model.parameters(), *(m.scale for m in quantized)))
    assert quantized
    assert memory.weight_bytes(tmp_path, torch.bfloat16, "int8") == num_bytes


def test_the_fingerprint_tells_what_is_rounded(model_folder: Callable[[str], Path]) -> None:
    ways = [(q, kv) for q in ("none", *FORMATS) for kv in ("auto", "float8")]
    engines = [Engine.start(settings_for(model_folder("llama"), quantization=q, kv_dtype=kv)) for q, kv in ways]

    assert len({engine.fingerprint for engine in engines}) == len(ways)
    rounding = [engine.ready().quantization for engine in engines]
    assert rounding == ["none", "kv-float8", "float8", "float8+kv-float8", "int8", "int8+kv-float8"]


def test_linears_that_fit_no_product_stay_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    fields = {**FAMILIES["llama"].fields, "intermediate_size": 72}
    model = replace(FAMILIES["llama"], fields=fields).build()
    with caplog.at_level(logging.INFO, logger="millrace.engine"):
        loaded = adopt(model, EngineSettings(device="cpu", quantization="float8", fuse_weights=False))

    layer: Any = loaded.model.get_submodule("model.layers.1")
    assert isinstance(layer.self_attn.q_proj, QuantizedLinear)
    assert type(layer.mlp.down_proj) is nn.Linear
    assert "no multiple of 16: down_proj and gate_proj and up_proj" in caplog.text


def test_a_model_without_a_linear_that_fits_is_refused() -> None:
    fields = {**FAMILIES["llama"].fields, "hidden_size": 40, "num_attention_heads": 4, "head_dim": 8}
    model = replace(FAMILIES["llama"], fields=fields).build()

    with pytest.raises(ConfigurationError, match=r"'int8', but this model of type 'llama' has no list of 2 layers.*"):
        adopt(model, EngineSettings(device="cpu", quantization="int8"))


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "problem"),
    [
        (
            "float8",
            (8, 6),
            torch.bfloat16,
            r"'float8' needs compute capability 8\.9, and a GPU has 8\.6: use int8 or none",
        ),
        ("int8", (7, 5), torch.float16, r"'int8' needs compute capability 8\.0, and a GPU has 7\.5: use none"),
        ("float8", (9, 0), torch.float32, r"engine\.dtype is float32: use bfloat16"),
        ("float8", (8, 9), torch.float16, None),
        ("int8", (8, 0), torch.float32, None),
    ],
)
def test_a_gpu_that_cannot_multiply_so_is_refused(
    name: str, capability: tuple[int, int], dtype: torch.dtype, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    if problem is None:
        check_quantization(name, torch.device("cuda"), dtype)
    else:
        with pytest.raises(ConfigurationError, match=problem):
            check_quantization(name, torch.device("cuda"), dtype)


def test_a_cpu_whose_products_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda x, weight: own(x, weight).clamp(-(2**15), 2**15 - 1))

    check_quantization("float8", torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigurationError, match="needs a CPU with VNNI"):
        check_quantization("int8", torch.device("cpu"), torch.float32)
