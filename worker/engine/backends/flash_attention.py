"""FlashAttentionBackend: flash-attn 2 straight from the blocks, never gathering K or V and never asking the device.

Letters: S prefill pieces.
"""

from typing import Any

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms


class FlashAttentionBackend:
    name = "flash-attn-2"
    #: The paged kernels of flash-attn 2 take multiples of this alone.
    block_size = 256
    is_capturable = True
    shares_prefixes = False

    def decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        output: Tensor = flash_attn_with_kvcache(
            query.unsqueeze(1),
            k_cache,
            v_cache,
            cache_seqlens=step.decode_lens,
            block_table=step.decode_tables,
            **_options(terms),
        )
        return output.squeeze(1)

    def attend_pieces(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        if "ends" not in step.plans:
            step.plans["ends"] = _ends(step, query.device)
        query_ends, kv_ends = step.plans["ends"]
        output: Tensor = flash_attn_varlen_func(
            query,
            k_cache,
            v_cache,
            cu_seqlens_q=query_ends,
            cu_seqlens_k=kv_ends,
            max_seqlen_q=int(step.query_lens.max()),
            max_seqlen_k=int(step.kv_lens.max()),
            block_table=step.prefill_tables,
            **_options(terms),
        )
        return output


def _ends(step: AttentionStep, device: torch.device) -> Tensor:
    """(2, S + 1) int32: where each piece's queries end, and its keys, in one copy that nothing waits for."""
    lens = np.stack((step.query_lens, step.kv_lens))
    ends = torch.from_numpy(np.pad(lens.cumsum(axis=1), ((0, 0), (1, 0))).astype(np.int32))
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def _options(terms: AttentionTerms) -> dict[str, Any]:
    return {
        "softmax_scale": terms.scale,
        "causal": True,
        "window_size": (-1, -1) if terms.window is None else (terms.window - 1, 0),
        "softcap": terms.softcap or 0.0,
    }
