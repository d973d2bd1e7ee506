"""Products of a linear layer for many tokens at once, with what follows within the same kernel.

A gated layer multiplies one half of its product, put through an activation, with the other half. Written out by one
kernel and read by the next, that product is the largest tensor of a step; on a card at the limit of its power the
reading costs as much as the writing. So both halves of a tile are computed by one program, which needs a weight whose
rows alternate: `GATE_BLOCK` of the one half, then `GATE_BLOCK` of the other.

Programs stay and take one tile after the other; tiles that are computed at the same time form a square, which reads
the least. Operands come by the tensor memory accelerator, so this is for compute capability 9.

Letters: T tokens, I inputs, O outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from worker.engine.kernels.multiprocessors import num_multiprocessors
from worker.engine.kernels.plain import GATE_BLOCK

#: A tile's tokens, outputs and inputs at a time, and rows of tiles that are computed at the same time.
_TOKENS, _OUTPUTS, _INPUTS, _GROUP = 128, 2 * GATE_BLOCK, 64, 12
#: Outputs per program of the activation alone.
_PIECE = 1024


def num_tiles(num_tokens: int, num_outputs: int) -> int:
    """Of a product whose weight has so many rows."""
    return -(-num_tokens // _TOKENS) * -(-num_outputs // _OUTPUTS)


def product(x: Tensor, weight: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """x (T, I), weight (O, I), of 16 bits, the second dense, I and O multiples of 8 -> (T, O), with a residual (T, O)
    added to it.

    With an activation, "silu" or "gelu_tanh", weight is (2 O, I), its rows alternate between gate and other half, and
    the result is activation(gate) * other. O is a multiple of GATE_BLOCK then, and there is no residual.
    """
    assert activation is None or residual is None
    num_tokens, num_inputs = x.shape
    num_rows = len(weight)
    num_outputs = num_rows if activation is None else num_rows // 2
    x = _dense(x)
    output = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    summand = output if residual is None else _dense(residual)
    num_programs = num_multiprocessors(x.device)
    _multiply[(num_programs,)](
        _descriptor(x, _TOKENS, _INPUTS),
        _descriptor(weight, _OUTPUTS, _INPUTS),
        _descriptor(summand, _TOKENS, _OUTPUTS // 2),
        _descriptor(output, _TOKENS, _OUTPUTS // 2),
        num_tokens,
        num_rows,
        num_inputs,
        num_programs,
        TOKENS=_TOKENS,
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
        GROUP=_GROUP,
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
        num_warps=8,
        num_stages=3,
    )
    return output


def _dense(x: Tensor) -> Tensor:
    """As a descriptor wants it: a part of a tensor may begin anywhere."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """Of a dense one, whatever it says its stride is where it has one row."""
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], list(block))


def gate(both: Tensor, activation: str) -> Tensor:
    """both (T, 2 O), alternating as a weight's rows do -> activation(gate) * other, (T, O)."""
    num_tokens, num_outputs = len(both), both.shape[1] // 2
    output = torch.empty(num_tokens, num_outputs, dtype=both.dtype, device=both.device)
    _gate[(num_tokens, triton.cdiv(num_outputs, _PIECE))](
        both, output, num_outputs, BLOCK=GATE_BLOCK, PIECE=_PIECE, ACTIVATION=activation, num_warps=4
    )
    return output


@triton.jit(do_not_specialize=["num_tokens"])
def _multiply(
    x,
    weight,
    residual,
    output,
    num_tokens,
    num_rows,
    num_inputs,
    num_programs,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    num_down, num_across = tl.cdiv(num_tokens, TOKENS), tl.cdiv(num_rows, OUTPUTS)
    num_pieces = tl.cdiv(num_inputs, INPUTS)
    for tile in tl.range(tl.program_id(0), num_down * num_across, num_programs, flatten=True):
        group = tile // (GROUP * num_across)
        height = tl.minimum(num_down - group * GROUP, GROUP)
        within = tile % (GROUP * num_across)
        down = group * GROUP + within % height
        across = within // height
        # To and fro, so that a group begins with the weights with which the last one ended.
        across = tl.where(group % 2 == 1, num_across - 1 - across, across)
        acc = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        for piece in range(num_pieces):
            a = x.load([down * TOKENS, piece * INPUTS])
            b = weight.load([across * OUTPUTS, piece * INPUTS])
            acc = tl.dot(a, b.T, acc)
        first, second = tl.split(tl.permute(tl.reshape(acc, (TOKENS, 2, OUTPUTS // 2)), (0, 2, 1)))
        if HAS_RESIDUAL:
            first += residual.load([down * TOKENS, across * OUTPUTS])
            output.store([down * TOKENS, across * OUTPUTS], first.to(output.dtype))
            second += residual.load([down * TOKENS, across * OUTPUTS + OUTPUTS // 2])
            output.store([down * TOKENS, across * OUTPUTS + OUTPUTS // 2], second.to(output.dtype))
        elif ACTIVATION is None:
            output.store([down * TOKENS, across * OUTPUTS], first.to(output.dtype))
            output.store([down * TOKENS, across * OUTPUTS + OUTPUTS // 2], second.to(output.dtype))
        else:
            gated = _activate(first, ACTIVATION) * second
            output.store([down * TOKENS, across * (OUTPUTS // 2)], gated.to(output.dtype))


@triton.jit
def _gate(both, output, num_outputs, BLOCK: tl.constexpr, PIECE: tl.constexpr, ACTIVATION: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    mask = place < num_outputs
    source = both + token * 2 * num_outputs + place // BLOCK * (2 * BLOCK) + place % BLOCK
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + BLOCK, mask=mask, other=0.0).to(tl.float32)
    gated = _activate(first, ACTIVATION) * second
    tl.store(output + token * num_outputs + place, gated.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu_tanh")
    # The second is x / 2 * (1 + tanh(y / 2)), with tanh by an exponential.
    y = x if ACTIVATION == "silu" else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-y))
