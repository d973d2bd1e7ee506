"""The most blocks that Sequences of known length will ever hold at once, if nothing else is admitted.

Each step gives each of them one token, so the moment at which one ends is known, and what it leaves to the others.

Letters: S Sequences, M moments at which one of them ends.
"""

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


def peak_demand(
    num_tokens: Int64s, max_tokens: Int64s, num_blocks: Int64s, delays: Int64s, num_used: int, block_size: int
) -> int:
    """All (S,): tokens after the step that is being made, tokens with a place at the end, blocks held, and steps by
    which the end may be late. `num_used` is the number of different blocks among those held, which may be shared.
    """
    remaining = max_tokens - num_tokens
    moments = np.unique(remaining + delays)  # (M,)
    is_alive = remaining + delays >= moments[:, None]  # (M, S)
    then = num_tokens + np.minimum(moments[:, None], remaining)
    growth = np.maximum(-(-then // block_size) - num_blocks, 0)
    held = np.minimum((num_blocks * is_alive).sum(axis=1), num_used)
    return int((held + (growth * is_alive).sum(axis=1)).max())
