"""Gated layers and wide linears: found in the model, and as good as what they stand for."""

import dataclasses
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engine.families import FAMILIES
from tests.engine.reference import UNFUSED, logits_of
from worker.engine import wide_linears
from worker.engine.gating import GatedLayer, gate_layers
from worker.engine.kernels import obstacle
from worker.engine.kernels.plain import GATE_BLOCK
from worker.engine.loader import adopt
from worker.engine.wide_linears import WideLinear, replace_wide_linears


def build(family: str, intermediate_size: int = 2 * GATE_BLOCK) -> Any:
    fields = {**FAMILIES[family].fields, "intermediate_size": intermediate_size}
    return adopt(dataclasses.replace(FAMILIES[family], fields=fields).build(), UNFUSED).model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])  # the third has another activation,
def test_gated_layers_give_the_same_logits(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family)  # the last has gate and other half in one linear
    expected, num_parameters = logits_of(model), sum(p.numel() for p in model.parameters())

    with caplog.at_level(logging.INFO, logger="millrace.engine"):
        assert gate_layers(model, model.config) == 2

    assert sum(isinstance(module, GatedLayer) for module in model.modules()) == 2
    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert "weights gated: " in caplog.text


@pytest.mark.parametrize(("family", "intermediate_size"), [("gpt2", 256), ("llama", GATE_BLOCK + 8)])
def test_what_is_not_gated_or_does_not_fit_the_kernel_stays(family: str, intermediate_size: int) -> None:
    model = build(family, intermediate_size)
    expected = logits_of(model)

    assert gate_layers(model, model.config) == 0

    assert torch.equal(logits_of(model), expected)


def test_a_module_whose_only_other_part_takes_something_else_stays() -> None:
    model = build("llama")

    class Shaped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x) * (x.shape[2] / x.shape[2])

    model.model.layers[0].mlp.act_fn = Shaped()

    assert gate_layers(model, model.config) == 1


def test_a_module_that_does_more_stays_as_it_was() -> None:
    model = build("llama")
    mlp = type(model.model.layers[0].mlp)

    class Leaky(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = super().forward(x)
            return output + 0.1 * x[..., : output.shape[-1]]

    model.model.layers[1].mlp.__class__ = Leaky
    expected = logits_of(model)

    assert gate_layers(model, model.config) == 1

    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize(("scale", "num_gated"), [(0.005, 2), (1e-9, 0)])
def test_the_half_that_comes_first_need_not_be_the_gate(scale: float, num_gated: int) -> None:
    """Of small halves either is nearly the gate, and of the smallest it cannot be told which is."""
    model = build("llama")

    def forward(mlp: Any, x: Tensor) -> Tensor:
        other = mlp.up_proj(x)
        output: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * other)
        return output

    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.__class__ = type("OtherFirst", (type(mlp),), {"forward": forward})
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                getattr(mlp, name).weight.mul_(scale)
            mlp.down_proj.weight.div_(scale**2)
    expected = logits_of(model)

    assert gate_layers(model, model.config) == num_gated

    assert torch.allclose(logits_of(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("differs", ["in what it does", "in its size"])
def test_each_module_of_a_class_is_held_to_what_it_gave(differs: str) -> None:
    """A class may leave out a part of its activation in some layers, or have layers of several sizes."""
    model = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    own_forward = type(first).forward
    varied = type("Varied", (type(first),), {"factor": 1.0, "forward": lambda mlp, x: mlp.factor * own_forward(mlp, x)})
    first.__class__ = second.__class__ = varied
    if differs == "in its size":
        for name in ("gate_proj", "up_proj"):
            linear = getattr(second, name)
            setattr(second, name, nn.Linear(linear.in_features, GATE_BLOCK + 8, bias=False))
        second.down_proj = nn.Linear(GATE_BLOCK + 8, first.down_proj.out_features, bias=False)
    else:
        second.factor = 3.0
    expected = logits_of(model)

    assert gate_layers(model, model.config) == 1

    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    assert isinstance(model.model.layers[0].mlp, GatedLayer)


def test_only_the_gpu_that_the_kernel_is_for_has_gated_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle.product_obstacle(torch.device("cpu"), torch.bfloat16) is not None
    monkeypatch.setattr(obstacle, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for capability, dtype, is_gated in (
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((8, 0), torch.float16, False),
        ((10, 0), torch.float16, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (obstacle.product_obstacle(torch.device("cuda"), dtype) is None) == is_gated


def test_wide_linears_give_the_same_logits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    hidden_size, inner_size = model.config.hidden_size, model.config.intermediate_size
    monkeypatch.setattr(wide_linears, "LEAST_INPUTS", inner_size)
    monkeypatch.setattr(wide_linears, "LEAST_WEIGHTS", inner_size * hidden_size)
    gate_layers(model, model.config)
    expected = logits_of(model)

    with caplog.at_level(logging.INFO, logger="millrace.engine"):
        assert replace_wide_linears(model) == 2  # one down projection a layer

    assert torch.equal(logits_of(model), expected)
    assert isinstance(model.model.layers[0].mlp.down, WideLinear)
    assert type(model.lm_head) is nn.Linear
    assert "down, in 2 modules" in caplog.text
