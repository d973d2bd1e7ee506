"""DecodePlan: the tiles of tokens that the rows of a decode step attend to, listed on the device once a step.

Letters: D rows, G key/value heads, B block size, M blocks per table, P rows that share a prefix, T tiles of tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.engine.kernels.decode_variant import DecodeVariant

#: What a tile's `info` holds: tokens within it, and from bit 10 the first of them that is inside the window.
LOW_SHIFT = tl.constexpr(10)
FIRST_BIT = tl.constexpr(1 << 20)
LAST_BIT = tl.constexpr(1 << 21)
#: Tiles that are listed at a time.
_LISTED = 32
#: Rows that a program looks at: few numbers, since the kernel is compiled for each.
_FEW_ROWS, _MANY_ROWS = 128, 1024


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The tiles of a step, in the order of rows. Lengths alone decide them: layers of one window share a plan."""

    variant: DecodeVariant
    num_rows: int
    slots: Tensor  # (T * pieces,) int32, the slot of the first token of each part of a tile that lies in one block
    rows: Tensor  # (T,) int32
    info: Tensor  # (T,) int32
    bounds: Tensor  # (D + 1,) int32, first tile of each row; the last is the number of tiles
    num_done: Tensor  # (D * G,) int32, zero but while a layer runs: programs that have left their part of a row


def plan_decode(
    tables: Tensor,
    lens: Tensor,
    block_size: int,
    num_kv_heads: int,
    variant: DecodeVariant,
    *,
    starts: Tensor | None = None,
    window: int | None = None,
    table_rows: Tensor | None = None,
) -> DecodePlan:
    """The tiles of rows with `tables` (D, M) int32 and `lens` (D,) int32.

    Each row's tokens begin at `starts` (D,) int32, multiples of the block size, else at 0. `table_rows` (D, P) int32
    names the rows of `tables` to use instead of the first D: of each the first is taken. A row of length 0 has no tile.
    """
    num_rows, tile = len(lens), variant.tile
    piece = min(tile, block_size)
    assert max(tile, block_size) % piece == 0, f"a tile of {tile} tokens in blocks of {block_size}"
    capacity = num_rows * -(-tables.shape[1] * block_size // tile)
    num_pieces = tile // piece
    slots, rows, info, bounds = (
        torch.empty(num, dtype=torch.int32, device=lens.device)
        for num in (capacity * num_pieces, capacity, capacity, num_rows + 1)
    )
    _list_tiles[(num_rows,)](
        tables,
        lens,
        lens if starts is None else starts,
        lens if table_rows is None else table_rows,
        slots,
        rows,
        info,
        bounds,
        num_rows,
        tables.stride(0),
        1 if table_rows is None else table_rows.stride(0),
        0 if window is None else window,
        BLOCK=block_size,
        TILE=tile,
        PIECE=piece,
        LISTED=_LISTED,
        ROWS=_FEW_ROWS if num_rows <= _FEW_ROWS else triton.next_power_of_2(max(num_rows, _MANY_ROWS)),
        HAS_STARTS=starts is not None,
        HAS_TABLE_ROWS=table_rows is not None,
        HAS_WINDOW=window is not None,
        num_warps=4,
    )
    num_done = torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=lens.device)
    return DecodePlan(variant, num_rows, slots, rows, info, bounds, num_done)


@triton.jit(do_not_specialize=["num_rows"])
def _list_tiles(
    tables,
    lens,
    starts,
    table_rows,
    slots,
    rows,
    info,
    bounds,
    num_rows,
    table_stride,
    table_rows_stride,
    window,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One program per row. It counts the tiles of the rows before it, then lists its own."""
    row = tl.program_id(0)
    everyone = tl.arange(0, ROWS)
    all_lens = tl.load(lens + everyone, mask=everyone < num_rows, other=0)
    all_begins = tl.zeros_like(all_lens)
    if HAS_STARTS:
        all_begins = tl.load(starts + everyone, mask=everyone < num_rows, other=0)
    if HAS_WINDOW:
        all_begins = tl.maximum(all_begins, all_lens - window)
    all_nums = tl.where(all_lens > all_begins, tl.cdiv(all_lens, TILE) - all_begins // TILE, 0)
    before = tl.sum(tl.where(everyone < row, all_nums, 0), axis=0)
    num = tl.sum(tl.where(everyone == row, all_nums, 0), axis=0)
    length = tl.sum(tl.where(everyone == row, all_lens, 0), axis=0)
    begin = tl.sum(tl.where(everyone == row, all_begins, 0), axis=0)
    tl.store(bounds + row, before)
    if row == num_rows - 1:
        tl.store(bounds + num_rows, before + num)
    table = row
    if HAS_TABLE_ROWS:
        table = tl.load(table_rows + row * table_rows_stride)
    first = begin // TILE
    for i in range(0, num, LISTED):
        index = i + tl.arange(0, LISTED)
        is_mine = index < num
        place = (first + index) * TILE  # of the tile's first token in its row
        low = tl.maximum(begin - place, 0)
        value = tl.minimum(length - place, TILE) | (low << LOW_SHIFT)
        value |= tl.where(index == 0, FIRST_BIT, 0) | tl.where(index == num - 1, LAST_BIT, 0)
        tl.store(info + before + index, value, mask=is_mine)
        tl.store(rows + before + index, row, mask=is_mine)
        for piece in tl.static_range(TILE // PIECE):
            token = place + piece * PIECE
            is_there = is_mine & (token < length)
            block = tl.load(tables + table * table_stride + token // BLOCK, mask=is_there, other=0)
            slot = block * BLOCK + token % BLOCK
            tl.store(slots + (before + index) * (TILE // PIECE) + piece, slot, mask=is_mine)
