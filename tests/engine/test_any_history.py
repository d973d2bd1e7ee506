"""Whatever happens to a Sequence on its way, it gets the tokens and scores that it gets alone.

Prompts that begin alike and part, samples of one prompt, scores, penalties, draws and stop tokens meet in steps of any
size; meanwhile some are cancelled, some become more or less urgent, blocks run out, and memory falls short.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.scheduler import Scheduler, StepPlan
from protocol.frames import LogitTerms, NewSequence, TokenScores
from tests.engine.families import VOCAB_SIZE
from tests.engine.reference import Run, collect, drive, new_sequence, settings_for
from worker.engine.engine import Engine
from worker.engine.loader import load_model
from worker.engine.runner import StepHandle

NUM_SEQUENCES = 30
#: Samples of the Sequence before them.
SAMPLES = (11, 12, 21)


class Alone:
    """What each Sequence gets by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded = load_model(folder, settings_for(folder))
        self.sequences = make_sequences()
        self.run = Run()
        engine = self.start(prefix_reuse=False, attention="sdpa")
        for new in self.sequences:
            one = drive(engine, [new])
            self.run.outputs |= one.outputs
            self.run.scores |= one.scores
            self.run.reasons |= one.reasons

    def start(self, **changes: Any) -> Engine:
        return Engine(self.loaded, settings_for(self.folder, **changes))


@pytest.fixture(scope="module")
def alone(model_folder: Callable[[str], Path]) -> Alone:
    return Alone(model_folder("llama"))


def make_sequences() -> list[NewSequence]:
    rng = random.Random(4)
    ids = [rng.randrange(VOCAB_SIZE) for _ in range(70)]
    stems = [ids[:16], ids[:33], [*ids[:40], *ids[:30]], ids]
    sequences: list[NewSequence] = []
    for i in range(NUM_SEQUENCES):
        prompt = stems[i % 4] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 1, 5, 20)))]
        if i in SAMPLES:
            sequences.append(msgspec.structs.replace(sequences[-1], seq_id=i, sample=sequences[-1].sample + 1))
            continue
        is_scored, draws = i % 5 == 1, i % 3 == 2
        new = new_sequence(
            i,
            prompt,
            0 if is_scored else rng.randint(1, 14),
            stop=() if is_scored else tuple(rng.sample(range(VOCAB_SIZE), rng.choice((0, 60)))),
            temperature=1.0 if draws else 0.0,
            top_k=rng.choice((0, 30)) if draws else 0,
            seed=rng.getrandbits(62),
            score_from=len(stems[i % 4]) // 2 if is_scored else -1,
            num_top=2 if is_scored else 0,
        )
        terms = LogitTerms(1.3, 0.5, 0.5, {7: 2.0}) if i % 7 == 3 else None
        sequences.append(msgspec.structs.replace(new, terms=terms, priority=i % 3))
    return sequences


@settings(max_examples=20, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {
            "max_batch_tokens": st.sampled_from((3, 16, 50, 2048)),
            "max_num_seqs": st.sampled_from((1, 4, 64)),
            "kv_tokens": st.sampled_from((112, 256, 8192)),
            "lookahead": st.integers(0, 1),
            "prefix_reuse": st.booleans(),
            "admission": st.sampled_from(("auto", "headroom", "peak")),
            "attention": st.sampled_from(("sdpa", "sparse")),
        }
    ),
    seed=st.integers(0, 2**32),
    num_failures=st.integers(0, 2),
)
def test_every_sequence_gets_what_it_gets_alone(
    alone: Alone, changes: dict[str, Any], seed: int, num_failures: int
) -> None:
    rng, run, engine = random.Random(seed), Run(), alone.start(**changes)
    _fail(engine, num_failures if changes["max_batch_tokens"] > 8 else 0, rng)
    pending, cancelled = list(alone.sequences), set()
    while pending or engine.has_work:
        for _ in range(rng.randint(0, 6)):
            if pending:
                _add(engine, pending.pop(0), run)
        for _ in range(rng.randint(1, 4)):
            collect(engine, run)
        chosen = rng.randrange(NUM_SEQUENCES)
        if rng.random() < 0.1 and engine.scheduler.get(chosen) is not None:
            engine.finish(chosen, 0)
            cancelled.add(chosen)
        engine.change_priority(rng.randrange(NUM_SEQUENCES), rng.randrange(3))

    for seq_id in set(range(NUM_SEQUENCES)) - cancelled:
        assert run.outputs[seq_id] == alone.run.outputs[seq_id]
        assert run.reasons[seq_id] == alone.run.reasons[seq_id]
        _assert_same_scores(run.scores.get(seq_id, []), alone.run.scores.get(seq_id, []))
    scheduler = engine.scheduler
    assert isinstance(scheduler, Scheduler)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert scheduler.prefixes.num_groups == 0


def _add(engine: Engine, new: NewSequence, run: Run) -> None:
    if new.seq_id in SAMPLES and engine.scheduler.get(new.seq_id - 1) is not None:
        new = msgspec.structs.replace(new, token_ids=b"", sample_of=new.seq_id - 1)
    engine.add(new)
    run.outputs[new.seq_id] = []


def _fail(engine: Engine, num_failures: int, rng: random.Random) -> None:
    """So many launches find no memory, before or behind what they compute."""
    launch, fails = engine.runner.launch, {rng.randrange(30): rng.random() < 0.5 for _ in range(num_failures)}
    num_launches = 0

    def maybe(plan: StepPlan) -> StepHandle:
        nonlocal num_launches
        num_launches += 1
        is_late = fails.get(num_launches)
        handle = launch(plan) if is_late is not False else None
        if handle is None or is_late is not None:
            raise torch.OutOfMemoryError
        return handle

    engine.runner.launch = maybe  # type: ignore[method-assign]


def _assert_same_scores(parts: list[TokenScores], expected: list[TokenScores]) -> None:
    """In pieces of other sizes, perhaps, but in order and with nothing twice."""
    starts = [part.start for part in parts]
    sizes = [len(part.logprobs) // 4 for part in parts]
    assert starts == [start + sum(sizes[:i]) for i, start in enumerate(starts[:1] * len(starts))]
    for name in ("logprobs", "top_logprobs"):
        found, wanted = (np.frombuffer(b"".join(getattr(p, name) for p in of), "<f4") for of in (parts, expected))
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max(initial=0) < 1e-4
