"""Token scores: a token's log-probability and its rank, in one reading of the logits as they are; and the best tokens.

The reading leaves the largest logit of each small group of tokens. Among the groups the best tokens hold a tournament:
the group that leads is read, those of its tokens that beat all other groups are the next best, and the best of what is
left of it speaks for it from then on. So N best tokens cost about N readings of a group, and at worst, where very many
logits are equal, each group is read once more.

Letters: C positions, V vocabulary, N best tokens, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _BLOCKS = 4096, 2  # logits of a block, and blocks at a time
#: Neighbours that are a group, with those as many blocks further on: 16 bytes of 16 bits each, which is what a thread
#: reads at once. Groups are then about as many as the tokens of each, and a round looks at all of both.
_GROUP = 8
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-(1 << 63))
#: What no logit is below, as far as sums go. Finite, since the difference of two infinities is not a number; and a
#: power of two, since a GPU may multiply and subtract at once: what it does not round then is nothing.
_LEAST = tl.constexpr(-(2.0**100))


def score_tokens(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (C, V), targets (C,) int64 -> log-probabilities (C,) float32 and ranks (C,) int32 of the targets,
    and of the N best tokens, best first, ids (C, N) int32 and log-probabilities (C, N) float32.

    The most likely token has rank 1; equal logits rank by token id. N is `num_top`, or V where that is less.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert targets.is_contiguous()
    num_top = min(num_top, vocab_size)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    top_ids = torch.empty(num_rows, num_top, dtype=torch.int32, device=logits.device)
    top_logprobs = torch.empty(num_rows, num_top, dtype=torch.float32, device=logits.device)
    log_sums = group_tops = None
    if num_top > 0:
        log_sums = torch.empty_like(logprobs)
        group_tops = torch.empty(num_rows, _BLOCK // _GROUP, dtype=torch.float32, device=logits.device)  # (C, G)
    sizes = {"row_stride": logits.stride(0), "vocab_size": vocab_size, "BLOCK": _BLOCK, "GROUP": _GROUP}
    _score[(num_rows,)](logits, targets, logprobs, ranks, log_sums, group_tops, **sizes, BLOCKS=_BLOCKS, num_warps=8)
    if num_top > 0:
        # One warp: a round is a chain of reductions, and rows enough run beside each other.
        _find_best[(num_rows,)](
            logits, log_sums, group_tops, top_ids, top_logprobs, num_top, **sizes,
            BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, _BLOCK)), num_warps=1,
        )  # fmt: skip
    return logprobs, ranks, top_ids, top_logprobs


@triton.jit
def _score(
    logits,
    targets,
    logprobs,
    ranks,
    log_sums,
    group_tops,
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per row. Each group keeps a maximum and a sum of its own: nothing is exchanged before the end."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * row_stride
    target = tl.load(targets + row).to(tl.int32)
    chosen = tl.load(base + target).to(tl.float32)
    above = _next_above(chosen)
    num: tl.constexpr = BLOCK // GROUP
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # What equals the target counts where it comes before: all of it or nothing, but in the blocks of the target itself.
    token = target // (BLOCKS * BLOCK) * (BLOCKS * BLOCK) + place
    x = tl.load(base + token, mask=token < target, other=0.0).to(tl.float32)
    num_before = _group_sums(((x == chosen) & (token < target)).to(tl.int32), num, GROUP)
    best = tl.full([num], _LEAST, tl.float32)
    total = tl.zeros([num], tl.float32)
    for start in tl.range(0, vocab_size, BLOCKS * BLOCK):
        token = start + place
        x = tl.load(base + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        least = tl.where(start + BLOCKS * BLOCK <= target, chosen, above)
        num_before += _group_sums((x >= least).to(tl.int32), num, GROUP)
        grouped = tl.reshape(x, (BLOCKS, num, GROUP))
        most = tl.maximum(best, tl.max(tl.max(grouped, axis=2), axis=0))
        shift = most * _LOG2_E
        sums = tl.sum(tl.exp2(grouped * _LOG2_E - shift[None, :, None]), axis=2)
        total = total * tl.exp2(best * _LOG2_E - shift) + tl.sum(sums, axis=0)
        best = most
    shift = tl.max(best, axis=0) * _LOG2_E
    log_sum = (shift + tl.log2(tl.sum(total * tl.exp2(best * _LOG2_E - shift), axis=0))) * _LN_2
    tl.store(logprobs + row, chosen - log_sum)
    tl.store(ranks + row, tl.sum(num_before, axis=0) + 1)
    if group_tops is not None:
        tl.store(group_tops + row * num + tl.arange(0, num), best)
        tl.store(log_sums + row, log_sum)


@triton.jit
def _group_sums(x, num: tl.constexpr, GROUP: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0], num, GROUP)), axis=2), axis=0)


@triton.jit
def _next_above(x):
    """The least float32 that is greater; nothing is as great as what comes after infinity, or after no number."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    above = tl.where(bits < 0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    return tl.where(x == x, above, x)  # of the bits of what is none, the next ones may be a number's


@triton.jit
def _keys(values, ids):
    """Whole numbers in the order of ranks: by logit, then by id."""
    values = tl.where(values == values, values + 0.0, -float("inf"))  # no negative zero, and nothing without an order
    bits = values.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _id(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value(key):
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_top"])
def _find_best(
    logits,
    log_sums,
    group_tops,
    top_ids,
    top_logprobs,
    num_top,
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per row. A group's head is a key that none of its tokens left exceeds: until the group is read, its
    largest logit with its first id. A round takes a token or makes a head exact, so there are at most N + G."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    log_sum = tl.load(log_sums + row)
    num: tl.constexpr = BLOCK // GROUP
    first_ids = tl.arange(0, num) * GROUP
    tops = tl.load(group_tops + row * num + tl.arange(0, num))
    tops = tl.where(tops == tops, tops, float("inf"))
    heads = tl.where(first_ids < vocab_size, _keys(tops, first_ids), _LOWEST)
    places = tl.arange(0, BLOCKS * GROUP)
    offsets = places // GROUP * BLOCK + places % GROUP
    last = tl.full((), (1 << 63) - 1, tl.int64)
    count = tl.full((), 0, tl.int32)
    while count < num_top:
        lead = tl.max(heads, axis=0)
        others = tl.max(tl.where(heads == lead, _LOWEST, heads), axis=0)
        ids = offsets + _id(lead) % BLOCK // GROUP * GROUP
        values = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
        keys = _keys(values, ids)
        keys = tl.where((ids < vocab_size) & (keys < last), keys, _LOWEST)
        head = tl.max(keys, axis=0)
        while (head > others) & (count < num_top):
            at = row.to(tl.int64) * num_top + count
            tl.store(top_ids + at, _id(head))
            tl.store(top_logprobs + at, _value(head) - log_sum)
            last = head
            count += 1
            head = tl.max(tl.where(keys < head, keys, _LOWEST), axis=0)
        heads = tl.where(heads == lead, head, heads)
