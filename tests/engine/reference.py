"""Tiny random models, what transformers says about them one prompt at a time, and how an engine is driven in a test."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.frames import NewSequence, TokenScores
from protocol.settings import EngineSettings
from tests.engine.families import FAMILIES, VOCAB_SIZE
from worker.engine import attention
from worker.engine.engine import Engine
from worker.engine.probe import WholeStep

#: Where the reference's best two logits are closer than this, float32 rounding may decide.
MIN_GAP = 1e-4
#: Models are adopted as they are.
UNFUSED = EngineSettings(device="cpu", dtype="float32", fuse_weights=False)


def build_model(family: str) -> Any:
    """A tiny random model of that family."""
    return FAMILIES[family].build()


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    """Of one text, by a model that has been adopted: (1, tokens, V)."""
    with attention.running(WholeStep()):
        logits: Tensor = model(input_ids=torch.arange(40).unsqueeze(0), use_cache=False).logits
    return logits


def random_prompts(num: int, seed: int, max_len: int = 60, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, max_len))] for _ in range(num)]


@dataclass
class Reference:
    """Greedy outputs of transformers' `generate`, and at each position the gap between the best two logits."""

    prompts: list[list[int]]
    outputs: list[list[int]] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def num_distinct(self) -> int:
        return len({token for output in self.outputs for token in output})


def make_reference(folder: Path, prompts: list[list[int]], num_tokens: int) -> Reference:
    from transformers import AutoModelForCausalLM

    # "eager" computes every family's terms; SDPA leaves a softcap out.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return reference_of(model, prompts, num_tokens)


@torch.inference_mode()
def reference_of(model: Any, prompts: list[list[int]], num_tokens: int) -> Reference:
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    reference = Reference(prompts)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, num_beams=1
        )
        logits = model(text).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        reference.outputs.append(text[0, len(prompt) :].tolist())
        reference.gaps.append((best[:, 0] - best[:, 1]).tolist())
    return reference


def assert_equal_where_decided(outputs: Sequence[list[int]], reference: Reference) -> None:
    """Token for token up to the first position that rounding may decide; at most 1 % may lie behind such positions."""
    num_excluded = 0
    for output, expected, gaps in zip(outputs, reference.outputs, reference.gaps, strict=True):
        end = next((i for i, gap in enumerate(gaps) if gap < MIN_GAP), len(gaps))
        assert output[:end] == expected[:end]
        assert len(output) == len(expected)
        num_excluded += len(expected) - end
    assert num_excluded <= 0.01 * reference.num_tokens


def new_sequence(
    seq_id: int,
    prompt: list[int],
    max_tokens: int,
    *,
    stop: tuple[int, ...] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    sample: int = 0,
    score_from: int = -1,
    num_top: int = 0,
) -> NewSequence:
    token_ids = np.array(prompt, dtype="<i4").tobytes()
    return NewSequence(
        seq_id, token_ids, max_tokens, stop, temperature, top_p, top_k, seed, sample, score_from, num_top
    )


@dataclass
class Run:
    """What an engine gave: outputs and finish reasons by seq_id, and how often it preempted."""

    outputs: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    scores: dict[int, list[TokenScores]] = field(default_factory=dict)
    logprobs: dict[int, list[bytes]] = field(default_factory=dict)
    num_steps: int = 0
    max_step_tokens: int = 0
    num_prefix_hit_tokens: int = 0


def drive(engine: Engine, sequences: Sequence[NewSequence], wave: int = 4, steps_between: int = 3) -> Run:
    """Add `wave` Sequences, run some steps, add the next: so that all lengths and stages meet in a step."""
    run, pending = Run(), list(sequences)
    while pending or engine.has_work:
        for new in pending[:wave]:
            engine.add(new)
            run.outputs[new.seq_id] = []
        del pending[:wave]
        for _ in range(steps_between):
            collect(engine, run)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return run


def collect(engine: Engine, run: Run) -> None:
    """One step's tokens and finishes into `run`."""
    frame = engine.step()
    if frame is None:
        return
    run.num_steps += 1
    for seq_id, piece in frame.logprobs:
        run.logprobs.setdefault(seq_id, []).append(piece)
    run.max_step_tokens = max(run.max_step_tokens, frame.num_scheduled_tokens)
    run.num_prefix_hit_tokens += frame.num_prefix_hit_tokens
    seq_ids, token_ids = np.frombuffer(frame.seq_ids, "<i8"), np.frombuffer(frame.token_ids, "<i4")
    for seq_id, token_id in zip(seq_ids.tolist(), token_ids.tolist(), strict=True):
        run.outputs.setdefault(seq_id, []).append(token_id)
    for part in frame.scores:
        assert part.seq_id not in run.reasons
        run.scores.setdefault(part.seq_id, []).append(part)
    for seq_id, reason, num_tokens in frame.finished:
        assert num_tokens == len(run.outputs[seq_id])
        assert seq_id not in run.reasons
        run.reasons[seq_id] = reason


def settings_for(folder: Path, **changes: Any) -> EngineSettings:
    fields: dict[str, Any] = {"model": str(folder), "device": "cpu", "kv_tokens": 8192, "num_threads": 1}
    fields["admission"] = "headroom"  # so that a tiny cache preempts, though all lengths are known
    return EngineSettings(**{**fields, **changes})
