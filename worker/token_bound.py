"""TokenBound: how many tokens a text has at least, told from its bytes alone: what cannot fit need not be tokenized.

A byte weighs one by the length of the longest token that it is in. So no token weighs more than one, and a text has at
least as many tokens as its bytes weigh together. That holds for tokenizers that put each byte of a text into exactly
one token: BPE over bytes (GPT-2's and those after it), or with bytes to fall back on (SentencePiece's, as Llama 2 has
it). Of others nothing is said: they may take an unknown word of any length for one token.
"""

import json
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.token_bytes import TokenBytes

#: A sum of floats is not exact, and a bound may be too low, but never too high.
_ROUNDING = 1 - 1e-6
_MAX_CHARACTER_BYTES = 4
#: The last character of Unicode that is a blank.
_LAST_BLANK = 0x3000
#: Pre-tokenizers that leave nothing out, unless they are told to remove what they split at.
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")


class TokenBound:
    """Of one tokenizer. `backend` is the tokenizers library's object, None where a class has a way of its own."""

    def __init__(self, tokenizer: Any, backend: Any, token_bytes: TokenBytes) -> None:
        self._tokenizer, self._token_bytes = tokenizer, token_bytes
        parts = {} if backend is None else json.loads(backend.to_str())
        normalizers = _steps(parts.get("normalizer"), "normalizers")
        is_written = token_bytes.has_all_bytes and (token_bytes.is_byte_level or token_bytes.space is not None)
        self._is_known = bool(parts) and is_written and _is_lossless(parts, normalizers)
        is_composed = any(step["type"] == "NFC" for step in normalizers)
        self._composer = backend.normalizer if is_composed else None

    def exceeds(self, text: str, limit: int) -> int | None:
        """At least how many tokens these are, if it is certain that they are more than `limit`; None otherwise."""
        if not self._is_known or len(text) * _MAX_CHARACTER_BYTES <= limit:
            return None
        if self._composer is not None and not text.isascii():
            text = self._composer.normalize_str(text)
        if self._token_bytes.space is not None:
            text = text.replace(self._token_bytes.space, " ")
        counts = np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256)
        num_tokens = int(counts @ self._weights * _ROUNDING)
        return num_tokens if num_tokens > limit else None

    @cached_property
    def _weights(self) -> npt.NDArray[np.float64]:
        """By byte, 0 to 255."""
        longest = np.ones(256)
        for token in self._token_bytes.all():
            values = list(set(token))
            longest[values] = np.maximum(longest[values], len(token))
        weights = 1 / longest
        if any(token.lstrip or token.rstrip for token in self._tokenizer.added_tokens_decoder.values()):
            # Such a token takes any number of blanks beside it along.
            weights[list(set("".join(filter(str.isspace, map(chr, range(_LAST_BLANK + 1)))).encode()))] = 0.0
        return weights


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's, or the several of a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[name] for step in _steps(each, name)]


def _is_lossless(parts: dict[str, Any], normalizers: list[dict[str, Any]]) -> bool:
    """Whether each byte of a text, composed where that is done, comes into exactly one token, if each byte has one."""
    model, splitters = parts["model"], _steps(parts.get("pre_tokenizer"), "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in splitters)
    return (
        model["type"] == "BPE"
        and (is_byte_level or bool(model.get("byte_fallback")))
        and parts.get("truncation") is None
        and all(step["type"] in _KEEPING and step.get("behavior") != "Removed" for step in splitters)
        and all(step["type"] in ("NFC", "Prepend") or _is_space(step) for step in normalizers)
    )


def _is_space(step: dict[str, Any]) -> bool:
    """Whether the normalizer writes another character for each space, as TokenBytes reads it."""
    return step["type"] == "Replace" and step["pattern"].get("String") == " " and len(step["content"]) == 1
