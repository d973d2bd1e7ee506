"""Paged decode: attention of many single-token rows over their blocks, split so that every program reads as much.

The tokens of all rows are cut into tiles, which a DecodePlan lists on the device, once a step, and in each layer a
fixed number of programs takes an equal run of the list each. So neither the grid nor the balance depends on lengths,
which the host need not know, and the launches can be captured in a CUDA graph. A row that is cut by a program's
boundary leaves partial results with their log-sum-exp, which the last of its programs to be done merges.

A tile's queries are those of the heads that share a key/value head, of one row, or of several rows that share a prefix:
the same kernel then attends to each group's prefix once, and the rows' own pass begins behind it and merges.

Letters: D rows, H query heads, G key/value heads, J = H / G, E head size, N blocks, B block size, M blocks per table,
X tiles of rows that share a prefix, P rows in such a tile, T tiles of tokens, L tokens per tile, C programs per
key/value head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.engine.kernels.decode_plan import FIRST_BIT, LAST_BIT, LOW_SHIFT, DecodePlan
from worker.engine.kernels.multiprocessors import num_multiprocessors
from worker.engine.kernels.prefix_groups import PrefixGroups

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = 1.4426950408889634


def decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    softcap: float | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    groups: PrefixGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """query (D, H, E), caches (N, B, G, E) -> outputs (D, H, E) and log-sum-exps (D, H) float32, to base e.

    `prefix` are outputs (D, H, E) float32 and log-sum-exps (D, H) of what comes before the plan's starts, -inf where
    nothing does; they are merged in. With `groups` the plan is of their prefixes, outputs are float32, and a row in no
    group has a log-sum-exp of -inf. Rows without tiles are left as they are. Strides are free but for the last.
    """
    variant = plan.variant
    num_rows, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    num_shared = num_heads // num_kv_heads
    num_members = 1 if groups is None else groups.members.shape[1]
    num_queries = max(triton.next_power_of_2(num_members * num_shared), 16)
    head_pad = triton.next_power_of_2(head_dim)
    device = query.device
    if groups is None:
        output = torch.empty(num_rows, num_heads, head_dim, dtype=query.dtype, device=device)
        lse = torch.empty(num_rows, num_heads, dtype=torch.float32, device=device)
    else:
        output = torch.empty(num_rows, num_heads, head_dim, dtype=torch.float32, device=device)
        lse = torch.full((num_rows, num_heads), -torch.inf, dtype=torch.float32, device=device)
    num_programs = max(num_multiprocessors(device) * variant.programs_per_sm // num_kv_heads, 1)
    # Of a row whose beginning, and one whose end, lies with another program.
    parts = torch.empty(2 * num_programs, num_kv_heads, num_queries, head_pad, dtype=torch.float32, device=device)
    part_lse = torch.empty(2 * num_programs, num_kv_heads, num_queries, dtype=torch.float32, device=device)
    prefix_output, prefix_lse = (output, lse) if prefix is None else prefix
    members = plan.bounds if groups is None else groups.members
    _attend_tiles[(num_programs * num_kv_heads,)](
        query,
        k_cache,
        v_cache,
        output,
        lse,
        prefix_output,
        prefix_lse,
        parts,
        part_lse,
        plan.slots,
        plan.rows,
        plan.info,
        plan.bounds,
        plan.num_done,
        members,
        plan.num_rows,
        num_programs,
        query.stride(0),
        query.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        scale * _LOG2_E,
        (softcap or 0.0) * _LOG2_E,
        BLOCK=block_size,
        TILE=variant.tile,
        PIECE=min(variant.tile, block_size),
        HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        NESTED=variant.is_nested,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        SHARED=num_shared,
        MEMBERS=num_members,
        QUERIES=num_queries,
        HEAD=head_dim,
        HEAD_PAD=head_pad,
        HAS_MEMBERS=groups is not None,
        HAS_PREFIX=prefix is not None,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )
    return output, lse


@triton.jit(do_not_specialize=["num_rows"])
def _attend_tiles(
    query,
    k_cache,
    v_cache,
    output,
    lse,
    prefix_output,
    prefix_lse,
    parts,
    part_lse,
    slots,
    rows,
    info,
    bounds,
    num_done,
    members,
    num_rows,
    num_programs,
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
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NESTED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    MEMBERS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """A run of tiles for one key/value head. Programs of one run and different heads are neighbours, so that they read
    the same tokens at about the same time."""
    program = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    num_tiles = tl.load(bounds + num_rows)
    per_program = tl.cdiv(num_tiles, num_programs)
    first_tile = program * per_program
    end_tile = tl.minimum(first_tile + per_program, num_tiles)

    q_index = tl.arange(0, QUERIES)
    e_index = tl.arange(0, HEAD_PAD)
    head = kv_head * SHARED + q_index % SHARED
    member = q_index // SHARED
    k_base = k_cache + kv_head * k_head
    v_base = v_cache + kv_head * v_head

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, HEAD_PAD], tl.float32)
    # Read one tile ahead: loaded where they are used, they would take half of the pipeline's stages.
    has_any = first_tile < end_tile
    next_row = tl.load(rows + first_tile, mask=has_any, other=0)
    next_value = tl.load(info + first_tile, mask=has_any, other=0)
    next_slot = tl.load(slots + first_tile * (TILE // PIECE), mask=has_any, other=0)
    if NESTED:
        # Row by row, each with its queries in registers: what is best when they are many and rows are long.
        begin = first_tile
        while begin < end_tile:
            row = tl.load(rows + begin)
            is_from_start = (tl.load(bounds + row) == begin).to(tl.int32)
            end = tl.minimum(tl.load(bounds + row + 1), end_tile)
            q_row, is_query, q = _load_queries(
                row, query, members, query_row, query_head, head, member, e_index,
                SHARED, MEMBERS, QUERIES, HEAD, HAS_MEMBERS,
            )  # fmt: skip
            for tile in tl.range(begin, end):
                value, slot = next_value, next_slot
                next_tile = tl.minimum(tile + 1, end_tile - 1)
                next_value = tl.load(info + next_tile)
                next_slot = tl.load(slots + next_tile * (TILE // PIECE))
                best, total, acc = _attend_tile(
                    tile, slot, value, tile == begin, q, best, total, acc, k_base, v_base, slots,
                    k_block, k_token, v_block, v_token, scale, softcap,
                    BLOCK, TILE, PIECE, HEAD, HEAD_PAD, HAS_SOFTCAP, PRECISION,
                )  # fmt: skip
            _leave(
                is_from_start, tl.load(bounds + row + 1) == end, program, kv_head, best, total, acc,
                q_row, head, is_query, output, lse, prefix_output, prefix_lse, parts, part_lse,
                HEADS, KV_HEADS, QUERIES, HEAD, HEAD_PAD, HAS_PREFIX,
            )  # fmt: skip
            begin = end
    else:
        is_from_start = 0  # whether this program has had the current row from its first tile on
        for tile in tl.range(first_tile, end_tile):
            row, value, slot = next_row, next_value, next_slot
            next_tile = tl.minimum(tile + 1, end_tile - 1)
            next_row = tl.load(rows + next_tile)
            next_value = tl.load(info + next_tile)
            next_slot = tl.load(slots + next_tile * (TILE // PIECE))
            is_first = (value & FIRST_BIT) != 0
            is_last = (value & LAST_BIT) != 0
            q_row, is_query, q = _load_queries(
                row, query, members, query_row, query_head, head, member, e_index,
                SHARED, MEMBERS, QUERIES, HEAD, HAS_MEMBERS,
            )  # fmt: skip
            best, total, acc = _attend_tile(
                tile, slot, value, is_first, q, best, total, acc, k_base, v_base, slots,
                k_block, k_token, v_block, v_token, scale, softcap,
                BLOCK, TILE, PIECE, HEAD, HEAD_PAD, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
            is_from_start = tl.where(is_first, 1, is_from_start)
            if is_last | (tile == end_tile - 1):
                _leave(
                    is_from_start, is_last, program, kv_head, best, total, acc,
                    q_row, head, is_query, output, lse, prefix_output, prefix_lse, parts, part_lse,
                    HEADS, KV_HEADS, QUERIES, HEAD, HEAD_PAD, HAS_PREFIX,
                )  # fmt: skip

    if first_tile < end_tile:
        tl.debug_barrier()  # all threads have stored their share of the parts
        first_row, last_row = tl.load(rows + first_tile), tl.load(rows + end_tile - 1)
        for i in range(tl.where(first_row == last_row, 1, 2)):
            row = tl.where(i == 0, first_row, last_row)
            first_program = tl.load(bounds + row) // per_program
            last_program = (tl.load(bounds + row + 1) - 1) // per_program
            if first_program < last_program:
                done = num_done + row * KV_HEADS + kv_head
                if tl.atomic_add(done, 1, sem="acq_rel") == last_program - first_program:
                    tl.store(done, 0)
                    _merge_row(
                        row,
                        first_program,
                        last_program,
                        kv_head,
                        output,
                        lse,
                        prefix_output,
                        prefix_lse,
                        parts,
                        part_lse,
                        members,
                        HEADS,
                        KV_HEADS,
                        SHARED,
                        MEMBERS,
                        QUERIES,
                        HEAD,
                        HEAD_PAD,
                        HAS_MEMBERS,
                        HAS_PREFIX,
                    )


@triton.jit
def _load_queries(
    row,
    query,
    members,
    query_row,
    query_head,
    head,
    member,
    e_index,
    SHARED: tl.constexpr,
    MEMBERS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
):
    """Of which row each query is, whether it is one at all, and the queries."""
    q_row, is_query = _rows_of(row, members, member, MEMBERS, HAS_MEMBERS)
    place = q_row.to(tl.int64)[:, None] * query_row + head[:, None] * query_head + e_index[None, :]
    return q_row, is_query, tl.load(query + place, mask=is_query[:, None] & (e_index[None, :] < HEAD), other=0.0)


@triton.jit
def _rows_of(row, members, member, MEMBERS: tl.constexpr, HAS_MEMBERS: tl.constexpr):
    """The row itself, or those that are members of it; and which of a tile's queries there are."""
    if HAS_MEMBERS:
        q_row = tl.load(members + row * MEMBERS + member, mask=member < MEMBERS, other=-1)
        is_query = q_row >= 0
    else:
        q_row = tl.zeros_like(member) + row
        is_query = member == 0
    return q_row, is_query


@triton.jit
def _attend_tile(
    tile,
    first_slot,
    value,
    is_first,
    q,
    best,
    total,
    acc,
    k_base,
    v_base,
    slots,
    k_block,
    k_token,
    v_block,
    v_token,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One more tile of keys and values; with `is_first` what was before it is forgotten."""
    n_index = tl.arange(0, TILE)
    e_index = tl.arange(0, HEAD_PAD)[None, :]
    is_there = n_index < (value & 1023)
    mask = is_there[:, None] & (e_index < HEAD)
    if PIECE == TILE:
        block = (first_slot // BLOCK).to(tl.int64)
        offset = first_slot % BLOCK + n_index
        k_place = block * k_block + offset[:, None] * k_token + e_index
        v_place = block * v_block + offset[:, None] * v_token + e_index
    else:
        slot = tl.load(slots + tile * (TILE // PIECE) + n_index // PIECE) + n_index % PIECE
        block = (slot // BLOCK).to(tl.int64)
        offset = slot % BLOCK
        k_place = block[:, None] * k_block + offset[:, None] * k_token + e_index
        v_place = block[:, None] * v_block + offset[:, None] * v_token + e_index
    k = tl.load(k_base + k_place, mask=mask, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        # softcap * tanh(scores / softcap), to base 2 as the scores are
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) / softcap)) - 1.0)
    is_attended = is_there & (n_index >= ((value >> LOW_SHIFT) & 1023))
    scores = tl.where(is_attended[None, :], scores, float("-inf"))

    before = tl.where(is_first, float("-inf"), best)
    best = tl.maximum(before, tl.max(scores, axis=1))
    weights = tl.exp2(scores - best[:, None])
    shrink = tl.exp2(before - best)
    total = total * shrink + tl.sum(weights, axis=1)
    v = tl.load(v_base + v_place, mask=mask, other=0.0).to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return best, total, acc


@triton.jit
def _leave(
    is_from_start,
    is_to_end,
    program,
    kv_head,
    best,
    total,
    acc,
    q_row,
    head,
    is_query,
    output,
    lse,
    prefix_output,
    prefix_lse,
    parts,
    part_lse,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """Store a row's result, or the part of it that this program had."""
    e_index = tl.arange(0, HEAD_PAD)
    part = acc / total[:, None]
    log_sum = best + tl.log2(total)
    if is_to_end & (is_from_start == 1):
        _finish(
            part, log_sum, q_row, head, is_query, e_index, output, lse, prefix_output, prefix_lse,
            HEADS, HEAD, HAS_PREFIX,
        )  # fmt: skip
    else:
        place = ((program * 2 + is_from_start) * KV_HEADS + kv_head) * QUERIES + tl.arange(0, QUERIES)
        tl.store(part_lse + place, log_sum, mask=is_query)
        tl.store(
            parts + place[:, None] * HEAD_PAD + e_index[None, :],
            part,
            mask=is_query[:, None] & (e_index[None, :] < HEAD),
        )


@triton.jit
def _finish(
    part,
    log_sum,
    row,
    head,
    is_query,
    e_index,
    output,
    lse,
    prefix_output,
    prefix_lse,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """Store a row's result, merged with what its prefix gave. `log_sum` is to base 2."""
    place = row.to(tl.int64) * HEADS + head
    mask = is_query[:, None] & (e_index[None, :] < HEAD)
    if HAS_PREFIX:
        other_sum = tl.load(prefix_lse + place, mask=is_query, other=float("-inf")) / _LN_2
        other = tl.load(
            prefix_output + place[:, None] * HEAD + e_index[None, :],
            mask=mask & (other_sum[:, None] > float("-inf")),
            other=0.0,
        )
        most = tl.maximum(log_sum, other_sum)
        mine, theirs = tl.exp2(log_sum - most), tl.exp2(other_sum - most)
        part = (part * mine[:, None] + other * theirs[:, None]) / (mine + theirs)[:, None]
        log_sum = most + tl.log2(mine + theirs)
    tl.store(lse + place, log_sum * _LN_2, mask=is_query)
    tl.store(output + place[:, None] * HEAD + e_index[None, :], part.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _merge_row(
    row,
    first_program,
    last_program,
    kv_head,
    output,
    lse,
    prefix_output,
    prefix_lse,
    parts,
    part_lse,
    members,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    MEMBERS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """The parts that these programs have left of a row, or of a tile of rows, become its result."""
    q_index = tl.arange(0, QUERIES)
    e_index = tl.arange(0, HEAD_PAD)
    head = kv_head * SHARED + q_index % SHARED
    member = q_index // SHARED
    q_row, is_query = _rows_of(row, members, member, MEMBERS, HAS_MEMBERS)
    mask = is_query[:, None] & (e_index[None, :] < HEAD)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, HEAD_PAD], tl.float32)
    for program in range(first_program, last_program + 1):
        is_head = (program == first_program).to(tl.int32)
        place = ((program * 2 + is_head) * KV_HEADS + kv_head) * QUERIES + q_index
        # Past the L1 cache, which does not see what other multiprocessors write.
        log_sum = tl.load(part_lse + place, mask=is_query, other=0.0, cache_modifier=".cg")
        part = tl.load(parts + place[:, None] * HEAD_PAD + e_index[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        most = tl.maximum(best, log_sum)
        shrink, weight = tl.exp2(best - most), tl.exp2(log_sum - most)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        best = most
    _finish(
        acc / total[:, None],
        best + tl.log2(total),
        q_row,
        head,
        is_query,
        e_index,
        output,
        lse,
        prefix_output,
        prefix_lse,
        HEADS,
        HEAD,
        HAS_PREFIX,
    )
