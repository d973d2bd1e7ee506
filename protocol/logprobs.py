"""Log-probabilities of output tokens: packed for storage, and unpacked to OpenAI's `logprobs` object.

Letters: T tokens, N alternatives asked for.
"""

from collections.abc import Callable, Sequence

import msgspec
import zstandard

from protocol.packing import COMPRESSION_LEVEL, pack_ints, unpack_floats, unpack_ints


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    """Little-endian arrays in rows of one token each; `texts` holds the bytes of every token id in them, once."""

    num_top: int
    token_ids: bytes  # (T,) int32
    logprobs: bytes  # (T,) float32
    top_ids: bytes  # (T, N) int32, best first
    top_logprobs: bytes  # (T, N) float32
    texts: dict[int, bytes]


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that was possible at a place. `token` has U+FFFD where its `bytes` are no whole UTF-8 by themselves."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True):
    """A token of the answer; `top_logprobs` are the most likely ones at its place, whether it is among them or not."""

    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, frozen=True):
    """OpenAI's shape. The tokens are those of the answer's text: no stop token, nothing behind a stop string."""

    content: list[TokenLogprob]


def pack_logprobs(token_ids: Sequence[int], pieces: Sequence[bytes], token_bytes: Callable[[int], bytes]) -> bytes:
    """`pieces` are as in StepFrame.logprobs, one per token, all with as many alternatives."""
    num_top = (len(pieces[0]) - 4) // 8 if pieces else 0
    width = 4 * num_top
    rows = [(piece[:4], piece[4 : 4 + width], piece[4 + width :]) for piece in pieces]
    logprobs, top_ids, top_logprobs = (b"".join(part) for part in zip(*rows, strict=True)) if rows else (b"",) * 3
    used = {*token_ids, *unpack_ints(top_ids)}
    packed = _Packed(
        num_top,
        pack_ints(token_ids),
        logprobs,
        top_ids,
        top_logprobs,
        {token: token_bytes(token) for token in sorted(used)},
    )
    return zstandard.compress(_encode(packed), COMPRESSION_LEVEL)


def unpack_logprobs(blob: bytes) -> Logprobs:
    """The inverse of `pack_logprobs`, but for token ids, which OpenAI's shape does not have."""
    packed = _decode(zstandard.decompress(blob))
    tokens = {token: (text.decode(errors="replace"), list(text)) for token, text in packed.texts.items()}
    num_top = packed.num_top
    top = []
    for token, logprob in zip(unpack_ints(packed.top_ids), unpack_floats(packed.top_logprobs), strict=True):
        text, raw = tokens[token]
        top.append(TopLogprob(text, logprob, raw))
    content = []
    for i, (token, logprob) in enumerate(
        zip(unpack_ints(packed.token_ids), unpack_floats(packed.logprobs), strict=True)
    ):
        text, raw = tokens[token]
        content.append(TokenLogprob(text, logprob, raw, top[i * num_top : (i + 1) * num_top]))
    return Logprobs(content)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Packed).decode
