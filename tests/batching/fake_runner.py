"""A runner without a model: the next token is a hash of all tokens before it, read back through the block tables.

It holds what the real one holds on the device and is fed by the same layout, and every position that a step attends to
is compared with the text it should hold: a block that is shared by mistake, freed too early or filled at the wrong
place is seen at once, also where it would change no sampled token.
"""

import zlib

import numpy as np
import numpy.typing as npt

from batching.layout import pack
from batching.scheduler import StepPlan
from batching.sequence import Sequence

VOCAB_SIZE = 97


def next_token(history: npt.NDArray[np.int64], sample: int = 0) -> int:
    return zlib.crc32(history.astype("<i4").tobytes(), sample) % VOCAB_SIZE


class FakeRunner:
    def __init__(self, num_rows: int, num_blocks: int, block_size: int, max_model_len: int) -> None:
        self.block_size = block_size
        self.cache = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.block_table = np.full((num_rows, -(-max_model_len // block_size)), -1, dtype=np.int64)
        self.last_token = np.full(num_rows, -1, dtype=np.int64)
        self.length = np.zeros(num_rows, dtype=np.int64)
        self.texts: dict[Sequence, list[int]] = {}  # prompts and all that was sampled, the host's knowledge aside
        self.num_computed_tokens = 0

    def launch(self, plan: StepPlan) -> npt.NDArray[np.int64]:
        layout = pack(plan)
        num_decode = layout.num_decode
        for row, index, block in plan.new_blocks:
            self.block_table[row, index] = block
        decode_rows = layout.rows[:num_decode]
        token_rows = np.concatenate((decode_rows, layout.prefill_rows))
        token_ids = np.concatenate((self.last_token[decode_rows], layout.prefill_token_ids))
        # The host's idea of where a decode row stands must be the device's.
        assert (layout.positions[:num_decode] == self.length[decode_rows]).all()
        assert (token_ids >= 0).all()

        for source, target in plan.copies:
            self.cache[target] = self.cache[source]
        blocks = self.block_table[token_rows, layout.positions // self.block_size]
        assert len(set(zip(blocks.tolist(), (layout.positions % self.block_size).tolist(), strict=True))) == len(blocks)
        self.cache[blocks, layout.positions % self.block_size] = token_ids
        self.cache[layout.duplicate_blocks, layout.positions[layout.duplicated] % self.block_size] = token_ids[
            layout.duplicated
        ]
        self.length[layout.rows] = layout.kv_lens

        self.num_computed_tokens += len(token_ids)

        for seq, row, kv_len in zip(plan.sequences, layout.rows.tolist(), layout.kv_lens.tolist(), strict=True):
            text = self.texts.setdefault(seq, seq.prompt_ids.tolist())
            assert self._attended(row, kv_len).tolist() == text[:kv_len]
        tokens: list[int] = []
        for segment, row in zip(plan.sampled, layout.sampled_rows.tolist(), strict=True):
            seq = plan.sequences[segment]
            tokens.append(next_token(self._attended(row, int(layout.kv_lens[segment])), seq.sample))
            self.texts[seq].append(tokens[-1])
        self.last_token[layout.sampled_rows] = tokens
        return np.array(tokens, dtype=np.int64)

    def fail(self, known: dict[Sequence, list[int]]) -> None:
        """Steps have failed somewhere in their middle: nothing here is of use, and texts are what is `known`."""
        self.cache.fill(-1)
        self.block_table.fill(-1)
        self.last_token.fill(-1)
        self.length.fill(-1)
        self.texts = known

    def _attended(self, row: int, kv_len: int) -> npt.NDArray[np.int64]:
        num_blocks = -(-kv_len // self.block_size)
        return self.cache[self.block_table[row, :num_blocks]].reshape(-1)[:kv_len]
