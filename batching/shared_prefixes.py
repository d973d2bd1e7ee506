"""SharedPrefixes: which running Sequences begin with the same blocks, so that a decode step may read those once.

A block that several hold stands for all the text up to its end, so the block at the end of a prefix names it. Groups
are made and joined at admission and left with the blocks, never searched for: a step that has none costs nothing.

Letters: R rows, D decode rows, X tiles, P members of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batching.sequence import Sequence

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

#: Rows that a backend attends for at once; a larger group has several tiles.
MAX_MEMBERS = 32
#: Tokens that need not be read again, at least, and their share of all: below it the second pass costs more than it
#: saves.
_MIN_SAVED_TOKENS = 4096
_MIN_SAVED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class PrefixTiles:
    """Groups of a step's decode rows, in tiles of at most MAX_MEMBERS."""

    members: Int32s  # (X, P) decode rows, their first one there; -1: none
    lens: Int32s  # (X,) tokens of the prefix, whole blocks
    starts: Int32s  # (D,) tokens of each row that its group's prefix covers


class SharedPrefixes:
    def __init__(self, num_rows: int, block_size: int, num_holders: Callable[[int], int]) -> None:
        self._block_size = block_size
        self._num_holders = num_holders
        self._families: dict[int, dict[int, Sequence]] = {}  # by first block, then by seq_id
        self._groups: dict[int, int] = {}  # number of the group by the last block of its prefix
        self._blocks: dict[int, int] = {}  # the same backwards
        self._sizes: dict[int, int] = {}  # members by number of the group
        self._free = list(range(num_rows - 1, -1, -1))
        self._group_of_row = np.full(num_rows, -1, dtype=np.int64)  # (R,)
        self._tokens = np.zeros(num_rows, dtype=np.int64)  # of the prefix, by number of the group

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def join(self, seq: Sequence, num_shared: int) -> None:
        """`seq` has its row and its blocks, of which the first `num_shared` it has found."""
        table = seq.block_table
        family = self._families.setdefault(table[0], {})
        family[seq.seq_id] = seq
        if len(family) < 2:
            return
        # What a row is spared at each depth, if all that hold the block at that depth read it together.
        depth, spared = 0, 0.0
        for i in range(num_shared):
            here = (i + 1) * (1 - 1 / self._num_holders(table[i]))
            if here > spared:
                depth, spared = i + 1, here
        if depth == 0:
            return
        block = table[depth - 1]
        if block in self._groups:
            self._enter(seq, self._groups[block])
            return
        group = self._free.pop()
        self._groups[block], self._blocks[group], self._sizes[group] = group, block, 0
        self._tokens[group] = depth * self._block_size
        for other in family.values():  # `seq` among them, and who has computed the prefix
            is_there = len(other.block_table) >= depth and other.block_table[depth - 1] == block
            if is_there and self._group_of_row[other.row] < 0:
                self._enter(other, group)

    def leave(self, seq: Sequence) -> None:
        """`seq` is about to give its row and its blocks away."""
        family = self._families[seq.block_table[0]]
        del family[seq.seq_id]
        if not family:
            del self._families[seq.block_table[0]]
        group = int(self._group_of_row[seq.row])
        if group < 0:
            return
        self._group_of_row[seq.row] = -1
        self._sizes[group] -= 1
        if self._sizes[group] == 0:
            del self._groups[self._blocks.pop(group)], self._sizes[group]
            self._free.append(group)

    def tiles(self, sequences: list[Sequence], num_read: list[int]) -> PrefixTiles | None:
        """The groups among a step's decode rows (D,), which read `num_read` tokens each; None where they do not pay."""
        if not self._groups:
            return None
        groups = self._group_of_row[[seq.row for seq in sequences]]  # (D,)
        members = np.argsort(groups, kind="stable")
        members = members[np.searchsorted(groups[members], 0) :]  # those that are in a group, together with their like
        numbers, counts = np.unique(groups[members], return_counts=True)
        is_shared = counts > 1
        members = members[np.repeat(is_shared, counts)]
        counts, lens = counts[is_shared], self._tokens[numbers[is_shared]]
        num_saved = int(((counts - 1) * lens).sum())
        if num_saved < max(_MIN_SAVED_TOKENS, _MIN_SAVED_SHARE * sum(num_read)):
            return None
        num_tiles = -(-counts // MAX_MEMBERS)
        places = np.arange(len(members)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the group
        tiles = np.repeat(np.cumsum(num_tiles) - num_tiles, counts) + places // MAX_MEMBERS
        table = np.full((int(num_tiles.sum()), MAX_MEMBERS), -1, dtype=np.int32)
        table[tiles, places % MAX_MEMBERS] = members
        starts = np.zeros(len(sequences), dtype=np.int32)
        starts[members] = np.repeat(lens, counts)
        return PrefixTiles(table, np.repeat(lens, num_tiles).astype(np.int32), starts)

    def _enter(self, seq: Sequence, group: int) -> None:
        self._group_of_row[seq.row] = group
        self._sizes[group] += 1
