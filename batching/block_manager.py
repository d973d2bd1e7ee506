"""BlockManager: who holds which block of the KV cache, and which full blocks hold a text that others may share.

It knows numbers of blocks and names of contents, not what is in them. A name is the hash of a block's tokens and of all
tokens before them, so two texts that begin alike share the blocks of what they have in common. A named block that
nobody holds stays where it is until its place is needed; the one unused longest goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

#: Of a content's name. At 128 bits equal names mean equal texts: the odds of a pair among 10^12 blocks are 10^-15.
_NAME_BYTES = 16


def content_name(parent: bytes, token_ids: bytes | memoryview) -> bytes:
    """The name of a full block, given the name of the one before it (b"" for the first)."""
    return hashlib.blake2b(token_ids, digest_size=_NAME_BYTES, key=parent).digest()


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_changes = 0  # times that room or a name has come into being
        self._num_holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # held by nobody, and nothing in them is of use
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, named; the one unused longest first
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, those with a content that may be of use again included."""
        return len(self._free) + len(self._idle)

    @property
    def num_named(self) -> int:
        return len(self._names)

    @property
    def capacity(self) -> int:
        """In tokens."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_holders(self, block: int) -> int:
        return self._num_holders[block]

    def allocate(self, num: int) -> list[int]:
        """`num` blocks with nothing of use in them; the caller has checked `num_free`."""
        assert num <= self.num_free, f"{num} blocks asked for, {self.num_free} free"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder of each: blocks that somebody holds, or that `find` has just named."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._idle[block]
            self._num_holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less of each block of a table. The end of a text is evicted before its beginning."""
        for block in reversed(blocks):
            assert self._num_holders[block] > 0, f"block {block} is freed, and nobody holds it"
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self.num_changes += 1
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def name(self, block: int, name: bytes) -> None:
        """From here on `find` gives this block for this name, unless another block has the same content already.

        To be called when it is certain that the block is filled before whatever is scheduled from here on reads it.
        """
        assert self._num_holders[block] > 0
        if name not in self._by_name and block not in self._names:
            self._by_name[name] = block
            self._names[block] = name
            self.num_changes += 1

    def forget(self) -> None:
        """Nothing in any block can be found again."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._by_name.clear()
        self._names.clear()
        self.num_changes += 1

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of `names` that is here."""
        blocks: list[int] = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._by_name[self._names.pop(block)]
        return block
