"""Wide linear layers: of many inputs and outputs, whose products of many tokens keep a GPU at the limit of its power.

There our own kernel, which computes a square of tiles at a time, reads less and so multiplies more than cuBLAS's; it is
slower where tiles are few. What a compiled layer adds to the product alone, its residual, is added by the same kernel.
Letters: T tokens, I inputs, O outputs.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("millrace.engine")

#: What makes a layer wide: inputs, and weights.
LEAST_INPUTS, LEAST_WEIGHTS = 4096, 1 << 25
#: From so many tokens and tiles on the kernel is the faster one.
LEAST_TOKENS, LEAST_TILES = 1280, 512


class WideLinear(nn.Module):
    """In place of a linear layer without a bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # (O, I)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.millrace.multiply(x, self.weight, None)
        return output


def replace_wide_linears(model: Any) -> int:
    """Replace all that are wide, and say so in the log; how many there were. For GPUs that have the kernel."""
    names: set[str] = set()
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and _is_wide(child):
                setattr(parent, name, WideLinear(child))
                names.add(name)
                num_replaced += 1
    if num_replaced:
        log.info("wide products by our own kernel: %s, in %d modules", " and ".join(sorted(names)), num_replaced)
    return num_replaced


def _is_wide(linear: Any) -> bool:
    num_inputs, num_weights = linear.in_features, linear.weight.numel()
    fits = linear.bias is None and num_inputs % 8 == 0 and linear.out_features % 8 == 0
    is_dense = linear.weight.is_contiguous()
    return bool(fits and is_dense and num_inputs >= LEAST_INPUTS and num_weights >= LEAST_WEIGHTS)


@torch.library.custom_op("millrace::multiply", mutates_args=())
def _multiply(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """x (..., I), weight (O, I), residual (..., O) -> (..., O)."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" or x.dtype.itemsize != 2 or len(rows) < LEAST_TOKENS:
        return _multiply_plainly(x, weight, residual)
    from worker.engine.kernels.product import num_tiles, product

    if num_tiles(len(rows), len(weight)) < LEAST_TILES:
        return _multiply_plainly(x, weight, residual)
    summand = None if residual is None else residual.reshape(-1, len(weight))
    return product(rows, weight, residual=summand).view(*x.shape[:-1], len(weight))


def _multiply_plainly(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    output = F.linear(x, weight)
    return output if residual is None else output.add_(residual)


@_multiply.register_fake
def _shape_of(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
