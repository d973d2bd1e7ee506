"""PeakDemand: the most blocks that Sequences of known length will ever hold at once, if nothing else is admitted.

Each step gives each of them one token, so the moment at which one ends is known, and what it leaves to the others.

Letters: S Sequences, M moments at which one of them ends.
"""

from collections.abc import Iterable

import numpy as np

from batching.sequence import Sequence

#: Steps after its last token was scheduled in which a Sequence still has its blocks, at most: the step's tokens come in
#: when the next one is launched already.
_END_DELAY = 1
#: Moments that are looked at one by one; of more, what lies between two is counted as of its worst.
_MAX_MOMENTS = 64


class PeakDemand:
    """Of the Sequences that run, made anew for each step in which any is admitted.

    `least_budget` is how many tokens of prompts a step takes at the least, so long as there are any.
    """

    def __init__(self, running: Iterable[Sequence], block_size: int, least_budget: int) -> None:
        self._block_size = block_size
        self._least_budget = least_budget
        self._num_growing = 0  # blocks that are still to come, of all together
        # Of each: tokens after the step that is being made, tokens with a place at the end, blocks held, and tokens to
        # be computed before it decodes.
        self._entries: list[tuple[int, int, int, int]] = []
        for seq in running:
            self.add(seq)

    def add(self, seq: Sequence) -> None:
        """It runs."""
        to_prefill = max(seq.num_prefill - seq.num_computed, 0)
        self._add((seq.num_tokens, self._end(seq), len(seq.block_table), to_prefill))

    def fits(self, seq: Sequence, num_shared: int, num_ready: int, num_used: int, num_blocks: int) -> bool:
        """Whether `num_blocks` suffice when it is admitted with `num_shared` blocks of others, which hold `num_ready`
        of its tokens. `num_used` is the number of different blocks in use, those included."""
        entry = (seq.num_tokens + 1, self._end(seq), num_shared, seq.num_known - num_ready)
        if num_used + self._num_growing + self._growth(entry) <= num_blocks:
            return True  # even if none ends before the others
        return self._peak(entry, num_used) <= num_blocks

    def _add(self, entry: tuple[int, int, int, int]) -> None:
        self._entries.append(entry)
        self._num_growing += self._growth(entry)

    def _end(self, seq: Sequence) -> int:
        return seq.num_prompt_tokens + max(seq.max_tokens - 1, 0)  # the last token is never computed

    def _growth(self, entry: tuple[int, int, int, int]) -> int:
        return max(-(-max(entry[0], entry[1]) // self._block_size) - entry[2], 0)

    def _peak(self, newcomer: tuple[int, int, int, int], num_used: int) -> int:
        num_tokens, ends, num_blocks, to_prefill = np.array([*self._entries, newcomer]).T  # (S,) each
        # Those in prefill come one after the other, with what decode leaves of the budget.
        behind = np.where(to_prefill > 0, np.cumsum(to_prefill), 0)
        remaining = ends - num_tokens
        last = remaining - (-behind // self._least_budget) + _END_DELAY
        moments = np.unique(last)  # (M,)
        if len(moments) > _MAX_MOMENTS:
            moments = moments[np.linspace(0, len(moments) - 1, _MAX_MOMENTS).astype(np.int64)]
        before = np.concatenate(([last.min() - 1], moments[:-1]))
        is_alive = last > before[:, None]  # (M, S), at some moment since the one before
        then = num_tokens + np.minimum(moments[:, None], remaining)
        growth = np.maximum(-(-then // self._block_size) - num_blocks, 0)
        held = np.minimum((num_blocks * is_alive).sum(axis=1), num_used)
        return int((held + (growth * is_alive).sum(axis=1)).max())
