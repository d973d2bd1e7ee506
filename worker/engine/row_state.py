"""RowState: what the device keeps of every running Sequence, and the host's notes on which sampling code they need.

One row more than may run: it belongs to nobody, and decode steps of fewer rows than their tensors hold are filled up
with it. Letters: R rows, M blocks per table.
"""

from collections.abc import Sequence as Sequences

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batching.scheduler import StepPlan
from batching.sequence import Sequence
from worker.engine.kernels.obstacle import triton_obstacle

Array = npt.NDArray[np.int64] | npt.NDArray[np.float32]


class RowState:
    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.nobody = num_rows
        self.has_kernels = triton_obstacle(device) is None
        self.max_blocks = max_blocks
        num = num_rows + 1
        self.last_token = torch.zeros(num, dtype=torch.int64, device=device)  # (R + 1,)
        self.length = torch.zeros(num, dtype=torch.int64, device=device)  # (R + 1,) tokens written
        self.block_table = torch.zeros(num, max_blocks, dtype=torch.int32, device=device)  # (R + 1, M)
        # Sampling parameters (R + 1,) each; position and last token complete what a draw depends on.
        self.temperature = torch.zeros(num, dtype=torch.float32, device=device)
        self.top_p = torch.ones(num, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(num, dtype=torch.int64, device=device)
        self.min_p = torch.zeros(num, dtype=torch.float32, device=device)
        self.seed = torch.zeros(num, dtype=torch.int64, device=device)
        self.sample = torch.zeros(num, dtype=torch.int64, device=device)
        # The host's own copy of what decides which sampling code runs.
        self.draws = np.zeros(num, dtype=bool)
        self.is_limited = np.zeros(num, dtype=bool)
        self.has_min_p = np.zeros(num, dtype=bool)
        self.num_logprobs = np.full(num, -1, dtype=np.int64)  # -1: not asked for

    def arrays(self, plan: StepPlan) -> dict[str, Array]:
        """What has changed on the host since the last step; the host's notes are brought up to it."""
        arrays: dict[str, Array] = {}
        if plan.new_blocks:
            blocks = np.array(plan.new_blocks, dtype=np.int64)  # (blocks, 3)
            arrays["block_places"] = blocks[:, 0] * self.max_blocks + blocks[:, 1]
            arrays["blocks"] = blocks[:, 2].copy()
        if plan.admitted:
            self._note(plan.admitted)
            arrays |= _parameters(plan.admitted)
        return arrays

    def update(self, sent: dict[str, Tensor]) -> None:
        if "blocks" in sent:
            self.block_table.view(-1).index_copy_(0, sent["block_places"], sent["blocks"].int())
        if "new_rows" in sent:
            rows = sent["new_rows"]
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "sample"):
                getattr(self, name).index_copy_(0, rows, sent[name])

    def draw(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens (K,) of `rows` (K,) from logits (K, V) of the tokens at `positions` (K,), with kernels that ask the
        host nothing."""
        from worker.engine.kernels.sampling import sample_rows

        limits = (self.temperature, self.top_p, self.top_k, self.min_p)
        return sample_rows(logits, rows, *limits, self.seed, self.sample, positions + 1)

    def _note(self, admitted: Sequences[Sequence]) -> None:
        for seq in admitted:
            draws = seq.temperature > 0
            self.draws[seq.row] = draws
            self.is_limited[seq.row] = draws and (seq.top_k > 0 or seq.top_p < 1)
            self.has_min_p[seq.row] = draws and seq.min_p > 0
            self.num_logprobs[seq.row] = -1 if seq.logprobs is None else seq.logprobs


def _parameters(admitted: Sequences[Sequence]) -> dict[str, Array]:
    return {
        "new_rows": np.array([seq.row for seq in admitted], dtype=np.int64),
        "temperature": np.array([seq.temperature for seq in admitted], dtype=np.float32),
        "top_p": np.array([seq.top_p for seq in admitted], dtype=np.float32),
        "top_k": np.array([seq.top_k for seq in admitted], dtype=np.int64),
        "min_p": np.array([seq.min_p for seq in admitted], dtype=np.float32),
        "seed": np.array([_as_int64(seq.seed) for seq in admitted], dtype=np.int64),
        "sample": np.array([seq.sample for seq in admitted], dtype=np.int64),
    }


def _as_int64(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
