"""PaddedRunner: steps of rectangles, with a mask, through a model that keeps its cache and its attention to itself.

The plan's tokens arrive as one flat row, as everywhere; here they are put into the rectangle's columns, and logits are
taken out again where they are asked for. Tokens all come from the host, so a step starts when the last one's are known.

Letters: R rows, C columns of the step, T tokens, K sampled tokens, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from batching.layout import PackedLayout
from batching.padded import PaddedPlan
from batching.scheduler import StepPlan
from worker.engine.loader import LoadedModel
from worker.engine.padded_forward import PaddedForward
from worker.engine.row_state import Array
from worker.engine.runner import Forward, Runner


class PaddedRunner(Runner):
    def __init__(self, loaded: LoadedModel, *, max_num_seqs: int) -> None:
        self._start(loaded, max_num_seqs, 0)
        self._padded = PaddedForward(loaded.model)

    def forget(self) -> None:
        self._scorer.forget()
        self._padded.caches.clear()

    def _arrays(self, plan: StepPlan, layout: PackedLayout) -> dict[str, Array]:
        assert isinstance(plan, PaddedPlan)
        arrays = super()._arrays(plan, layout)
        pads = np.array(plan.pads, dtype=np.int64)
        rows = np.repeat(np.array(plan.rows, dtype=np.int64), layout.query_lens)  # (T,) of the rectangle
        arrays["pads"] = pads  # (R,)
        arrays["places"] = rows * plan.num_columns + layout.positions + pads[rows] - plan.first_column  # (T,)
        arrays["sampled_rectangle_rows"] = rows[layout.sampled]  # (K,)
        for number, kept in plan.kept.items():
            arrays[f"kept_{number}"] = np.array(kept, dtype=np.int64)
        return arrays

    def _forward(self, plan: StepPlan, layout: PackedLayout, sent: dict[str, Tensor]) -> Forward:
        assert isinstance(plan, PaddedPlan)
        padded = self._padded
        for number in padded.caches.keys() - plan.caches:
            del padded.caches[number]  # its memory is free before others take theirs
        for number in plan.kept:
            padded.keep(number, sent[f"kept_{number}"])
        for join in plan.joins:
            padded.join(join.number, join.other, join.num_pads, join.num_other_pads)
        if plan.is_new:
            padded.start(plan.number)
        shape = (len(plan.rectangle), plan.num_columns)
        token_ids = torch.zeros(shape, dtype=torch.int64, device=self.device)  # (R, C)
        token_ids.view(-1).index_copy_(0, sent["places"], sent["prefill_token_ids"])
        logits = padded.run(plan.number, token_ids, sent["pads"], plan.first_column)[:, -1]  # (R, V)
        logits = logits.index_select(0, sent["sampled_rectangle_rows"])
        return Forward(logits, sent["prefill_positions"], sent["places"])
