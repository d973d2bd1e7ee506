"""PoolingRunner: steps of whole texts through a PooledModel, packed or as a rectangle, to one vector each.

Letters: N texts, T tokens, R rows, W columns, E hidden size, D values of a vector.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from batching.whole import WholePlan
from worker.engine.pooled_model import PooledModel
from worker.engine.pooling import pool_flat, pool_rows
from worker.engine.runner import send
from worker.engine.text_attention import TextAttention, Texts, TextStep


@dataclass(frozen=True, slots=True)
class VectorsHandle:
    """A launched step's vectors, on their way to the host."""

    vectors: Tensor  # (N, D) float32, pinned when `done` is there
    done: torch.cuda.Event | None

    def wait(self) -> npt.NDArray[np.float32]:
        if self.done is not None:
            self.done.synchronize()
        vectors: npt.NDArray[np.float32] = self.vectors.numpy()
        return vectors


class PoolingRunner:
    def __init__(self, pooled: PooledModel, attention: TextAttention) -> None:
        self._pooled = pooled
        self._attention = attention

    @torch.inference_mode()
    def launch(self, plan: WholePlan) -> VectorsHandle:
        """Start a step. On CUDA nothing in here waits for the device."""
        texts = [seq.prompt_ids for seq in plan.sequences]
        lens = np.array([len(text) for text in texts], dtype=np.int64)
        pooled = self._pooled
        vectors = self._run_flat(texts, lens) if pooled.layout == "packed" else self._run_rows(texts, lens)
        if pooled.head is not None:
            vectors = pooled.head.probabilities(vectors)
        elif pooled.is_normalized:
            vectors = F.normalize(vectors, dim=-1)
        if pooled.device.type != "cuda":
            return VectorsHandle(vectors, None)
        host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        return VectorsHandle(host, torch.cuda.current_stream(pooled.device).record_event())

    def _run_flat(self, texts: list[npt.NDArray[np.int32]], lens: npt.NDArray[np.int64]) -> Tensor:
        """(N, E) float32"""
        cu_lens = np.concatenate(([0], np.cumsum(lens)))
        sent = send(
            {
                "token_ids": np.concatenate(texts, dtype=np.int64),
                "positions": np.arange(cu_lens[-1]) - np.repeat(cu_lens[:-1], lens),
                "cu_lens": cu_lens,
            },
            self._pooled.device,
        )
        step = TextStep(self._attention, Texts(lens, sent["cu_lens"].int()))
        hidden = self._pooled.backbone.run_flat(sent["token_ids"], sent["positions"], step)  # (T, E)
        return pool_flat(hidden, self._pooled.pooling, sent["cu_lens"])

    def _run_rows(self, texts: list[npt.NDArray[np.int32]], lens: npt.NDArray[np.int64]) -> Tensor:
        """(R, E) float32"""
        token_ids = np.zeros((len(texts), lens.max()), dtype=np.int64)
        for row, text in zip(token_ids, texts, strict=True):
            row[: len(text)] = text
        sent = send({"token_ids": token_ids.reshape(-1), "lens": lens}, self._pooled.device)
        rows = sent["token_ids"].view(token_ids.shape)  # (R, W)
        hidden = self._pooled.backbone.run_rows(rows, sent["lens"])  # (R, W, E)
        return pool_rows(hidden, self._pooled.pooling, sent["lens"])
