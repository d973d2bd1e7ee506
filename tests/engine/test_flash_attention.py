"""What flash-attn is told of a step, by a stand-in that computes with torch from what it is told alone."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms, flash_attention_obstacle
from worker.engine.backends.sdpa import SDPABackend, attend_causally
from worker.engine.kv_cache import KVCache, LayerShape

#: Of pieces: tokens, and all they attend to.
QUERY_LENS, KV_LENS = [3, 1, 20], [3, 30, 25]
#: Of decode rows.
DECODE_LENS = [17, 1]
BLOCK_SIZE = 16


def terms_of(options: dict[str, Any]) -> AttentionTerms:
    assert options["causal"]
    reach = options["window_size"][0]
    return AttentionTerms(options["softmax_scale"], None if reach < 0 else reach + 1, options["softcap"] or None)


def flash_attn_varlen_func(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, block_table: Tensor, **options: Any,
) -> Tensor:  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    assert [int(ends.diff().max()) for ends in (cu_seqlens_q, cu_seqlens_k)] == [max_seqlen_q, max_seqlen_k]
    lens = cu_seqlens_k.diff().tolist()
    keys, values = (
        [cache[table.long()].flatten(0, 1)[:num] for table, num in zip(block_table, lens, strict=True)]
        for cache in (k_cache, v_cache)
    )
    queries = torch.split(query, cu_seqlens_q.diff().tolist())
    return torch.cat([attend_causally(*each, terms_of(options)) for each in zip(queries, keys, values, strict=True)])


def flash_attn_with_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, **options: Any
) -> Tensor:
    num_rows, longest = len(cache_seqlens), int(cache_seqlens.max())
    ones, ends = torch.arange(num_rows + 1, dtype=torch.int32), torch.zeros(num_rows + 1, dtype=torch.int32)
    ends[1:] = cache_seqlens.cumsum(0)
    return flash_attn_varlen_func(
        query.squeeze(1), k_cache, v_cache, cu_seqlens_q=ones, cu_seqlens_k=ends,
        max_seqlen_q=1, max_seqlen_k=longest, block_table=block_table, **options,
    ).unsqueeze(1)  # fmt: skip


def test_a_gpu_that_is_too_old_is_an_obstacle_though_the_package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    obstacle = flash_attention_obstacle(torch.device("cuda"), torch.float16)

    assert obstacle == "Tesla T4 is older than compute capability 8.0"


@pytest.mark.parametrize("decode_lens", [DECODE_LENS, []])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, 2.0)])
def test_flash_attention_is_told_where_every_row_and_piece_lies(
    decode_lens: list[int], window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in: Any = ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func, stand_in.flash_attn_with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.delitem(sys.modules, "worker.engine.backends.flash_attention", raising=False)
    from worker.engine.backends.flash_attention import FlashAttentionBackend

    generator, num_decode = torch.Generator().manual_seed(1), len(decode_lens)
    num_tokens, num_rows = num_decode + sum(QUERY_LENS), num_decode + len(QUERY_LENS)
    tables = torch.randperm(2 * num_rows, generator=generator).int().view(num_rows, 2)
    lens = np.array([*decode_lens, *KV_LENS])
    query = torch.randn(num_tokens, 4, 8, generator=generator)
    key, value = torch.randn(2, num_tokens, 2, 8, generator=generator)
    cache = KVCache([LayerShape(2, 8)], 2 * num_rows, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    for tensor in cache._layers[0]:
        tensor.normal_(generator=generator)
    rows = np.repeat(np.arange(num_rows), [*[1] * num_decode, *QUERY_LENS])
    last = np.repeat(np.cumsum([*[1] * num_decode, *QUERY_LENS]), [*[1] * num_decode, *QUERY_LENS])
    positions = torch.from_numpy(lens[rows] - last + np.arange(num_tokens))
    slots = tables[torch.from_numpy(rows), positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE

    def attend(backend: Any) -> Tensor:
        step = AttentionStep(
            cache,
            backend,
            num_decode,
            slots,
            tables[:num_decode],
            torch.from_numpy(lens[:num_decode]).int(),
            tables[num_decode:],
            lens[:num_decode],
            np.array(QUERY_LENS),
            np.array(KV_LENS),
        )
        return step.attend(0, query, key, value, AttentionTerms(0.3, window, softcap))

    torch.testing.assert_close(attend(FlashAttentionBackend()), attend(SDPABackend()))
