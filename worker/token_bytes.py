"""TokenBytes: the bytes that one token stands for, which its own text cannot say where a character is split."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Of a tokenizer as transformers loads it. `is_byte_level` says that any token is any bytes (as GPT-2's are);
    otherwise single tokens may stand for single bytes (SentencePiece's byte fallback)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._num_tokens = 1 + max(self._vocabulary.values())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        steps = (decoder or {}).get("decoders", [decoder or {}])
        self.is_byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
        self._has_byte_tokens = any(step.get("type") == "ByteFallback" for step in steps)
        # What stands for a space inside tokens, "▁" as a rule.
        spaces = [step.get("replacement") for step in steps if step.get("type") == "Metaspace"]
        spaces += [step["pattern"].get("String") for step in steps if step.get("type") == "Replace"]
        self.space: str | None = next((space for space in spaces if space), None)
        self._added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        self._special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    @property
    def has_all_bytes(self) -> bool:
        """Whether each byte by itself is a token."""
        single = _byte_alphabet() if self.is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        return all(token in self._vocabulary for token in single)

    def all(self) -> Iterator[bytes]:
        """Of every token there is."""
        return (self._of_text(token_id, text) for text, token_id in self._vocabulary.items())

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding leaves the token out: a special one, or one that only the model has."""
        return token_id in self._special_ids or token_id >= self._num_tokens

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one raw byte, so that its text depends on its neighbours."""
        text = self._text(token_id)
        return self._has_byte_tokens and text is not None and _BYTE_TOKEN.fullmatch(text) is not None

    def _text(self, token_id: int) -> str | None:
        # A model's vocabulary may be padded beyond its tokenizer's; such a token has no text.
        return self._tokenizer.convert_ids_to_tokens(token_id) if token_id < self._num_tokens else None

    def _of(self, token_id: int) -> bytes:
        text = self._text(token_id)
        return b"" if text is None else self._of_text(token_id, text)

    def _of_text(self, token_id: int, text: str) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if self.is_byte_level:
            table = _byte_alphabet()
            known = [table.get(character) for character in text]
            return text.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self._has_byte_tokens and (found := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(found[1], 16)])
        if self.space is not None:
            return text.replace(self.space, " ").encode()
        alone: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return alone.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
