"""Attention in float32 by kernels that are made for 16 bits, compiled for a GPU that need not be here."""

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from worker.engine.attention import AttentionStep, AttentionTerms

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_attention_in_float32_fits_into_a_multiprocessor(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.ahead_of_time import SHARED_BYTES, compiled
    from worker.engine.backends.triton import TritonBackend
    from worker.engine.kernels import paged_decode
    from worker.engine.kernels.prefix_groups import PrefixGroups

    monkeypatch.setattr(paged_decode, "num_multiprocessors", lambda device: 132)
    k_cache, v_cache = torch.zeros(2, 2, 64, 4, head_dim)
    tables, lens, tokens = torch.zeros(32, 16, dtype=torch.int32), torch.ones(32, dtype=torch.int32), np.array([32])
    prefixes = PrefixGroups(torch.zeros(16, 32, dtype=torch.int32), lens[:16], lens)
    nothing: Any = None
    step = AttentionStep(nothing, TritonBackend(), 32, lens, tables, lens, tables[:1], None, tokens, tokens, prefixes)
    query, terms = torch.zeros(32, 8, head_dim), AttentionTerms(0.1)
    with compiled() as found:
        step.backend.decode(query, k_cache, v_cache, step, terms)
        step.backend.attend_pieces(query, k_cache, v_cache, step, terms)

    assert Counter(x.kernel for x in found) == {"_list_tiles": 2, "_attend_tiles": 2, "_attend_pieces": 1}
    assert max(x.shared_bytes for x in found) <= SHARED_BYTES
