"""The sampler: greedy tokens, and draws that depend on seed, sample, position and token id and on nothing else.

A draw is an exponential race: with E an exponential variate per token, argmax(log p - log E) is distributed as p. The
variates come from an integer hash, so a batch's make-up, chunking, preemption and the device cannot change a draw.

Letters: K sampled rows, D rows that draw, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Below it a temperature would only overflow; the most likely token wins there anyway.
MIN_TEMPERATURE = 1e-5

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows that draw. `limited` are those of them with top_k or top_p; None when there are none."""

    rows: Tensor  # (D,) int64, indices into the sampled rows
    limited: Tensor | None  # indices into `rows`
    temperature: Tensor  # (D,) float32
    top_p: Tensor  # (D,) float32
    top_k: Tensor  # (D,) int64, 0: no limit
    seed: Tensor  # (D,) int64
    sample: Tensor  # (D,) int64
    position: Tensor  # (D,) int64, of the token being drawn
    min_p: Tensor | None = None  # (D,) float32; None when there is none


def sample(logits: Tensor, draws: Draws | None) -> Tensor:
    """logits (K, V) -> token ids (K,) int64."""
    tokens = logits.argmax(dim=-1)
    if draws is None:
        return tokens
    scores = logits.index_select(0, draws.rows).float()  # (D, V)
    # Shifted so that the best is 0: dividing by a tiny temperature then gives -inf, never NaN.
    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= draws.temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    if draws.min_p is not None:
        # The best has score 0, so a probability of min_p times the best's is a score of log(min_p).
        scores.masked_fill_(scores < draws.min_p.log()[:, None], -torch.inf)
    if draws.limited is not None:
        top_k, top_p = (x.index_select(0, draws.limited) for x in (draws.top_k, draws.top_p))
        scores.index_copy_(0, draws.limited, limit(scores.index_select(0, draws.limited), top_k, top_p))
    scores -= exponential(draws, logits.shape[-1]).log_()
    return tokens.index_copy_(0, draws.rows, scores.argmax(dim=-1))


def limit(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf for what is not among the top_k best (0: all), nor, of those, among the fewest that make up top_p."""
    vocab_size = scores.shape[-1]
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab_size, device=scores.device)
    limits = torch.where(top_k > 0, top_k, vocab_size)[:, None]
    ordered = ordered.masked_fill(ranks >= limits, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # Rounding makes the sum end beside 1, and "all of it" must not lose its tail to that.
    dropped = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    dropped[:, 0] = False
    return torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(dropped, -torch.inf))


def exponential(draws: Draws, vocab_size: int) -> Tensor:
    """Exponential variates (D, V), float32, one per row and token id."""
    key = _mix64(draws.seed + _mix64(draws.sample * -7046029254386353131 + _mix64(draws.position)))
    low, high = (_as_int32(key), _as_int32(key >> 32))
    tokens = torch.arange(vocab_size, device=key.device, dtype=torch.int32)
    bits = _mix32(tokens * -1640531527 + low[:, None])
    bits = _mix32(bits ^ high[:, None])
    uniform = bits.float()
    # Read as unsigned. Small values, where the winners are, keep all their bits.
    uniform += (bits < 0) * 4294967296.0
    uniform = ((uniform + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(uniform.neg_()).neg_()


def _mix64(x: Tensor) -> Tensor:
    """Every bit of the int64 input stirred into every bit of the output (wrapping arithmetic, unsigned shifts)."""
    x = (x ^ _shift(x, 30, 64)) * -4658895280553007687
    x = (x ^ _shift(x, 27, 64)) * -7723592293110705685
    return x ^ _shift(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16, 32)) * -2048144789
    x = (x ^ _shift(x, 13, 32)) * -1028477387
    return x ^ _shift(x, 16, 32)


def _shift(x: Tensor, num: int, width: int) -> Tensor:
    """A right shift that fills with zeros; torch's keeps the sign."""
    return (x >> num) & ((1 << (width - num)) - 1)


def _as_int32(x: Tensor) -> Tensor:
    """The low 32 bits, as a signed number."""
    low = x & _MASK
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
