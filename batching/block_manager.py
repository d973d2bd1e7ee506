"""BlockManager: who owns which block of the KV cache. It knows numbers of blocks, not what is in them.

Blocks are handed out and taken back here alone, and a Sequence starts computing at `num_computed`, which admission
sets: shared prefixes need a count per block here and another start there, nothing else.
"""


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """In tokens."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num: int) -> list[int]:
        """`num` blocks; the caller has checked `num_free`."""
        assert num <= len(self._free), f"{num} blocks asked for, {len(self._free)} free"
        if num == 0:
            return []
        blocks = self._free[-num:]
        del self._free[-num:]
        return blocks

    def free(self, blocks: list[int]) -> None:
        self._free.extend(blocks)
