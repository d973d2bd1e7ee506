"""SDPABackend: attention with torch alone. It runs everywhere, gathers K and V, and is what the others are compared to.

Letters: T tokens of the step, D decode rows, H query heads, G key/value heads, E head size, N blocks, B block size,
M blocks per table, Q and L one piece's queries and keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms


class SDPABackend:
    name = "sdpa"
    block_size = 16

    def attend(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        num_decode = step.num_decode
        parts = []
        if num_decode:
            parts.append(self._decode(query[:num_decode], k_cache, v_cache, step, terms))
        start = num_decode
        for i, (num_query, num_kv) in enumerate(zip(step.query_lens.tolist(), step.kv_lens.tolist(), strict=True)):
            keys, values = (_gather(cache, step.prefill_tables[i : i + 1], num_kv) for cache in (k_cache, v_cache))
            parts.append(attend_causally(query[start : start + num_query], keys[0], values[0], terms))
            start += num_query
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        """All rows at once, padded to the longest. The H/G queries that share a key head are its query length."""
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads = k_cache.shape[2]
        keys, values = (_gather(cache, step.decode_tables, step.max_decode_len) for cache in (k_cache, v_cache))
        places = torch.arange(step.max_decode_len, device=query.device)
        lens = step.decode_lens[:, None]
        mask = places < lens  # (D, L)
        if terms.window is not None:
            mask &= places >= lens - terms.window
        output = _attend(
            query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask[:, None, None, :],
            terms,
        )
        return output.reshape(num_rows, num_heads, head_dim)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
    """query (Q, H, E) are the last Q of the L positions of key and value (L, G, E)."""
    num_query, num_kv = query.shape[0], key.shape[0]
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:
        key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    mask = None
    if num_query < num_kv or terms.window is not None or terms.softcap is not None:
        places = torch.arange(num_kv, device=query.device)
        queries = places[num_kv - num_query :, None]
        mask = places <= queries
        if terms.window is not None:
            mask &= places > queries - terms.window
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return _attend(q, k, v, mask, terms)[0].transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, terms: AttentionTerms) -> Tensor:
    """Without a mask it is causal."""
    if terms.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=terms.scale)
    # torch's own kernels have no softcap.
    assert mask is not None
    scores = query.float() @ key.float().transpose(-1, -2) * terms.scale
    scores = terms.softcap * torch.tanh(scores / terms.softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ value.float()).to(query.dtype)


def _gather(cache: Tensor, tables: Tensor, num_tokens: int) -> Tensor:
    """The first `num_tokens` of each table's blocks: (rows, num_tokens, G, E)."""
    num_rows, num_blocks = len(tables), -(-num_tokens // cache.shape[1])
    blocks = cache.index_select(0, tables[:, :num_blocks].reshape(-1))  # faster than indexing with a table
    return blocks.view(num_rows, -1, *cache.shape[2:])[:, :num_tokens]
