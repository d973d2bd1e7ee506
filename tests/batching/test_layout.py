"""The packed layout of a plan, spelled out."""

import numpy as np

from batching.layout import pack
from batching.scheduler import StepPlan
from batching.sequence import Sequence


def running(seq_id: int, row: int, prompt: list[int], outputs: list[int]) -> Sequence:
    seq = Sequence(seq_id, np.array(prompt, dtype=np.int32), max_tokens=99)
    seq.row, seq.output_ids = row, outputs
    return seq


def test_packed_layout_puts_decode_rows_first_and_prompts_behind() -> None:
    decoding, resumed, fresh = (
        running(1, 4, [10, 11, 12], [13]),
        running(2, 0, [20, 21], [22, 23, 24]),
        running(3, 7, [30, 31, 32, 33], []),
    )
    plan = StepPlan(
        num_decode=1, sequences=[decoding, resumed, fresh], starts=[3, 1, 0], num_tokens=[1, 4, 2], sampled=[0, 1]
    )

    layout = pack(plan)

    assert layout.rows.tolist() == [4, 0, 7]
    assert layout.query_lens.tolist() == [1, 4, 2]
    assert layout.kv_lens.tolist() == [4, 5, 2]
    assert layout.positions.tolist() == [3, 1, 2, 3, 4, 0, 1]
    assert layout.prefill_rows.tolist() == [0, 0, 0, 0, 7, 7]
    assert layout.prefill_token_ids.tolist() == [21, 22, 23, 24, 30, 31]
    assert layout.sampled.tolist() == [0, 4]
    assert layout.sampled_rows.tolist() == [4, 0]


def test_packed_layout_of_decode_rows_alone_needs_no_tokens_from_the_host() -> None:
    plan = StepPlan(num_decode=1, sequences=[running(1, 2, [5], [])], starts=[1], num_tokens=[1], sampled=[0])

    layout = pack(plan)

    assert layout.prefill_token_ids.shape == layout.prefill_rows.shape == (0,)
    assert layout.positions.tolist() == [1]


def test_packed_layout_of_a_piece_that_ends_early_samples_nothing() -> None:
    plan = StepPlan(num_decode=0, sequences=[running(1, 2, [5, 6, 7], [])], starts=[0], num_tokens=[2], sampled=[])

    layout = pack(plan)

    assert layout.sampled.shape == layout.sampled_rows.shape == (0,)
    assert layout.prefill_token_ids.tolist() == [5, 6]
