"""Detokenizer: one answer's text as its tokens come, at every moment equal to decoding all of them at once.

What is no whole UTF-8, also at the end of an answer, reads as transformers decodes it: byte-level tokenizers give one
U+FFFD for each broken character, byte fallback gives one for each byte of a run of byte tokens that is not UTF-8 as a
whole. Special tokens have no text, nor have those that only the model's padded vocabulary has.
"""

import codecs
from collections.abc import Callable, Sequence

from worker.token_bytes import TokenBytes

#: Decoding starts this many prompt tokens early, because some tokenizers drop the leading space of what they decode.
_CONTEXT_TOKENS = 6
_BROKEN = "�"


class Detokenizer:
    """`settled` only ever grows; `pending` is how the rest reads if the answer ends here."""

    def __init__(
        self, token_bytes: TokenBytes, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]
    ) -> None:
        self._bytes = token_bytes
        self._decode = decode
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = stable_context(token_bytes, prompt_ids)
        self._start = 0  # of the ids that are still decoded; those before `_read` are settled
        self._read = len(self._ids)
        self.settled = ""
        self.pending = ""

    @property
    def text(self) -> str:
        return self.settled + self.pending

    def push(self, token_id: int) -> None:
        if self._bytes.is_silent(token_id):
            return
        if self._bytes.is_byte_level:
            self.settled += self._utf8.decode(self._bytes.of(token_id))
            self.pending = self._utf8.getstate()[0].decode(errors="replace")
            return
        self._ids.append(token_id)
        known = self._decode(self._ids[self._start : self._read])
        grown = self._decode(self._ids[self._start :])[len(known) :]
        if self._bytes.is_byte(token_id) or grown.endswith(_BROKEN):
            self.pending = grown
            return
        self.settled, self.pending = self.settled + grown, ""
        self._start, self._read = self._read, len(self._ids)


def stable_context(token_bytes: TokenBytes, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt's last tokens whose text cannot be changed by what follows; none where none is needed."""
    if token_bytes.is_byte_level:
        return []
    context = [token for token in prompt_ids[-4 * _CONTEXT_TOKENS :] if not token_bytes.is_silent(token)]
    while context and token_bytes.is_byte(context[-1]):
        context.pop()
    return context[-_CONTEXT_TOKENS:]
