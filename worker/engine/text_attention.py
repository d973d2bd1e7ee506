"""Attention among the tokens of one step, each text by itself, with no KV cache: for whatever is whole in its step.

Registered in transformers' AttentionInterface under a name of its own, since layers of encoders need not know their
number. Letters: T tokens of the step, S texts, H query heads, G key/value heads, E head size.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocol.errors import ConfigurationError
from worker.engine.attention import AttentionTerms, choose_backend, flash_attention_obstacle, register_as
from worker.engine.backends.sdpa import attend_causally, attend_masked

#: The implementation's name.
NAME = "millrace_texts"
#: The keyword that carries the texts through the model's forward.
STEP = "millrace_texts_step"


@dataclass(frozen=True, slots=True)
class Texts:
    """Where the texts of a flat row end."""

    lens: npt.NDArray[np.int64]  # (S,) on the host
    cu_lens: Tensor  # (S + 1,) int32


class TextAttention(Protocol):
    name: str

    def attend(self, query: Tensor, key: Tensor, value: Tensor, texts: Texts, terms: AttentionTerms) -> Tensor:
        """query (T, H, E), key and value (T, G, E), result (T, H, E)."""


@dataclass(frozen=True, slots=True)
class TextStep:
    """What the model's forward carries."""

    attention: TextAttention
    texts: Texts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        return self.attention.attend(query, key, value, self.texts, terms)


class PlainTextAttention:
    """With torch alone, one text after the other."""

    name = "sdpa"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, texts: Texts, terms: AttentionTerms) -> Tensor:
        lens = texts.lens.tolist()
        parts = (torch.split(x, lens) for x in (query, key, value))
        outputs = [attend_text(q, k, v, terms) for q, k, v in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class FlashTextAttention:
    """flash-attn 2, all texts at once."""

    name = "flash-attn-2"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, texts: Texts, terms: AttentionTerms) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        longest, window = int(texts.lens.max()), -1 if terms.window is None else terms.window - 1
        output: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=texts.cu_lens,
            cu_seqlens_k=texts.cu_lens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=terms.scale,
            causal=terms.is_causal,
            window_size=(window, 0 if terms.is_causal and window >= 0 else window),
            softcap=terms.softcap or 0.0,
        )
        return output


def choose_text_attention(name: str, device: torch.device, dtype: torch.dtype) -> TextAttention:
    """The one called `name` in the settings, or the fastest that runs here for "auto". Raises as `choose_backend`."""
    choose_backend(name, device, dtype)
    # Triton decodes, and leaves whole texts to others.
    is_flash = name != "sdpa" and flash_attention_obstacle(device, dtype) is None
    return FlashTextAttention() if is_flash else PlainTextAttention()


def attend_text(query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
    """One text: query (L, H, E), key and value (L, G, E)."""
    if terms.is_causal:
        return attend_causally(query, key, value, terms)
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:
        key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    if terms.window is None and terms.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, scale=terms.scale)[0].transpose(0, 1)
    places = torch.arange(len(query), device=query.device)
    reach = len(query) if terms.window is None else terms.window
    mask = (places[:, None] - places).abs() < reach
    return attend_masked(q, k, v, mask, terms)[0].transpose(0, 1)


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    register_as(NAME, _attend, STEP)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, carried: TextStep | None
) -> Tensor:
    if carried is None:
        raise ConfigurationError(f"{type(module).__name__} does not pass keywords on to its attention function")
    return carried.attend(0, query, key, value, terms)
