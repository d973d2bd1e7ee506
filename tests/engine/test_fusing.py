"""Fused weights: found by running the model, checked by running it again, undone where they change anything."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.reference import UNFUSED, build_model, logits_of
from worker.engine.fusing import fuse_linears
from worker.engine.loader import adopt


@pytest.mark.parametrize(("family", "num_fused"), [("qwen2", 10), ("gemma3", 10), ("phi3", 0), ("gpt2", 0)])
def test_linears_on_one_input_become_one_and_the_logits_stay(
    family: str, num_fused: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = adopt(build_model(family), UNFUSED).model
    expected = logits_of(model)

    with caplog.at_level(logging.INFO, logger="millrace.engine"):
        assert fuse_linears(model, model.config) == num_fused

    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    assert ("weights fused" if num_fused else "weights run unfused") in caplog.text


def test_a_module_that_uses_its_input_elsewhere_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = adopt(build_model("llama"), UNFUSED).model
    mlp = type(model.model.layers[0].mlp)

    class Leaky(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = super().forward(x)
            return output + 0.1 * x[..., : output.shape[-1]]

    for layer in model.model.layers:
        layer.mlp.__class__ = Leaky
    expected = logits_of(model)

    assert fuse_linears(model, model.config) == 6

    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    assert "it uses its input elsewhere too" in caplog.text
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)
