"""SDPABackend: attention with torch alone. It runs everywhere, gathers K and V, and is what the others are compared to.

Letters: T tokens of the step, D decode rows, H query heads, G key/value heads, E head size, N blocks, B block size,
M blocks per table, Q and L one piece's queries and keys.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms
from worker.engine.kv_cache import read_blocks

#: Of K and V gathered at a time on a CPU: less pads less and stays in the cache, more costs fewer calls. Measured with
#: benchmarks/cpu_engine.py's requests: 94 ms a step from 2 to 8 MiB, 110 at 1 MiB, 215 without groups.
_GROUP_BYTES = 1 << 22


class SDPABackend:
    name = "sdpa"
    block_size = 16
    is_capturable = False  # it gathers by lengths that it knows
    shares_prefixes = False

    def attend_pieces(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        parts, start = [], 0
        for i, (num_query, num_kv) in enumerate(zip(step.query_lens.tolist(), step.kv_lens.tolist(), strict=True)):
            keys, values = (
                _gather(cache, step.prefill_tables[i : i + 1], num_kv, query.dtype) for cache in (k_cache, v_cache)
            )
            parts.append(attend_causally(query[start : start + num_query], keys[0], values[0], terms))
            start += num_query
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        lens = step.decode_kv_lens
        assert lens is not None
        # Launches are what costs on a GPU, and memory traffic on a CPU.
        bytes_per_token = 2 * k_cache[0, 0].nbytes if query.device.type == "cpu" else 0
        groups = _groups(lens, bytes_per_token)
        if len(groups) == 1:
            return self._decode_group(query, k_cache, v_cache, step.decode_tables, step.decode_lens, lens.max(), terms)
        output = torch.empty_like(query)
        for group in groups:
            rows = torch.from_numpy(group)
            tables, row_lens = step.decode_tables[rows], step.decode_lens[rows]
            longest = lens[group[-1]]
            output[rows] = self._decode_group(query[rows], k_cache, v_cache, tables, row_lens, longest, terms)
        return output

    def _decode_group(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        tables: Tensor,
        lens: Tensor,
        longest: np.int64,
        terms: AttentionTerms,
    ) -> Tensor:
        """These rows at once, padded to the longest. The H/G queries that share a key head are its query length."""
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads = k_cache.shape[2]
        keys, values = (_gather(cache, tables, int(longest), query.dtype) for cache in (k_cache, v_cache))
        places = torch.arange(int(longest), device=query.device)
        mask = places < lens[:, None]  # (D, L)
        if terms.window is not None:
            mask &= places >= lens[:, None] - terms.window
        output = attend_masked(
            query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask[:, None, None, :],
            terms,
        )
        return output.reshape(num_rows, num_heads, head_dim)


def _groups(lens: npt.NDArray[np.int64], bytes_per_token: int) -> list[npt.NDArray[np.int64]]:
    """Rows of similar length together, in groups whose gathered K and V stay in the CPU's cache until they are used.

    All rows in one rectangle would gather as much for the shortest as for the longest, to memory and back.
    """
    order = np.argsort(lens, kind="stable")
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        is_full = end == len(order) or (end + 1 - start) * lens[order[end]] * bytes_per_token > _GROUP_BYTES
        if is_full:
            groups.append(order[start:end])
            start = end
    return groups


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
    return attend_masked(q, k, v, mask, terms)[0].transpose(0, 1)


def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, terms: AttentionTerms) -> Tensor:
    """All (rows, heads, tokens, E). Without a mask it is causal."""
    if terms.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=terms.scale)
    # torch's own kernels have no softcap.
    assert mask is not None
    scores = query.float() @ key.float().transpose(-1, -2) * terms.scale
    scores = terms.softcap * torch.tanh(scores / terms.softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ value.float()).to(query.dtype)


def _gather(cache: Tensor, tables: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """The first `num_tokens` of each table's blocks: (rows, num_tokens, G, E)."""
    num_rows, num_blocks = len(tables), -(-num_tokens // cache.shape[1])
    blocks = read_blocks(cache, tables[:, :num_blocks].reshape(-1), dtype)  # faster than indexing with a table
    return blocks.view(num_rows, -1, *cache.shape[2:])[:, :num_tokens]
