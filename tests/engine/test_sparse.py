"""Decode on sparse matrices equals decode on gathered keys and values."""

import numpy as np
import pytest
import torch

from worker.engine.attention import AttentionStep, AttentionTerms
from worker.engine.backends import sparse
from worker.engine.backends.sdpa import SDPABackend
from worker.engine.backends.sparse import SparseBackend
from worker.engine.kv_cache import KVCache, LayerShape

LENS = [1, 2, 15, 16, 17, 33, 200, 5]


def make_step(num_kv_heads: int) -> AttentionStep:
    """Decode rows of LENS tokens in blocks that lie anywhere, their last ones full of what is nobody's."""
    generator = torch.Generator().manual_seed(1)
    num_blocks = [-(-length // 16) for length in LENS]
    cache = KVCache([LayerShape(num_kv_heads, 32)], sum(num_blocks), 16, torch.device("cpu"), torch.float32)
    for tensor in cache._layers[0]:
        tensor.normal_(generator=generator)
    blocks = torch.split(torch.randperm(sum(num_blocks), generator=generator).int(), num_blocks)
    tables = torch.zeros(len(LENS), max(num_blocks), dtype=torch.int32)
    for table, row in zip(tables, blocks, strict=True):
        table[: len(row)] = row
    lens, none = torch.tensor(LENS, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    no_lens = np.empty(0, dtype=np.int64)
    return AttentionStep(cache, SDPABackend(), len(LENS), none, tables, lens, none, np.array(LENS), no_lens, no_lens)


@pytest.mark.parametrize("max_entries", [1 << 22, 300, 1])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (16, None), (1, 3.0), (150, 0.5)])
def test_sparse_decode_equals_gathered_decode(
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    softcap: float | None,
    max_entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse, "_MAX_ENTRIES", max_entries)
    step = make_step(num_kv_heads)
    query = torch.randn(len(LENS), num_heads, 32, generator=torch.Generator().manual_seed(2))
    (keys, values), terms = step.cache._layers[0], AttentionTerms(0.3, window, softcap)

    output = SparseBackend().decode(query, keys, values, step, terms)

    expected = SDPABackend().decode(query, keys, values, step, terms)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_scores_too_large_for_an_exponential_leave_the_largest() -> None:
    step = make_step(2)
    keys, values = step.cache._layers[0]
    query = torch.full((len(LENS), 2, 32), 1e4)

    output = SparseBackend().decode(query, keys, values, step, AttentionTerms(1.0))

    torch.testing.assert_close(output, SDPABackend().decode(query, keys, values, step, AttentionTerms(1.0)))
    assert output.isfinite().all()
