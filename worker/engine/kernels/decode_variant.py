"""DecodeVariant: how the decode kernel is cut and launched. Measured by benchmarks/kernels_gpu.py."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class DecodeVariant:
    tile: int  # tokens
    num_warps: int
    num_stages: int
    programs_per_sm: int


#: For the heads of one row, and for those of many: the latter takes more registers.
DECODE = DecodeVariant(tile=64, num_warps=4, num_stages=3, programs_per_sm=2)
PREFIX = DecodeVariant(tile=64, num_warps=4, num_stages=3, programs_per_sm=1)


def choose_variant(num_queries: int, head_dim: int) -> DecodeVariant:
    """For tiles of that many queries, of one key/value head."""
    if num_queries <= 16:
        return DECODE if head_dim <= 128 else replace(DECODE, tile=DECODE.tile // 2)
    return PREFIX if head_dim <= 128 else replace(PREFIX, tile=PREFIX.tile // 2, num_warps=2 * PREFIX.num_warps)
