"""FlashAttentionBackend: flash-attn 2 straight from the blocks, never gathering K or V and never asking the device."""

from typing import Any

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

    def attend(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        num_decode = step.num_decode
        parts: list[Tensor] = []
        if num_decode:
            decoded = flash_attn_with_kvcache(
                query[:num_decode].unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=step.decode_lens,
                block_table=step.decode_tables,
                **_options(terms),
            )
            parts.append(decoded.squeeze(1))
        if len(step.query_lens):
            parts.append(self._attend_pieces(query[num_decode:], k_cache, v_cache, step, terms))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_pieces(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        """query (P, H, E) of the prefill pieces alone."""
        output: Tensor = flash_attn_varlen_func(
            query,
            k_cache,
            v_cache,
            cu_seqlens_q=step.cu_query_lens,
            cu_seqlens_k=step.cu_kv_lens,
            max_seqlen_q=int(step.query_lens.max()),
            max_seqlen_k=int(step.kv_lens.max()),
            block_table=step.prefill_tables,
            **_options(terms),
        )
        return output


def _options(terms: AttentionTerms) -> dict[str, Any]:
    return {
        "softmax_scale": terms.scale,
        "causal": True,
        "window_size": (-1, -1) if terms.window is None else (terms.window - 1, 0),
        "softcap": terms.softcap or 0.0,
    }
