"""Token scores: log-sum-exp, a given token's logit and its rank, in one reading of the logits as they are.

Letters: C positions, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits at a time
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


def score_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (C, V), targets (C,) int64 -> log-probabilities (C,) and log-sum-exps (C,) float32, ranks (C,) int32.

    The most likely token has rank 1; equal logits rank by token id.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    logprobs, log_sums = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    ranks = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    _score[(num_rows,)](
        logits, targets, logprobs, log_sums, ranks, logits.stride(0), vocab_size, BLOCK=_BLOCK, num_warps=8
    )
    return logprobs, log_sums, ranks


@triton.jit
def _score(logits, targets, logprobs, log_sums, ranks, row_stride, vocab_size, BLOCK: tl.constexpr):
    """One program per row. Each lane keeps a maximum and a sum of its own: nothing is exchanged before the end."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    chosen = tl.load(base + target).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -1e30, tl.float32)  # finite: the difference of two infinities is not a number
    total = tl.zeros([BLOCK], tl.float32)
    num_before = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocab_size, BLOCK):
        token = start + lane
        x = tl.load(base + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        num_before += ((x > chosen) | ((x == chosen) & (token < target))).to(tl.int32)
        x *= _LOG2_E
        most = tl.maximum(best, x)
        total = total * tl.exp2(best - most) + tl.exp2(x - most)
        best = most
    most = tl.max(best, axis=0)
    log_sum = (most + tl.log2(tl.sum(total * tl.exp2(best - most), axis=0))) * _LN_2
    tl.store(logprobs + row, chosen - log_sum)
    tl.store(log_sums + row, log_sum)
    tl.store(ranks + row, tl.sum(num_before, axis=0) + 1)
