"""The decode step that is captured on CUDA, run as it is: filled up with rows of nobody, asking the host nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from tests.engine.reference import Reference, assert_equal_where_decided, drive, new_sequence, settings_for
from worker.engine.attention import AttentionStep, AttentionTerms
from worker.engine.backends.sdpa import SDPABackend
from worker.engine.decode_step import Decoded, graph_sizes
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

    is_capturable = True

    def decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionStep, terms: AttentionTerms
    ) -> Tensor:
        if step.decode_kv_lens is None:
            object.__setattr__(step, "decode_kv_lens", step.decode_lens.numpy().astype("int64"))
        return super().decode(query, k_cache, v_cache, step, terms)


@dataclass
class _Rerun:
    """A graph that does again what it was made of, and leaves it where it was the first time."""

    run: Callable[[], Decoded]
    decoded: Decoded
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        again = self.run()
        for name in ("logits", "positions", "tokens"):
            getattr(self.decoded, name).copy_(getattr(again, name))


class _Pool:
    """Has room for graphs of so many rows at most."""

    def __init__(self, most_rows: int) -> None:
        self.most_rows = most_rows
        self.graphs: dict[int, _Rerun] = {}

    def capture(self, run: Callable[[], Decoded]) -> tuple[_Rerun, Decoded] | None:
        decoded = run()
        if (size := len(decoded.positions)) > self.most_rows:
            return None
        self.graphs[size] = _Rerun(run, decoded)
        return self.graphs[size], decoded


@pytest.mark.parametrize("most_rows", [1000, 4, 0])
def test_decode_gives_the_same_text_whether_all_or_some_or_no_graphs_find_room(
    most_rows: int,
    model_folder: Callable[[str], Path],
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, pool = reference("qwen3"), _Pool(most_rows)
    monkeypatch.setattr("worker.engine.engine.choose_backend", lambda *_: _Blind())
    monkeypatch.setattr("worker.engine.engine.triton_obstacle", lambda _: None)
    monkeypatch.setattr("worker.engine.engine.GraphPool", lambda _: pool)
    monkeypatch.setattr(RowState, "draw", lambda state, logits, rows, positions: torch.argmax(logits, dim=-1))
    # Without lookahead, since on a CPU a step's tokens lie where the next replay puts its own.
    engine = Engine.start(settings_for(model_folder("qwen3"), lookahead=0, max_num_seqs=24))
    sequences = [new_sequence(i, prompt, 40) for i, prompt in enumerate(expected.prompts)]
    sequences[3] = msgspec.structs.replace(sequences[3], logprobs=2)  # drawn outside the graph, from its logits

    outcome = drive(engine, sequences)

    assert_equal_where_decided([outcome.outputs[i] for i in range(len(expected.prompts))], expected)
    assert len(b"".join(outcome.logprobs[3])) == 40 * 4 * (1 + 2 * 2)
    num_replays = {size: graph.num_replays for size, graph in pool.graphs.items()}
    assert list(num_replays) == [size for size in reversed(graph_sizes(24)) if size <= most_rows]
    telemetry = engine.telemetry
    assert telemetry.num_captured == sum(num_replays.values())
    assert 0 < sum(num_replays.values()) < telemetry.num_steps if num_replays else telemetry.num_captured == 0
    assert (telemetry.num_padding > 0) == (most_rows == 1000)
    told = [line for line in caplog.messages if "the memory has no room for" in line]
    assert len(told) == (most_rows < 1000)
    assert all(f"decode of more than {most_rows} rows" in line for line in told)


class _Checking(_Blind):
    """Attends as ever, and checks what it is told of shared prefixes."""

    shares_prefixes = True

    def __init__(self) -> None:
        self.num_saved = {True: 0, False: 0}

    def decode(
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
        return super().decode(query, k_cache, v_cache, step, terms)


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
