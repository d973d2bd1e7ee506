"""Quantized linears on a GPU, for `benchmarks.kernels_gpu --only quantized`: 8 bits against cuBLAS's bf16.

Held to float64, then timed: the product alone, and with the rounding of what comes in, compiled as the engine does it.
Each call has weights of its own, as in a model, so that none are found in the L2 cache. Letters: T tokens, I inputs,
O outputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_report import DEVICE, Report, time_graph
from worker.engine.quantizing import FORMATS, QuantizedLinear, round_rows

#: Outputs and inputs of a model's linears: gate and up together, and down.
SHAPES = {
    "0.6b up": (6144, 1024),
    "0.6b down": (1024, 3072),
    "8b up": (28_672, 4096),
    "8b down": (4096, 14_336),
}
NUMS_OF_TOKENS = (1, 16, 64, 256, 1024, 16_384)
#: Tokens, inputs, outputs: fewer tokens than there are products for, odd numbers of them, parts of tiles.
CHECKED = ((1, 64, 256), (16, 48, 80), (17, 64, 256), (31, 1040, 784), (300, 1040, 784), (4999, 512, 2560))
#: Tokens that it is compiled with; see worker/engine/compiling.py.
FIRST_TOKENS = 1023
#: Calls in one graph, fewer where weights are large.
NUM_CALLS, MAX_BYTES = 28, 1 << 30
#: A GPU's sums of float8 have some 14 bits, those of int8 are exact; of the largest result.
TOLERANCE = {"float8": 2e-3, "int8": 1e-6}


def time_quantized(report: Report) -> None:
    for name in FORMATS:
        for dtype in (torch.bfloat16, torch.float16):
            for checked in CHECKED:
                report.add(f"check {name}, {dtype} {checked}", functools.partial(check_linear, name, *checked, dtype))
    for shape, size in SHAPES.items():
        num_calls = min(NUM_CALLS, MAX_BYTES // (2 * size[0] * size[1]))
        torch.compiler.reset()
        for num_tokens in NUMS_OF_TOKENS:
            x = torch.randn(num_tokens, size[1], device=DEVICE, dtype=torch.bfloat16)
            for way, run in _ways(x, size, num_calls).items():
                report.add(
                    f"{shape}, {num_tokens} tokens, {way}", functools.partial(measure, run, x, size[0], num_calls)
                )


def check_linear(name: str, num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """The layer against the same rounded numbers in float64; sums of int8 are to be exact."""
    x = torch.randn(num_tokens, num_inputs, device=DEVICE, dtype=dtype)
    weight = torch.randn(num_outputs, num_inputs, device=DEVICE, dtype=dtype) * 0.1
    linear = QuantizedLinear(weight, None, FORMATS[name])
    rounded, scale = round_rows(x, FORMATS[name])
    sums = rounded.double() @ linear.weight.double().T
    expected = sums * scale * linear.scale
    error = (linear(x).double() - expected).abs() - torch.finfo(dtype).eps * expected.abs()
    excess = float(error.max() / expected.abs().max())
    is_wrong = not excess <= TOLERANCE[name]
    if name == "int8":
        is_wrong |= not torch.equal(torch.ops.millrace.multiply_int8(rounded, linear.weight).double(), sums)
    exact = x.double() @ weight.double().T
    lost = float((linear(x).double() - exact).norm() / exact.norm())  # by 8 bits
    return {"beyond_rounding": excess, "lost": lost, "wrong": is_wrong}


def _ways(x: Tensor, size: tuple[int, int], num_calls: int) -> dict[str, Callable[[], object]]:
    weights = [torch.randn(*size, device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(num_calls)]
    ways: dict[str, Callable[[], object]] = {"bf16": lambda: [F.linear(x, weight) for weight in weights]}
    for name, dtype in FORMATS.items():
        linears = [QuantizedLinear(weight, None, dtype) for weight in weights]
        rounded, scale = round_rows(x, dtype)
        if name == "int8":
            ways["int8"] = functools.partial(_multiply_int8, rounded, linears)
        else:
            ways["float8"] = functools.partial(_multiply_float8, rounded, scale, linears, is_fast=False)
            ways["float8, fast sums"] = functools.partial(_multiply_float8, rounded, scale, linears, is_fast=True)
        for linear in linears:
            linear.compile(dynamic=True, fullgraph=True)
        _call(x.new_zeros(FIRST_TOKENS, x.shape[1]), linears[:1])
        ways[f"{name} with rounding"] = functools.partial(_call, x, linears)
    return ways


def _multiply_int8(x: Tensor, linears: list[QuantizedLinear]) -> None:
    for linear in linears:
        torch.ops.millrace.multiply_int8(x, linear.weight)


def _multiply_float8(x: Tensor, scale: Tensor, linears: list[QuantizedLinear], *, is_fast: bool) -> None:
    for linear in linears:
        options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": is_fast}
        torch._scaled_mm(x, linear.weight.t(), scale_a=scale, scale_b=linear.scale, **options)


@torch.inference_mode()
def _call(x: Tensor, linears: list[QuantizedLinear]) -> None:
    for linear in linears:
        linear(x)


def measure(run: Callable[[], object], x: Tensor, num_outputs: int, num_calls: int) -> dict[str, Any]:
    seconds = time_graph(run, num_calls)
    return {"us": seconds * 1e6, "TFLOP/s": 2 * x.numel() * num_outputs / seconds / 1e12}
