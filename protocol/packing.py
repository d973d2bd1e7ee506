"""Token ids and log-probabilities as little-endian arrays, and what packs them is compressed with."""

import struct
from collections.abc import Sequence

#: zstd's default: the bytes of float32 hardly shrink, the repeated token ids and texts do.
COMPRESSION_LEVEL = 3
#: What stands for minus infinity, which JSON cannot say; OpenAI's number.
_LEAST = -9999.0


def pack_ints(values: Sequence[int]) -> bytes:
    """As int32."""
    return struct.pack(f"<{len(values)}i", *values)


def unpack_ints(data: bytes) -> tuple[int, ...]:
    """From int32."""
    return struct.unpack(f"<{len(data) // 4}i", data)


def unpack_floats(data: bytes) -> list[float]:
    """From float32, none below what JSON can say."""
    return [max(value, _LEAST) for value in struct.unpack(f"<{len(data) // 4}f", data)]
