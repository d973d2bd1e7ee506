"""Paged decode against its twin in float64. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from worker.engine.kernels.decode_plan import plan_decode
from worker.engine.kernels.decode_variant import DecodeVariant
from worker.engine.kernels.paged_decode import decode
from worker.engine.kernels.plain import plain_decode
from worker.engine.kernels.prefix_groups import PrefixGroups

SCALE = 0.2
#: Several rows to a program and several programs to a row; a row that fills its last tile, one of one token, an
#: unused one.
LENS = [5, 17, 64, 165, 1, 0, 33]
WAYS = {
    "one loop": DecodeVariant(32, 4, 3, 2),
    "nested": DecodeVariant(32, 4, 3, 2, is_nested=True),
}
#: Query and key/value heads, head size, block size, tile, and whether the cache is laid out by head.
SHAPES = {
    "two heads to one": (4, 2, 32, 16, 16, False),
    "by head": (4, 4, 16, 64, 32, True),
    "of 7 heads": (7, 1, 64, 16, 64, False),  # and tiles of several blocks
    "large blocks": (6, 2, 24, 256, 64, False),
    "many heads to one": (17, 1, 80, 32, 32, False),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def tensors(
    lens: list[int], heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, is_by_head: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, caches and tables; blocks are scattered, and what lies outside of the rows is not a number."""
    torch.manual_seed(0)
    num_per_row = -(-max(lens) // block_size) + 1
    num_blocks = len(lens) * num_per_row + 3
    shape = (num_blocks, block_size, kv_heads, head_dim)
    caches = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    if is_by_head:
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    tables = torch.randperm(num_blocks)[: len(lens) * num_per_row].view(len(lens), num_per_row).int()
    used = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    for table, length in zip(tables.long(), lens, strict=True):
        places = table[:, None] * block_size + torch.arange(block_size)
        used[places.flatten()[:length]] = True
    for cache in caches:
        cache[~used.view(num_blocks, block_size)] = torch.nan
    # As a fused projection gives it: between keys and values.
    query = torch.randn(len(lens), heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    return query, caches[0], caches[1], tables


def exact(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lens: Tensor, **terms: Any
) -> tuple[Tensor, Tensor]:
    return plain_decode(query.double(), k_cache.double(), v_cache.double(), tables, lens, scale=SCALE, **terms)


def assert_close(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], is_compared: Tensor, dtype: Any) -> None:
    for x, y in zip(one, other, strict=True):
        assert (x[is_compared].double() - y).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("shape", "way", "terms", "dtype"),
    [
        *((shape, "one loop", {}, torch.float32) for shape in SHAPES),
        *((shape, "nested", {}, torch.float32) for shape in ("two heads to one", "of 7 heads")),
        *((shape, "one loop", {"window": 40}, torch.float32) for shape in ("of 7 heads", "large blocks")),
        *((shape, "one loop", {"softcap": 1.5}, torch.float32) for shape in ("two heads to one", "by head")),
        ("large blocks", "one loop", {}, torch.float16),
        ("two heads to one", "nested", {"window": 40, "softcap": 1.5}, torch.float16),
    ],
)
def test_decode_equals_its_twin(shape: str, way: str, terms: dict[str, Any], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, block_size, tile, is_by_head = SHAPES[shape]
    query, k_cache, v_cache, tables = tensors(LENS, heads, kv_heads, head_dim, block_size, dtype, is_by_head)
    lens = torch.tensor(LENS, dtype=torch.int32)
    is_used = lens > 0
    expected = exact(query[is_used], k_cache, v_cache, tables[is_used], lens[is_used], **terms)

    variant = replace(WAYS[way], tile=tile)
    plan = plan_decode(tables, lens, block_size, kv_heads, variant, window=terms.get("window"))
    result = decode(query, k_cache, v_cache, plan, scale=SCALE, softcap=terms.get("softcap"))

    assert_close(result, expected, is_used, dtype)


@pytest.mark.parametrize(
    ("dtype", "softcap", "way"),
    [(torch.float32, None, "one loop"), (torch.float32, 1.5, "nested"), (torch.float16, None, "nested")],
)
def test_shared_prefixes_equal_rows_that_read_all_of_their_blocks(
    dtype: torch.dtype, softcap: float | None, way: str
) -> None:
    block_size, heads, kv_heads = 32, 6, 2
    own = [5, 40, 1, 70, 33, 32, 9]
    groups = {0: ([0, 2, 3, 6], 160), 1: ([1, 5], 32)}  # row 4 is in none
    num_shared = [next((n for rows, n in groups.values() if row in rows), 0) for row in range(len(own))]
    lens = [a + b for a, b in zip(own, num_shared, strict=True)]
    query, k_cache, v_cache, tables = tensors(lens, heads, kv_heads, 32, block_size, dtype, False)
    for rows, n in groups.values():
        tables[rows, : n // block_size] = tables[rows[0], : n // block_size]
    lens_t, starts = (torch.tensor(x, dtype=torch.int32) for x in (lens, num_shared))
    # Three rows to a tile: the first group has two tiles, and one more is not used.
    members = torch.tensor([[0, 2, 3], [6, -1, -1], [1, 5, -1], [-1, -1, -1]], dtype=torch.int32)
    prefixes = PrefixGroups(members, torch.tensor([160, 160, 32, 0], dtype=torch.int32), starts)
    expected = exact(query, k_cache, v_cache, tables, lens_t, softcap=softcap)

    variant = WAYS[way]
    prefix_plan = plan_decode(tables, prefixes.lens, block_size, kv_heads, variant, table_rows=members)
    prefix = decode(query, k_cache, v_cache, prefix_plan, scale=SCALE, softcap=softcap, groups=prefixes)
    plan = plan_decode(tables, lens_t, block_size, kv_heads, variant, starts=starts)
    result = decode(query, k_cache, v_cache, plan, scale=SCALE, softcap=softcap, prefix=prefix)

    assert torch.isinf(prefix[1][4]).all()
    assert_close(result, expected, torch.ones(len(own), dtype=torch.bool), dtype)


@pytest.mark.parametrize("way", list(WAYS))
def test_decode_reads_float8(way: str) -> None:
    query, k_cache, v_cache, tables = tensors(LENS, 4, 2, 32, 16, torch.float16, False)
    k_cache, v_cache = k_cache.to(torch.float8_e4m3fn), v_cache.to(torch.float8_e4m3fn)
    lens = torch.tensor(LENS, dtype=torch.int32)
    is_used = lens > 0
    expected = exact(query[is_used], k_cache, v_cache, tables[is_used], lens[is_used])

    plan = plan_decode(tables, lens, 16, 2, replace(WAYS[way], tile=16))
    result = decode(query, k_cache, v_cache, plan, scale=SCALE)

    assert_close(result, expected, is_used, torch.float16)


def test_a_plan_is_followed_whatever_the_number_of_rows() -> None:
    for lens in ([3], [300], [1] * 20):
        query, k_cache, v_cache, tables = tensors(lens, 2, 1, 16, 16, torch.float32, False)
        lens_t = torch.tensor(lens, dtype=torch.int32)
        expected = exact(query, k_cache, v_cache, tables, lens_t)
        plan = plan_decode(tables, lens_t, 16, 1, DecodeVariant(16, 4, 3, 2))
        for _ in range(2):  # one plan serves all layers
            result = decode(query, k_cache, v_cache, plan, scale=SCALE)
            assert_close(result, expected, lens_t > 0, torch.float32)
