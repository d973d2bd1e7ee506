"""Paged prefill: causal attention of pieces of prompts, each to its own tokens in the blocks, itself included.

A program has the queries of some tokens, and of all heads that share a key/value head with them, up to a power of two:
K and V are read once for all of them, and little is computed beyond the diagonal. Which tokens a program has is worked
out on the host once a step, the longest first, so that no long one is left to run alone at the end.

Letters: P query tokens of all pieces, S pieces, X tiles, H query heads, G key/value heads, E head size, N blocks,
B block size, M blocks per table.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
#: Heads of one tile, at most.
_MOST_HEADS = 8


@dataclass(frozen=True, slots=True)
class PrefillVariant:
    """How the kernel is cut and launched. Measured by benchmarks/kernels_gpu.py."""

    queries: int = 64  # of a tile: tokens times heads
    keys: int = 32  # at a time
    num_warps: int = 4
    num_stages: int = 3
    is_split: bool = True  # what lies before the diagonal in a loop of its own, without a mask


DEFAULT = PrefillVariant()
#: For steps with long prompts, and for heads of more than 128.
LONG = PrefillVariant(keys=64)
LARGE = PrefillVariant(queries=128, num_warps=8)
#: For float32, which is multiplied without tensor cores. Not measured: it is there to compare with.
PLAIN = PrefillVariant(queries=32, keys=16, num_warps=8, num_stages=2)
#: Keys from which a prompt is long.
_LONG_KEYS = 8192


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The tiles of a step, for all layers with so many heads to a key/value head."""

    tiles: Tensor  # (X, 4) int32: first query token, number of them, place of the first among the keys, piece
    num_heads: int  # of a tile
    variant: PrefillVariant


def plan_prefill(
    query_lens: npt.NDArray[np.int64],
    kv_lens: npt.NDArray[np.int64],
    num_shared: int,
    head_dim: int,
    device: torch.device,
    variant: PrefillVariant | None = None,
    num_bytes: int = 2,
) -> PrefillPlan:
    """The tiles of pieces of `query_lens` (S,) tokens, which attend to `kv_lens` (S,), their own included.

    `num_shared` query heads share one key/value head, and their numbers have `num_bytes` each.
    """
    if variant is None and num_bytes > 2:
        variant = PLAIN
    elif variant is None:
        variant = LARGE if head_dim > 128 else LONG if kv_lens.max() >= _LONG_KEYS else DEFAULT
    num_heads = min(num_shared & -num_shared, _MOST_HEADS)
    most = variant.queries // num_heads
    counts = -(-query_lens // most)
    pieces = np.repeat(np.arange(len(query_lens)), counts)
    offsets = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    firsts = (np.cumsum(query_lens) - query_lens)[pieces] + offsets
    nums = np.minimum(most, query_lens[pieces] - offsets)
    places = (kv_lens - query_lens)[pieces] + offsets
    order = np.argsort(-(places + nums), kind="stable")
    tiles = torch.from_numpy(np.stack((firsts, nums, places, pieces), axis=1)[order].astype(np.int32))
    if device.type == "cuda":
        tiles = tiles.pin_memory().to(device, non_blocking=True)
    return PrefillPlan(tiles, num_heads, variant)


def prefill(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    plan: PrefillPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query (P, H, E), caches (N, B, G, E), tables (S, M) int32 -> (P, H, E).

    The queries of a piece are its last tokens. Strides are free but for the last.
    """
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    variant = plan.variant
    output = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    # Programs of the same tokens run side by side, and find in the L2 cache what they share.
    _attend_pieces[(num_heads // plan.num_heads, len(plan.tiles))](
        query,
        k_cache,
        v_cache,
        output,
        plan.tiles,
        tables,
        tables.stride(0),
        query.stride(0),
        query.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        scale * _LOG2_E,
        (softcap or 0.0) * _LOG2_E,
        0 if window is None else window,
        BLOCK=block_size,
        QUERIES=variant.queries,
        KEYS=min(variant.keys, block_size),
        HEADS=num_heads,
        TILE_HEADS=plan.num_heads,
        SHARED=num_heads // num_kv_heads,
        HEAD=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        IS_SPLIT=variant.is_split and window is None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )
    return output


@triton.jit
def _attend_pieces(
    query,
    k_cache,
    v_cache,
    output,
    tiles,
    tables,
    table_stride,
    query_row,
    query_head,
    k_block,
    k_token,
    k_head,
    v_block,
    v_token,
    v_head,
    scale,
    softcap,
    window,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * 4
    first = tl.load(tile)
    num = tl.load(tile + 1)
    first_place = tl.load(tile + 2)
    piece = tl.load(tile + 3)
    first_head = tl.program_id(0) * TILE_HEADS
    kv_head = first_head // SHARED

    row = tl.arange(0, QUERIES)
    token = row // TILE_HEADS  # within the tile
    head = first_head + row % TILE_HEADS
    e_index = tl.arange(0, HEAD_PAD)
    q_row = (first + token).to(tl.int64)
    q_mask = (token < num)[:, None]
    if HEAD != HEAD_PAD:
        q_mask = q_mask & (e_index < HEAD)[None, :]
    q_place = q_row[:, None] * query_row + head[:, None] * query_head + e_index[None, :]
    q = tl.load(query + q_place, mask=q_mask, other=0.0)
    place = first_place + token  # of each query among the keys
    end = first_place + num
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_place - window + 1, 0) // KEYS * KEYS
    middle = begin  # up to here all queries see all keys
    if IS_SPLIT:
        middle = (first_place + 1) // KEYS * KEYS

    # Finite: in a window some rows begin with tiles of which they see none.
    best = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, HEAD_PAD], tl.float32)
    table = tables + piece.to(tl.int64) * table_stride
    k_head_cache = k_cache + kv_head * k_head
    v_head_cache = v_cache + kv_head * v_head
    next_block = tl.load(table + begin // BLOCK)
    if IS_SPLIT:
        for start in tl.range(0, middle, KEYS):
            block = next_block.to(tl.int64)
            # Read one tile ahead: where it is used it would take half of the pipeline's stages.
            next_block = tl.load(table + tl.minimum(start + KEYS, end - 1) // BLOCK)
            best, total, acc = _attend(
                q, best, total, acc, k_head_cache + block * k_block, v_head_cache + block * v_block,
                start, place, end, scale, softcap, window, k_token, v_token,
                BLOCK, KEYS, HEAD, HEAD_PAD, HAS_SOFTCAP, HAS_WINDOW, False, PRECISION,
            )  # fmt: skip
    for start in tl.range(middle, end, KEYS):
        block = next_block.to(tl.int64)
        next_block = tl.load(table + tl.minimum(start + KEYS, end - 1) // BLOCK)
        best, total, acc = _attend(
            q, best, total, acc, k_head_cache + block * k_block, v_head_cache + block * v_block,
            start, place, end, scale, softcap, window, k_token, v_token,
            BLOCK, KEYS, HEAD, HEAD_PAD, HAS_SOFTCAP, HAS_WINDOW, True, PRECISION,
        )  # fmt: skip
    total = tl.where(token < num, total, 1.0)  # what is no query may have attended to nothing
    result = (acc / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + (q_row * HEADS + head)[:, None] * HEAD + e_index[None, :], result, mask=q_mask)


@triton.jit
def _attend(
    q,
    best,
    total,
    acc,
    k_cache,
    v_cache,
    start,
    place,
    end,
    scale,
    softcap,
    window,
    k_token,
    v_token,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys more for all queries of a program: its online softmax, to base 2."""
    offset = start % BLOCK + tl.arange(0, KEYS)
    key = start + tl.arange(0, KEYS)
    e_index = tl.arange(0, HEAD_PAD)
    k_place = k_cache + offset[:, None] * k_token + e_index[None, :]
    v_place = v_cache + offset[:, None] * v_token + e_index[None, :]
    # Beyond the end stands what others have left: a score of it is not looked at, but 0 * NaN would be seen.
    if HEAD != HEAD_PAD:
        k = tl.load(k_place, mask=(e_index < HEAD)[None, :], other=0.0)
        v = tl.load(v_place, mask=(key < end)[:, None] & (e_index < HEAD)[None, :], other=0.0)
    elif IS_MASKED:
        k = tl.load(k_place)
        v = tl.load(v_place, mask=(key < end)[:, None], other=0.0)
    else:
        k = tl.load(k_place)
        v = tl.load(v_place)
    k, v = k.to(q.dtype), v.to(q.dtype)  # the cache may be of float8
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        # softcap * tanh(scores / softcap), to base 2 as the scores are
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) / softcap)) - 1.0)
    if IS_MASKED:
        is_attended = key[None, :] <= place[:, None]
        if HAS_WINDOW:
            is_attended &= key[None, :] > place[:, None] - window
        scores = tl.where(is_attended, scores, float("-inf"))
    most = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - most[:, None])
    shrink = tl.exp2(best - most)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return most, total, acc
