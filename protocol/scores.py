"""Scores: what a model says of given tokens, packed for storage and unpacked for the reader."""

import math
from collections.abc import Callable

import msgspec
import zstandard

from protocol.packing import COMPRESSION_LEVEL, unpack_floats, unpack_ints


class ScoredTokens(msgspec.Struct, frozen=True, array_like=True):
    """Packed form. Little-endian arrays in rows of one token each; `texts` holds the bytes of every token id, once."""

    token_ids: bytes  # int32
    logprobs: bytes  # float32
    ranks: bytes  # int32, 1: the most likely
    num_top: int
    top_ids: bytes  # int32, num_top each, best first
    top_logprobs: bytes  # float32
    texts: dict[int, bytes]


class Alternative(msgspec.Struct, frozen=True):
    """A token that was possible at a place."""

    token: str
    token_id: int
    logprob: float


class TokenScore(msgspec.Struct, frozen=True, kw_only=True):
    """One token: its natural logarithm of probability given all before it, and its rank among all (1: the greedy
    choice). `top_logprobs` are the most likely ones at its place."""

    token: str
    token_id: int
    logprob: float
    rank: int
    top_logprobs: list[Alternative]


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """`is_greedy`: greedy decoding would have said every one of these tokens; `perplexity` is
    exp(-logprob / num_tokens)."""

    logprob: float  # the sum over all tokens
    num_tokens: int
    is_greedy: bool
    perplexity: float
    tokens: list[TokenScore]


def pack_score(tokens: ScoredTokens) -> bytes:
    return zstandard.compress(_encode(tokens), COMPRESSION_LEVEL)


def with_texts(tokens: ScoredTokens, token_bytes: Callable[[int], bytes]) -> ScoredTokens:
    used = {*unpack_ints(tokens.token_ids), *unpack_ints(tokens.top_ids)}
    return msgspec.structs.replace(tokens, texts={token: token_bytes(token) for token in sorted(used)})


def unpack_score(blob: bytes) -> Score:
    """The inverse of `pack_score`."""
    packed = _decode(zstandard.decompress(blob))
    texts = {token: text.decode(errors="replace") for token, text in packed.texts.items()}
    ids, logprobs, ranks = unpack_ints(packed.token_ids), unpack_floats(packed.logprobs), unpack_ints(packed.ranks)
    top = [
        Alternative(texts.get(token, ""), token, logprob)
        for token, logprob in zip(unpack_ints(packed.top_ids), unpack_floats(packed.top_logprobs), strict=True)
    ]
    num_top, total = packed.num_top, math.fsum(logprobs)
    return Score(
        logprob=total,
        num_tokens=len(ids),
        is_greedy=all(rank == 1 for rank in ranks),
        perplexity=_perplexity(total, len(ids)),
        tokens=[
            TokenScore(
                token=texts.get(token, ""),
                token_id=token,
                logprob=logprob,
                rank=rank,
                top_logprobs=top[i * num_top : (i + 1) * num_top],
            )
            for i, (token, logprob, rank) in enumerate(zip(ids, logprobs, ranks, strict=True))
        ],
    )


def _perplexity(total: float, num_tokens: int) -> float:
    """As large as a float can be, where JSON has no infinity."""
    try:
        return math.exp(-total / max(num_tokens, 1))
    except OverflowError:
        return 1.7976931348623157e308


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ScoredTokens).decode
