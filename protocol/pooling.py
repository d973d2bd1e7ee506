"""Embeddings and classifications: packed for storage, and unpacked for the reader."""

import base64
import struct
from collections.abc import Sequence

import msgspec

from protocol.requests import EncodingFormat


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    labels: list[str]
    probs: bytes  # little-endian float32, one per label


class Classification(msgspec.Struct, frozen=True):
    """`label` is the most likely of `labels`; `probs` are theirs, in their order."""

    label: str
    probs: list[float]
    labels: list[str]


def pack_classification(labels: Sequence[str], probs: bytes) -> bytes:
    """`probs` are little-endian float32, one for each of the labels."""
    return _encode(_Packed(list(labels), probs))


def unpack_classification(blob: bytes) -> Classification:
    """The inverse of `pack_classification`."""
    packed = _decode(blob)
    probs = _floats(packed.probs)
    return Classification(packed.labels[probs.index(max(probs))], probs, packed.labels)


def show_embedding(blob: bytes, encoding_format: EncodingFormat) -> list[float] | str:
    """A stored embedding, little-endian float32, as numbers, or as OpenAI's base64 of the same bytes."""
    return base64.b64encode(blob).decode() if encoding_format == "base64" else _floats(blob)


def _floats(blob: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(blob) // 4}f", blob))


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Packed).decode
