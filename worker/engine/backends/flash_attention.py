"""FlashAttentionBackend: flash-attn 2 straight from the blocks, never gathering K or V and never asking the device."""

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms


class FlashAttentionBackend:
    name = "flash-attn-2"
    #: The paged kernels of flash-attn 2 take multiples of this alone.
    block_size = 256

    def attend(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        num_decode = step.num_decode
        window = (-1, -1) if terms.window is None else (terms.window - 1, 0)
        options = {
            "softmax_scale": terms.scale,
            "causal": True,
            "window_size": window,
            "softcap": terms.softcap or 0.0,
        }
        parts: list[Tensor] = []
        if num_decode:
            decoded = flash_attn_with_kvcache(
                query[:num_decode].unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=step.decode_lens,
                block_table=step.decode_tables,
                **options,
            )
            parts.append(decoded.squeeze(1))
        if len(step.query_lens):
            parts.append(
                flash_attn_varlen_func(
                    query[num_decode:],
                    k_cache,
                    v_cache,
                    cu_seqlens_q=step.cu_query_lens,
                    cu_seqlens_k=step.cu_kv_lens,
                    max_seqlen_q=int(step.query_lens.max()),
                    max_seqlen_k=int(step.kv_lens.max()),
                    block_table=step.prefill_tables,
                    **options,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
