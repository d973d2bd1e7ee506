"""The packed layout of a step: all its tokens in one flat row, decode rows first, then prefill pieces.

Letters: S segments, T tokens, D decode rows, P = T - D prefill tokens, K sampled positions, C scored ones,
U duplicated ones.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batching.scheduler import StepPlan

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    num_decode: int
    rows: Int64s  # (S,)
    query_lens: Int64s  # (S,) tokens of this step
    kv_lens: Int64s  # (S,) tokens to attend to, this step's included
    positions: Int64s  # (T,)
    prefill_rows: Int64s  # (P,)
    prefill_token_ids: Int64s  # (P,) decode tokens are on the device
    sampled: Int64s  # (K,) indices into the flat row
    sampled_rows: Int64s  # (K,)
    scored: Int64s  # (C,) indices into the flat row whose logits score the next token of the prompt
    score_targets: Int64s  # (C,) that token
    duplicated: Int64s  # (U,) indices into the flat row of tokens whose K and V are written twice
    duplicate_blocks: Int64s  # (U,) where to, at the same place in the block


def pack(plan: StepPlan) -> PackedLayout:
    num_decode = plan.num_decode
    rows = np.array([seq.row for seq in plan.sequences], dtype=np.int64)
    starts = np.array(plan.starts, dtype=np.int64)
    query_lens = np.array(plan.num_tokens, dtype=np.int64)
    kv_lens = starts + query_lens
    ends = np.cumsum(query_lens)  # (S,)
    first = ends - query_lens
    positions = np.arange(ends[-1], dtype=np.int64) + np.repeat(starts - first, query_lens)
    sampled = np.array(plan.sampled, dtype=np.int64)
    scored, targets = _scored(plan, first)
    duplicated, duplicate_blocks = _duplicated(plan, first)
    pieces = [
        seq.tokens(start, start + num)
        for seq, start, num in zip(
            plan.sequences[num_decode:], plan.starts[num_decode:], plan.num_tokens[num_decode:], strict=True
        )
    ]
    return PackedLayout(
        num_decode=num_decode,
        rows=rows,
        query_lens=query_lens,
        kv_lens=kv_lens,
        positions=positions,
        prefill_rows=np.repeat(rows[num_decode:], query_lens[num_decode:]),
        prefill_token_ids=np.concatenate(pieces, dtype=np.int64) if pieces else np.empty(0, dtype=np.int64),
        sampled=ends[sampled] - 1,
        sampled_rows=rows[sampled],
        scored=scored,
        score_targets=targets,
        duplicated=duplicated,
        duplicate_blocks=duplicate_blocks,
    )


def _scored(plan: StepPlan, first: Int64s) -> tuple[Int64s, Int64s]:
    if not plan.scored:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    places = [np.arange(a - 1, b - 1) - plan.starts[segment] + first[segment] for segment, a, b in plan.scored]
    targets = [plan.sequences[segment].tokens(a, b) for segment, a, b in plan.scored]
    return np.concatenate(places, dtype=np.int64), np.concatenate(targets, dtype=np.int64)


def _duplicated(plan: StepPlan, first: Int64s) -> tuple[Int64s, Int64s]:
    if not plan.duplicates:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    places = [np.arange(a, b) - plan.starts[segment] + first[segment] for segment, a, b, _ in plan.duplicates]
    blocks = [np.full(b - a, block) for _, a, b, block in plan.duplicates]
    return np.concatenate(places, dtype=np.int64), np.concatenate(blocks, dtype=np.int64)
