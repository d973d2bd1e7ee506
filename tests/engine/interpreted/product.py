"""Products and gates against their twins. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

import pytest
import torch

from worker.engine.gating import ACTIVATIONS
from worker.engine.kernels.plain import GATE_BLOCK, plain_gate
from worker.engine.kernels.product import gate, product


@pytest.mark.parametrize(("num_tokens", "num_inputs", "num_outputs"), [(1, 8, 128), (300, 72, 512), (2100, 64, 256)])
def test_products_equal_their_twin(num_tokens: int, num_inputs: int, num_outputs: int) -> None:
    """In float16, since the interpreter takes a descriptor's bfloat16 for whole numbers. Of 2100 tokens there are 17
    rows of tiles: more than a group has, so that it goes to and fro."""
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, num_inputs).half()
    weight = (torch.randn(num_outputs, num_inputs) / num_inputs**0.5).half()

    expected = x.double() @ weight.double().T

    residual = torch.randn(num_outputs, num_tokens).half().T  # not as it lies in memory
    assert_near(product(x, weight), expected)
    assert_near(product(x, weight, residual=residual), expected + residual.double())
    if num_outputs % (2 * GATE_BLOCK) == 0:
        for name, activation in ACTIVATIONS.items():
            assert_near(product(x, weight, name), plain_gate(expected, activation))


@pytest.mark.filterwarnings("ignore:overflow")  # what is far below zero is divided by infinity
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_gates_equal_their_twin(name: str) -> None:
    torch.manual_seed(1)
    both = torch.randn(7, 2 * 9 * GATE_BLOCK) * 4  # of more outputs than one program has

    assert torch.allclose(gate(both, name), plain_gate(both.double(), ACTIVATIONS[name]).float(), atol=1e-5)


def assert_near(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert given.dtype == torch.float16
    error = (given.double() - expected).abs()
    assert (error <= 2 * torch.finfo(torch.float16).eps * expected.abs() + 1e-4).all(), error.max()
