"""Paged prefill: causal attention of pieces of prompts, each to its own tokens in the blocks, itself included.

For CUDA machines without flash-attn. A program has some query tokens of one head, and finds out whose they are from the
cumulative lengths, which the device has; the host only says how many programs there are.

Letters: P query tokens of all pieces, S pieces, H query heads, G key/value heads, E head size, N blocks, B block size,
M blocks per table.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
#: Query tokens and keys at a time; half as many for heads of more than 128.
_QUERIES, _KEYS = 128, 64


def prefill(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    cu_query_lens: Tensor,
    cu_kv_lens: Tensor,
    query_lens: npt.NDArray[np.int64],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query (P, H, E), caches (N, B, G, E), tables (S, M) int32 -> (P, H, E).

    `cu_query_lens` and `cu_kv_lens` (S + 1,) int32 are on the device, `query_lens` (S,) on the host. The queries of a
    piece are its last tokens. Strides are free but for the last.
    """
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    is_large = head_dim > 128
    num_queries = _QUERIES // 2 if is_large else _QUERIES
    num_keys = min(_KEYS // 2 if is_large else _KEYS, block_size)
    output = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    num_tiles = int((-(-query_lens // num_queries)).sum())
    _attend_pieces[(num_tiles, num_heads)](
        query,
        k_cache,
        v_cache,
        output,
        tables,
        cu_query_lens,
        cu_kv_lens,
        len(query_lens),
        tables.stride(0),
        query.stride(0),
        query.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        scale * _LOG2_E,
        (softcap or 0.0) * _LOG2_E,
        0 if window is None else window,
        BLOCK=block_size,
        QUERIES=num_queries,
        KEYS=num_keys,
        PIECES=triton.next_power_of_2(max(len(query_lens), 16)),
        HEADS=num_heads,
        SHARED=num_heads // num_kv_heads,
        HEAD=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=3,
    )
    return output


@triton.jit
def _attend_pieces(
    query,
    k_cache,
    v_cache,
    output,
    tables,
    cu_query_lens,
    cu_kv_lens,
    num_pieces,
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
    PIECES: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last tiles of a prompt have most to read, so they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // SHARED
    index = tl.arange(0, PIECES)
    starts = tl.load(cu_query_lens + index, mask=index < num_pieces, other=0)
    ends = tl.load(cu_query_lens + index + 1, mask=index < num_pieces, other=0)
    nums = tl.where(index < num_pieces, tl.cdiv(ends - starts, QUERIES), 0)
    piece = tl.sum(((tl.cumsum(nums, 0) <= tile) & (index < num_pieces)).to(tl.int32), axis=0)
    tile -= tl.sum(tl.where(index < piece, nums, 0), axis=0)  # now within the piece
    first_query = tl.load(cu_query_lens + piece)
    num_queries = tl.load(cu_query_lens + piece + 1) - first_query
    num_keys = tl.load(cu_kv_lens + piece + 1) - tl.load(cu_kv_lens + piece)

    q_index = tile * QUERIES + tl.arange(0, QUERIES)  # within the piece
    n_index = tl.arange(0, KEYS)
    e_index = tl.arange(0, HEAD_PAD)
    q_mask = (q_index < num_queries)[:, None] & (e_index < HEAD)[None, :]
    q_row = (first_query + q_index).to(tl.int64)
    q = tl.load(query + q_row[:, None] * query_row + head * query_head + e_index[None, :], mask=q_mask, other=0.0)
    place = num_keys - num_queries + q_index  # of each query among the keys
    end = tl.minimum(num_keys, num_keys - num_queries + (tile + 1) * QUERIES)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(num_keys - num_queries + tile * QUERIES - window + 1, 0) // KEYS * KEYS

    best = tl.full(
        [QUERIES], -1e30, tl.float32
    )  # finite: in a window some rows begin with tiles of which they see none
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, HEAD_PAD], tl.float32)
    table = tables + piece * table_stride
    next_block = tl.load(table + begin // BLOCK)
    for start in tl.range(begin, end, KEYS):
        block = next_block.to(tl.int64)
        # Read one tile ahead: where it is used it would take half of the pipeline's stages.
        next_block = tl.load(table + tl.minimum(start + KEYS, end - 1) // BLOCK)
        key = start + n_index
        offset = start % BLOCK + n_index
        mask = (key < end)[:, None] & (e_index < HEAD)[None, :]
        k_place = block * k_block + kv_head * k_head + offset[:, None] * k_token + e_index[None, :]
        v_place = block * v_block + kv_head * v_head + offset[:, None] * v_token + e_index[None, :]
        k = tl.load(k_cache + k_place, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            # softcap * tanh(scores / softcap), to base 2 as the scores are
            scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) / softcap)) - 1.0)
        is_attended = key[None, :] <= place[:, None]
        if HAS_WINDOW:
            is_attended &= key[None, :] > place[:, None] - window
        scores = tl.where(is_attended, scores, float("-inf"))
        most = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - most[:, None])
        shrink = tl.exp2(best - most)
        total = total * shrink + tl.sum(weights, axis=1)
        best = most
        v = tl.load(v_cache + v_place, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    total = tl.where(q_index < num_queries, total, 1.0)  # what is no query may have attended to nothing
    result = (acc / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + (q_row[:, None] * HEADS + head) * HEAD + e_index[None, :], result, mask=q_mask)
