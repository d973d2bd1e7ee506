"""PrefixGroups: the decode rows whose block tables begin with the same blocks, as the decode kernel wants them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """On the device, of fixed sizes. Letters: D decode rows, X tiles of rows that share a prefix, P rows in a tile.

    A group of more than P rows has several tiles; what is left over of either dimension is marked as unused.
    """

    members: Tensor  # (X, P) int32 decode rows, their first one there; -1: unused
    lens: Tensor  # (X,) int32 tokens of the prefix, a multiple of the block size; 0: unused
    starts: Tensor  # (D,) int32 tokens of each row that its group's prefix covers
