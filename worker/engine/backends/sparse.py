"""SparseBackend: decode on a CPU as products of sparse matrices, which read K and V where they lie.

Which tokens a row attends to is a row of a sparse matrix over all the places of the cache. The scores are the product
of queries and keys at its entries alone; the output is a sum over entries, weighted, as of an embedding bag. Nothing is
gathered, and rows of any lengths are computed at once. Prompts are SDPA's.

Letters: D decode rows, H query heads, G key/value heads, E head size, N blocks, B block size, R = D * H rows of the
matrix, Z its entries.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.engine.attention import AttentionStep, AttentionTerms
from worker.engine.backends.sdpa import SDPABackend

#: Entries computed at once: some arrays of as many numbers exist meanwhile.
_MAX_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Part:
    """Some decode rows of a step, the same in every layer of a kind."""

    start: int
    end: int
    offsets: Tensor  # (R + 1,) of the matrix's rows
    places: Tensor  # (Z,) rows of the cache seen as (N * B * G, E)
    lens: Tensor  # (R,) int64
    matrix: Tensor  # (R, N * B * G), of zeros


class SparseBackend(SDPABackend):
    name = "sparse"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # Said once by a process: that sparse tensors are new.
            warnings.simplefilter("ignore")
            torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))

    def decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        num_heads, num_kv_heads = query.shape[1], k_cache.shape[2]
        key = ("sparse", num_heads, num_kv_heads, terms.window)
        if key not in step.plans:
            step.plans[key] = _plan(step, query, k_cache, terms.window)
        outputs = [
            self._attend(query[part.start : part.end], k_cache, v_cache, part, terms) for part in step.plans[key]
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, part: _Part, terms: AttentionTerms) -> Tensor:
        head_dim = query.shape[-1]
        keys, values = k_cache.view(-1, head_dim), v_cache.view(-1, head_dim)
        product = torch.sparse.sampled_addmm(
            part.matrix, query.reshape(-1, head_dim), keys.t(), beta=0.0, alpha=terms.scale
        )
        scores = product.values()  # (Z,)
        if terms.softcap is not None:
            scores = terms.softcap * torch.tanh(scores / terms.softcap)
        best = torch.segment_reduce(scores, "max", lengths=part.lens, unsafe=True)  # (R,)
        weights = (scores - best.repeat_interleave(part.lens, output_size=len(scores))).exp_()
        sums = torch.segment_reduce(weights, "sum", lengths=part.lens, unsafe=True)
        output = F.embedding_bag(
            part.places, values, part.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        output /= sums[:, None]
        return output.view(query.shape)


def _plan(step: AttentionStep, query: Tensor, k_cache: Tensor, window: int | None) -> list[_Part]:
    assert step.decode_kv_lens is not None
    ends = step.decode_kv_lens
    starts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    num_heads = query.shape[1]
    parts, first = [], 0
    totals = np.cumsum(ends - starts) * num_heads
    while first < len(ends):
        before = totals[first - 1] if first else 0
        last = max(int(np.searchsorted(totals, before + _MAX_ENTRIES, side="right")), first + 1)
        tables = step.decode_tables[first:last].numpy()
        parts.append(_part(first, tables, starts[first:last], ends[first:last], query, k_cache))
        first = last
    return parts


def _part(
    first: int,
    tables: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    query: Tensor,
    k_cache: Tensor,
) -> _Part:
    num_blocks, block_size, num_kv_heads = k_cache.shape[:3]
    num_heads, num_places = query.shape[1], num_blocks * block_size * num_kv_heads
    dtype = np.int32 if num_places < 2**31 else np.int64
    positions, firsts = _ranges(starts, ends)
    rows = np.repeat(np.arange(len(ends)), ends - starts)
    slots = tables[rows, positions // block_size].astype(dtype) * block_size + (positions % block_size).astype(dtype)
    # The same for each head, which has its own line of every slot.
    lens = np.repeat(ends - starts, num_heads)  # (R,)
    repeated, offsets = _ranges(np.repeat(firsts[:-1], num_heads), np.repeat(firsts[1:], num_heads))
    heads = np.tile(np.arange(num_heads, dtype=dtype) // (num_heads // num_kv_heads), len(ends))
    places = torch.from_numpy((slots * num_kv_heads)[repeated] + np.repeat(heads, lens))
    offsets_of_rows = torch.from_numpy(offsets.astype(dtype))
    return _Part(
        start=first,
        end=first + len(ends),
        offsets=offsets_of_rows,
        places=places,
        lens=torch.from_numpy(lens),
        matrix=torch.sparse_csr_tensor(
            offsets_of_rows, places, torch.zeros(len(places), dtype=query.dtype), (len(lens), num_places)
        ),
    )


def _ranges(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """All integers of each range, one range after the other, and where each begins among them, the end included."""
    offsets = np.concatenate(([0], np.cumsum(ends - starts)))
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts), offsets
