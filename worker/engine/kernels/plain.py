"""The twins: what each kernel computes, in plain torch and in the inputs' own precision. Tests hold kernels to them.

Letters: D rows, H query heads, G key/value heads, E head size, N blocks, B block size, M blocks per table, T tokens,
C scored positions, V vocabulary, K best tokens of each, O outputs of a gated layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: Outputs of a gate, before as many of what it is multiplied with, and so on.
GATE_BLOCK = 128


def plain_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """query (D, H, E), caches (N, B, G, E) -> outputs (D, H, E), log-sum-exps (D, H). One row after the other."""
    outputs, log_sums = [], []
    num_shared = query.shape[1] // k_cache.shape[2]
    for row, length in enumerate(lens.tolist()):
        first = 0 if window is None else max(length - window, 0)
        blocks = tables[row, : -(-length // k_cache.shape[1])].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[first:length].repeat_interleave(num_shared, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("he,the->ht", query[row], keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outputs.append(torch.einsum("ht,the->he", scores.softmax(dim=-1), values))
        log_sums.append(scores.logsumexp(dim=-1))
    return torch.stack(outputs), torch.stack(log_sums)


def plain_prefill(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query (P, H, E), the last tokens of each piece, after each other -> (P, H, E). One token after the other."""
    outputs, first = [], 0
    for table, num_query, num_kv in zip(tables, query_lens, kv_lens, strict=True):
        for i in range(num_query):
            length = torch.tensor([num_kv - num_query + i + 1])
            row = query[first + i : first + i + 1]
            outputs.append(
                plain_decode(row, k_cache, v_cache, table[None], length, scale=scale, window=window, softcap=softcap)[0]
            )
        first += num_query
    return torch.cat(outputs)


def plain_write_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `write_kv`."""
    kept = slots >= 0
    block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    k_cache[block, offset], v_cache[block, offset] = key[kept], value[kept]


def plain_score_tokens(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `score_tokens`, in the logits' own precision."""
    chosen = logits.gather(1, targets[:, None])  # (C, 1)
    log_sums = logits.logsumexp(dim=-1, keepdim=True)
    # Equal logits rank by token id, as argmax takes the first of them.
    is_before = torch.arange(logits.shape[-1], device=logits.device) < targets[:, None]
    ranks = ((logits > chosen) | ((logits == chosen) & is_before)).sum(dim=-1, dtype=torch.int32) + 1
    top_ids, top_logits = _best_tokens(logits, min(num_top, logits.shape[-1]))
    return (chosen - log_sums).squeeze(1), ranks, top_ids, top_logits - log_sums


def _best_tokens(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Ids (C, K) int32 and logits (C, K) in the order of ranks, which is not that of `topk` where logits are equal."""
    vocab_size = logits.shape[-1]
    best = logits.topk(num_top, dim=-1)
    if num_top == 0:
        return best.indices.int(), best.values
    least = best.values[:, -1:]
    # Those above the least are certain, and of those equal to it the first ids; V stands for no token.
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=logits.device)
    equal = torch.where(logits == least, tokens, vocab_size).topk(num_top, dim=-1, largest=False, sorted=False).values
    above = best.indices.int().masked_fill(best.values == least, vocab_size)
    ids = torch.cat([above, equal], dim=-1).sort(dim=-1).values  # (C, 2K)
    values = logits.gather(1, ids.clamp(max=vocab_size - 1).long()).masked_fill(ids == vocab_size, -torch.inf)
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return ids.gather(1, order), values.gather(1, order)


def plain_gate(both: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """both (T, 2 O), alternating by GATE_BLOCK between gate and other half -> activation(gate) * other, (T, O)."""
    gate, other = both.view(len(both), -1, 2, GATE_BLOCK).unbind(2)
    return (activation(gate) * other).flatten(1)
