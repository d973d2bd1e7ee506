"""Paged prefill against its twin in float64. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

from typing import Any

import numpy as np
import pytest
import torch

from worker.engine.kernels.paged_prefill import PrefillVariant, plan_prefill, prefill
from worker.engine.kernels.plain import plain_prefill

#: A prompt, a piece behind what is computed already, one token, one more than a tile of queries, one of one block.
QUERY_LENS, KV_LENS = [20, 7, 1, 17, 16], [20, 50, 1, 40, 16]


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "terms", "dtype"),
    [
        (4, 2, 32, 16, {}, torch.float32),
        (3, 1, 24, 64, {}, torch.float16),
        (2, 2, 16, 32, {"window": 9}, torch.float32),
        (8, 2, 16, 16, {"softcap": 1.5}, torch.float32),
        (2, 1, 16, 16, {"window": 20, "softcap": 1.5}, torch.float32),
        (4, 2, 32, 16, {}, torch.float8_e4m3fn),
    ],
)
def test_prefill_equals_its_twin(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    terms: dict[str, Any],
    dtype: torch.dtype,
    is_split: bool,
) -> None:
    torch.manual_seed(0)
    num_per_piece = -(-max(KV_LENS) // block_size)
    num_blocks = num_per_piece * len(KV_LENS) + 1
    tables = torch.randperm(num_blocks)[:-1].view(len(KV_LENS), num_per_piece).int()
    cache_dtype, dtype = dtype, torch.float16 if dtype == torch.float8_e4m3fn else dtype
    caches = torch.randn(2, num_blocks, block_size, kv_heads, head_dim, dtype=dtype)
    for table, num in zip(tables.long(), KV_LENS, strict=True):  # what lies behind a text is not a number
        places = torch.stack((table.repeat_interleave(block_size), torch.arange(len(table) * block_size) % block_size))
        caches[:, places[0, num:], places[1, num:]] = torch.nan
    query = torch.randn(sum(QUERY_LENS), 2 * heads, head_dim, dtype=dtype)[:, :heads]
    k_cache, v_cache = caches.to(cache_dtype)
    expected = plain_prefill(
        query.double(), k_cache.double(), v_cache.double(), tables, QUERY_LENS, KV_LENS, scale=0.2, **terms
    )

    variant = PrefillVariant(queries=16, keys=16, is_split=is_split)
    lens = np.array(QUERY_LENS), np.array(KV_LENS)
    plan = plan_prefill(*lens, heads // kv_heads, head_dim, query.device, variant)
    found = prefill(query, k_cache, v_cache, tables, plan, scale=0.2, **terms)

    assert (found.double() - expected).abs().max() < {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
