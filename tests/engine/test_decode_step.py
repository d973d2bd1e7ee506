"""The decode step that is captured on CUDA, run as it is: filled up with rows of nobody, asking the host nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.reference import Reference, assert_equal_where_decided, drive, new_sequence, settings_for
from worker.engine.attention import AttentionStep, AttentionTerms
from worker.engine.backends.sdpa import SDPABackend
from worker.engine.decode_step import Decoded, DecodeStep, graph_sizes
from worker.engine.engine import Engine
from worker.engine.row_state import RowState


@pytest.mark.parametrize("num_rows", [1, 7, 256, 1000])
def test_graph_sizes_hold_every_number_of_rows_with_little_padding(num_rows: int) -> None:
    sizes = graph_sizes(num_rows)

    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= num_rows
    assert all(b - a <= (2 if a < 8 else max(8, a // 8)) for a, b in zip([0, *sizes], sizes, strict=False))


class _Blind(SDPABackend):
    """Takes lengths from the device, as a backend must that is captured."""

    def attend(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        if step.decode_kv_lens is None:
            object.__setattr__(step, "decode_kv_lens", step.decode_lens.numpy().astype("int64"))
        return super().attend(query, k_cache, v_cache, step, terms)


def test_padded_steps_that_ask_the_host_nothing_give_the_same_text(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference("qwen3")
    sizes = []

    def run(step: DecodeStep, host_lens: Any) -> Decoded:
        size = next(size for size in step._sizes if size >= len(host_lens))
        whole = step._forward(size, None, False)
        assert whole.tokens is not None
        sizes.append((len(host_lens), size))
        logits, positions, tokens = (x[: len(host_lens)] for x in (whole.logits, whole.positions, whole.tokens))
        return Decoded(logits, positions, tokens)

    monkeypatch.setattr("worker.engine.engine.choose_backend", lambda *_: _Blind())
    monkeypatch.setattr(DecodeStep, "run", run)
    monkeypatch.setattr(RowState, "draw", lambda state, logits, rows, positions: torch.argmax(logits, dim=-1))
    engine = Engine.start(settings_for(model_folder("qwen3"), lookahead=1))

    outcome = drive(engine, [new_sequence(i, prompt, 40) for i, prompt in enumerate(expected.prompts)])

    assert any(num < size for num, size in sizes)
    assert_equal_where_decided([outcome.outputs[i] for i in range(len(expected.prompts))], expected)


class _Checking(_Blind):
    """Attends as ever, and checks what it is told of shared prefixes."""

    shares_prefixes = True

    def __init__(self) -> None:
        self.num_saved = {True: 0, False: 0}

    def attend(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        if step.prefixes is not None:
            starts = torch.zeros_like(step.prefixes.starts)
            tiles = zip(step.prefixes.members.tolist(), step.prefixes.lens.tolist(), strict=True)
            for row, num_tokens in tiles:
                members = [member for member in row if member >= 0]
                assert bool(members) == bool(num_tokens)
                tables = step.decode_tables[members, : num_tokens // self.block_size]
                assert (tables == tables[:1]).all()
                assert (step.decode_lens[members] > num_tokens).all()
                starts[members] = num_tokens
                self.num_saved[len(step.query_lens) == 0] += max(len(members) - 1, 0) * num_tokens
            assert starts.tolist() == step.prefixes.starts.tolist()
            assert len(starts) == step.num_decode
        return super().attend(query, k_cache, v_cache, step, terms)


def test_rows_that_begin_alike_are_told_to_a_backend_that_can_share(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = _Checking()
    monkeypatch.setattr("worker.engine.engine.choose_backend", lambda *_: backend)
    monkeypatch.setattr("batching.shared_prefixes._MIN_SAVED_TOKENS", 16)
    prefixes = [[7 * i % 500 for i in range(first, first + 40)] for first in (1, 50)]
    prompts = [prefixes[i % 2] + [i, 2 * i, 3 * i] for i in range(8)] + [[5, 6, 7]]
    sequences = [new_sequence(i, prompt, 20) for i, prompt in enumerate(prompts)]
    engine = Engine.start(settings_for(model_folder("llama"), lookahead=1))

    run = drive(engine, sequences)

    assert backend.num_saved[True] > 0
    assert backend.num_saved[False] > 0
    alone = Engine.start(settings_for(model_folder("llama"), prefix_reuse=False, lookahead=1))
    assert run.outputs == drive(alone, sequences).outputs
