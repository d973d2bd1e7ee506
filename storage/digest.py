"""The digest of Results: a sum, modulo 2**256, of one SHA-256 for each over line, sample and outcome.

So it does not depend on the order: a Chunk's grows with each commit, those of its Chunks add up to the Job's, and an
error that is taken back is subtracted. How a Result came about (cached, attempt, seconds) is not in it.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from protocol.requests import Result

_BYTES = 32
_MODULUS = 1 << (8 * _BYTES)
#: Of no Results.
EMPTY = bytes(_BYTES)

_encode = msgspec.msgpack.Encoder().encode


def added(digest: bytes, new: Iterable[Result]) -> bytes:
    """The digest with these Results."""
    return _sum(digest, map(_outcome, new))


def subtracted(digest: bytes, gone: Iterable[Result]) -> bytes:
    """The digest without these Results."""
    return _sum(digest, (-_outcome(result) for result in gone))


def total(digests: Iterable[bytes]) -> bytes:
    """The digest of all Results that these are of."""
    return _sum(EMPTY, (int.from_bytes(digest, "big") for digest in digests))


def _outcome(result: Result) -> int:
    answer, failure = result.answer, result.failure
    fields: list[Any] = [result.line, result.sample]
    if failure is not None:
        fields += [failure.code, failure.message.encode("utf-8", "surrogatepass")]
    elif answer is not None:
        fields += [answer.text.encode("utf-8", "surrogatepass"), answer.finish_reason]
        fields += [answer.prompt_tokens, answer.completion_tokens]
        fields += [answer.logprobs, answer.score, answer.embedding, answer.classification]
    return int.from_bytes(hashlib.sha256(_encode(fields)).digest(), "big")


def _sum(digest: bytes, numbers: Iterable[int]) -> bytes:
    return ((int.from_bytes(digest, "big") + sum(numbers)) % _MODULUS).to_bytes(_BYTES, "big")
