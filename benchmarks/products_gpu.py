"""Products on a GPU, for `benchmarks.kernels_gpu --only product`: gated or plain, one kernel against cuBLAS's.

Held to a plain twin in float64, then timed: singly, where a card is as fast as it can be, and for some seconds, where
it is at the limit of its power. Letters: T tokens, I inputs, O outputs.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_report import DEVICE, Report, time_graph
from worker.engine.gating import ACTIVATIONS
from worker.engine.kernels.plain import plain_gate
from worker.engine.kernels.product import gate, product

#: Hidden size and inner size of a model's gated layers.
SHAPES = {"0.6b": (1024, 3072), "8b": (4096, 14_336)}
NUMS_OF_TOKENS = (128, 256, 512, 1024, 2048, 4096, 16_384)
_LONG = 1.0  # seconds


def time_products(report: Report) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for size in ((1, 64, 256), (300, 1032, 768), (5000, 512, 2560)):
            report.add(f"check product, {dtype} {size}", functools.partial(check_product, *size, dtype))
    for name, (hidden, inner) in SHAPES.items():
        up, down = _random(2 * inner, hidden) * 0.02, _random(hidden, inner) * 0.02
        for num_tokens in NUMS_OF_TOKENS:
            x, y = _random(num_tokens, hidden), _random(num_tokens, inner)
            runs: dict[str, Callable[[], object]] = {
                "gated, apart": functools.partial(_gate_apart, x, up),
                "gated, together": functools.partial(product, x, up, "silu"),
                "down, cublas": functools.partial(F.linear, y, down),
                "down, product": functools.partial(product, y, down),
                "down, product, then residual": functools.partial(_add_apart, y, down, x),
                "down, product with residual": functools.partial(product, y, down, residual=x),
            }
            for way, run in runs.items():
                num = 2 * num_tokens * (up.numel() if way.startswith("gated") else down.numel())
                report.add(f"{name}, {num_tokens} tokens, {way}", functools.partial(measure, run, num))
        for way, run in runs.items():
            num = 2 * num_tokens * (up.numel() if way.startswith("gated") else down.numel())
            report.add(f"{name}, {num_tokens} tokens, {way}, for long", functools.partial(measure_long, run, num))


def check_product(num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of what an exact product rounds to, nothing may be off by more than rounding."""
    x, weight = _random(num_tokens, num_inputs).to(dtype), (_random(num_outputs, num_inputs) * 0.1).to(dtype)
    expected = x.double() @ weight.double().T
    worst = _excess(product(x, weight), expected)
    residual = _random(num_tokens, num_outputs).to(dtype)
    worst = max(worst, _excess(product(x, weight, residual=residual), expected + residual.double()))
    for name, activation in ACTIVATIONS.items():
        gated = plain_gate(expected, activation)
        worst = max(worst, _excess(product(x, weight, name), gated))
        worst = max(worst, _excess(gate(expected.float(), name), gated))
    return {"error_in_roundings": worst, "wrong": not worst <= 1.0}


def measure(run: Callable[[], object], num_operations: int) -> dict[str, Any]:
    seconds = time_graph(run, 1)
    return {"us": seconds * 1e6, "TFLOP/s": num_operations / seconds / 1e12}


def measure_long(run: Callable[[], object], num_operations: int) -> dict[str, Any]:
    """The second half of some seconds."""
    times: list[float] = []
    while sum(times) < 2 * _LONG:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(8):
            run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    late = times[len(times) // 2 :]
    seconds = sum(late) / len(late) / 8
    return {"us": seconds * 1e6, "TFLOP/s": num_operations / seconds / 1e12}


def _gate_apart(x: Tensor, weight: Tensor) -> Tensor:
    return gate(F.linear(x, weight), "silu")


def _add_apart(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return product(x, weight).add_(residual)


def _random(*size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16)


def _excess(found: Tensor, expected: Tensor) -> float:
    """The largest error, in what the result's format and the sum's in float32 may give."""
    allowed = torch.finfo(found.dtype).eps * expected.abs() + 1e-4 * expected.abs().max()
    return float(((found.double() - expected).abs() / allowed).max())
