"""TritonBackend: our own kernels, which share the reading of common prefixes among the rows of a decode step.

Letters: P tokens of prefill pieces, H query heads, E head size.
"""

from typing import Any

import torch
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms
from worker.engine.kernels import paged_decode
from worker.engine.kernels.decode_plan import DecodePlan, plan_decode
from worker.engine.kernels.decode_variant import choose_variant
from worker.engine.kernels.paged_prefill import plan_prefill, prefill
from worker.engine.kernels.prefix_groups import PrefixGroups

#: Queries of one key/value head that attend to a shared prefix in one tile: what a tensor core's largest tile takes.
_PREFIX_QUERIES = 64


class TritonBackend:
    name = "triton"
    #: Small ones share more, and a tile of the kernels lies in one.
    block_size = 64
    is_capturable = True
    shares_prefixes = True

    def decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        head_dim, block_size, num_kv_heads = query.shape[2], *k_cache.shape[1:3]
        num_shared = query.shape[1] // num_kv_heads
        options: dict[str, Any] = {"scale": terms.scale, "softcap": terms.softcap}
        prefix = starts = None
        key: tuple[Any, ...]
        # Most of a prefix is outside of a window.
        if step.prefixes is not None and terms.window is None:
            starts = step.prefixes.starts
            num_members = max(_PREFIX_QUERIES // num_shared, 1)
            key = "prefix", num_kv_heads, num_members, head_dim
            if key not in step.plans:
                groups = _split(step.prefixes, num_members)
                variant = choose_variant(num_members * num_shared, head_dim, query.itemsize)
                plan = plan_decode(
                    step.decode_tables, groups.lens, block_size, num_kv_heads, variant, table_rows=groups.members
                )
                step.plans[key] = groups, plan
            groups, plan = step.plans[key]
            prefix = paged_decode.decode(query, k_cache, v_cache, plan, groups=groups, **options)
        key = "decode", num_kv_heads, num_shared, head_dim, terms.window
        if key not in step.plans:
            variant = choose_variant(num_shared, head_dim, query.itemsize)
            tables, lens = step.decode_tables, step.decode_lens
            step.plans[key] = plan_decode(
                tables, lens, block_size, num_kv_heads, variant, starts=starts, window=terms.window
            )
        own_plan: DecodePlan = step.plans[key]
        return paged_decode.decode(query, k_cache, v_cache, own_plan, prefix=prefix, **options)[0]

    def attend_pieces(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        num_shared, head_dim = query.shape[1] // k_cache.shape[2], query.shape[2]
        key = "prefill", num_shared, head_dim
        if key not in step.plans:
            step.plans[key] = plan_prefill(
                step.query_lens, step.kv_lens, num_shared, head_dim, query.device, num_bytes=query.itemsize
            )
        options: dict[str, Any] = {"scale": terms.scale, "window": terms.window, "softcap": terms.softcap}
        return prefill(query, k_cache, v_cache, step.prefill_tables, step.plans[key], **options)


def _split(groups: PrefixGroups, num_members: int) -> PrefixGroups:
    """The same with at most `num_members` rows in a tile."""
    num_tiles = -(-groups.members.shape[1] // num_members)
    if num_tiles == 1:
        return groups
    members = torch.nn.functional.pad(
        groups.members, (0, num_tiles * num_members - groups.members.shape[1]), value=-1
    ).view(-1, num_members)
    lens = groups.lens.repeat_interleave(num_tiles)
    # Members stand at the beginning of their tile, so one whose first is missing has none.
    return PrefixGroups(members, torch.where(members[:, 0] >= 0, lens, 0), groups.starts)
