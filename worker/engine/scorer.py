"""Scorer: log-probabilities of given tokens from a step's hidden states, some rows of logits at a time.

Logits come from the model's own code, scales and softcaps included: its backbone is run once, then handed back piece
by piece while the model's forward is run for what follows it.

Letters: C scored positions, V vocabulary, E hidden size, N alternatives per position.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.kernels.obstacle import triton_obstacle
from worker.engine.kernels.plain import plain_score_tokens

#: Logits that exist at once, in bytes. On a GPU enough rows to keep its matrix units busy, with room for a head that
#: makes a copy of them (a softcap) within 1 GiB; on a CPU smaller pieces stay closer to its caches and lose nothing.
PIECE_BYTES = 3 << 27
CPU_PIECE_BYTES = 1 << 24
#: Rows of a piece are a multiple of this where they are more: what a GPU's matrix multiplication does at a time.
_ROW_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class Scores:
    """Of C tokens: their log-probabilities, their ranks (1: the most likely), and the N best tokens."""

    logprobs: Tensor  # (C,) float32
    ranks: Tensor  # (C,) int32
    top_ids: Tensor  # (C, N) int32
    top_logprobs: Tensor  # (C, N) float32

    def to_host(self) -> "Scores":
        """Copies on their way to pinned memory, complete when the stream has come this far."""
        return Scores(*(_to_pinned(x) for x in (self.logprobs, self.ranks, self.top_ids, self.top_logprobs)))


class Scorer:
    def __init__(self, model: Any) -> None:
        self._model = model
        # Most heads call the base model, some (OPT) its decoder; the outermost that is called is the backbone.
        decoder = getattr(model.base_model, "decoder", None)
        self._candidates: list[nn.Module] = [m for m in (decoder, model.base_model) if isinstance(m, nn.Module)]
        self._backbone: nn.Module = model.base_model
        self._output: Any = None

    @contextmanager
    def watch(self, is_wanted: bool) -> Iterator[None]:
        """Keep the backbone's output of the forward within; costs nothing when it is not wanted."""
        if not is_wanted:
            yield
            return
        hooks = [module.register_forward_hook(self._keep) for module in self._candidates]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def forget(self) -> None:
        """What was watched is not going to be scored: its memory is free."""
        self._output = None

    def score(self, places: Tensor, targets: Tensor, num_top: int) -> Scores:
        """`places` (C,) are indices into the watched forward's tokens, all rows after each other."""
        output, self._output = self._output, None
        hidden = output[0].flatten(0, 1)  # (tokens, E)
        vocab_size = self._model.get_output_embeddings().weight.shape[0]
        size = _piece_size(hidden, vocab_size)
        parts = [
            _score(self._logits(output, hidden.index_select(0, place)), target, num_top)
            for place, target in zip(torch.split(places, size), torch.split(targets, size), strict=True)
        ]
        return Scores(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._backbone, self._output = module, output

    def _logits(self, output: Any, hidden: Tensor) -> Tensor:
        """hidden (c, E) -> logits (c, V)."""
        recalled = _with_hidden(output, hidden.unsqueeze(0))
        dummy = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        self._backbone.forward = lambda *arguments, **keywords: recalled
        try:
            logits: Tensor = self._model(input_ids=dummy, use_cache=False).logits
        finally:
            del self._backbone.forward  # the class's own is found again
        return logits[0]


def score_rows(logits: Tensor, targets: Tensor, num_top: int) -> Scores:
    """logits (C, V), targets (C,) int64; in pieces of the same size, so that little more is held than the logits."""
    size = _piece_size(logits, logits.shape[-1])
    pairs = zip(torch.split(logits, size), torch.split(targets, size), strict=True)
    parts = [_score(part, target, num_top) for part, target in pairs]
    return Scores(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _piece_size(like: Tensor, vocab_size: int) -> int:
    """In rows, for logits that are where `like` is and of its dtype."""
    if like.device.type == "cpu":
        return max(CPU_PIECE_BYTES // (4 * vocab_size), 1)
    # Without the kernel there are a copy in float32 and what is made from it.
    bytes_each = like.dtype.itemsize if _has_kernel(like.device) else 12
    size = max(PIECE_BYTES // (bytes_each * vocab_size), 1)
    return size - size % _ROW_MULTIPLE if size > _ROW_MULTIPLE else size


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return triton_obstacle(device) is None


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The backbone's output with other hidden states and nothing that belongs to whole Sequences."""
    return type(output)(last_hidden_state=hidden)


def _score(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _has_kernel(logits.device):
        from worker.engine.kernels.token_scores import score_tokens

        return score_tokens(logits, targets, num_top)
    return plain_score_tokens(logits.float(), targets, num_top)


def _to_pinned(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
