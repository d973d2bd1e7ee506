"""DecodeVariant: how the decode kernel is cut and launched. Measured by benchmarks/kernels_gpu.py."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class DecodeVariant:
    tile: int  # tokens
    num_warps: int
    num_stages: int
    programs_per_sm: int
    is_nested: bool = False  # one loop over rows and one over a row's tiles, else one over all tiles


#: For the heads of one row, and for those of many.
DECODE = DecodeVariant(tile=64, num_warps=4, num_stages=3, programs_per_sm=2)
PREFIX = DecodeVariant(tile=64, num_warps=4, num_stages=3, programs_per_sm=2, is_nested=True)
#: For float32. Not measured: it is there to compare with.
PLAIN = DecodeVariant(tile=32, num_warps=8, num_stages=2, programs_per_sm=1)


def choose_variant(num_queries: int, head_dim: int, num_bytes: int = 2) -> DecodeVariant:
    """For tiles of that many queries, of one key/value head, and numbers of so many bytes each."""
    if num_bytes > 2:  # multiplied without tensor cores, out of registers; twice as much to hold
        return replace(PLAIN, tile=PLAIN.tile if head_dim <= 256 else PLAIN.tile // 2, is_nested=num_queries > 16)
    if num_queries <= 16:
        return DECODE if head_dim <= 128 else replace(DECODE, tile=DECODE.tile // 2)
    # More to hold, be it for larger heads or for finding out whose a query is, takes the registers of two programs.
    tile = PREFIX.tile if head_dim <= 128 else PREFIX.tile // 2
    is_large = head_dim > 128 or num_queries & (num_queries - 1)
    return replace(PREFIX, tile=tile, num_warps=8, programs_per_sm=1) if is_large else PREFIX
