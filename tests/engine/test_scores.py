"""Log-probabilities of prompt tokens, in every way a step can be made up, against a plain forward of one text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from protocol.frames import NewSequence
from tests.engine.families import CASES, FAMILIES, VARIANTS
from tests.engine.reference import Run, drive, new_sequence, random_prompts, settings_for
from worker.engine import scorer
from worker.engine.engine import Engine

TOLERANCE = 1e-4


@torch.inference_mode()
def plain_logprobs(folder: Path, prompts: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    """(tokens - 1, vocabulary) per prompt: of each next token, given all before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([p])).logits[0, :-1].log_softmax(dim=-1).numpy() for p in prompts]


def assert_scores(
    run: Run, seq_id: int, prompt: list[int], start: int, num_top: int, expected: npt.NDArray[np.float32]
) -> None:
    """Every token from `start` on exactly once and in order, as the plain forward has it."""
    parts = run.scores.get(seq_id, [])
    at = start
    for part in parts:
        assert (part.start, part.num_top) == (at, num_top)
        logprobs, ranks = np.frombuffer(part.logprobs, "<f4"), np.frombuffer(part.ranks, "<i4")
        top_ids = np.frombuffer(part.top_ids, "<i4").reshape(len(logprobs), num_top)
        top_logprobs = np.frombuffer(part.top_logprobs, "<f4").reshape(len(logprobs), num_top)
        for i, logprob in enumerate(logprobs):
            row, token = expected[at - 1], prompt[at]
            assert abs(logprob - row[token]) < TOLERANCE
            assert np.abs(top_logprobs[i] - np.sort(row)[::-1][:num_top]).max(initial=0) < TOLERANCE
            assert np.abs(top_logprobs[i] - row[top_ids[i]]).max(initial=0) < TOLERANCE
            is_near = np.abs(row - row[token]) < TOLERANCE
            assert abs(ranks[i] - 1 - (row > row[token]).sum()) <= is_near.sum() - 1
            at += 1
    assert at == len(prompt)


def mixed(prompts: list[list[int]]) -> tuple[list[NewSequence], list[tuple[int, int]]]:
    """Whole texts, continuations, texts that also go on, and plain generation, one after the other."""
    sequences, asked = [], []
    for i, prompt in enumerate(prompts):
        start, num_top, max_tokens = [(1, 0, 0), (max(len(prompt) - 5, 1), 3, 0), (1, 5, 12), (-1, 0, 9)][i % 4]
        sequences.append(new_sequence(i, prompt, max_tokens, score_from=start, num_top=num_top))
        asked.append((start, num_top))
    return sequences, asked


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_scores_equal_a_plain_forward(
    family: str, variant: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "CPU_PIECE_BYTES", 5 * 4 * 512)  # five rows of logits at a time
    folder = model_folder(family)
    prompts = [p for p in random_prompts(25, seed=8, max_len=FAMILIES[family].max_prompt) if len(p) > 1]
    expected = plain_logprobs(folder, prompts)
    sequences, asked = mixed(prompts)
    engine = Engine.start(settings_for(folder, **VARIANTS[variant].settings))

    run = drive(engine, sequences, VARIANTS[variant].wave)

    for i, (prompt, (start, num_top)) in enumerate(zip(prompts, asked, strict=True)):
        if start < 0:
            assert i not in run.scores
        else:
            assert_scores(run, i, prompt, start, num_top, expected[i])
    assert run.reasons == dict.fromkeys(range(len(prompts)), "length")


def test_scored_texts_generate_what_unscored_ones_do(model_folder: Callable[[str], Path]) -> None:
    prompts = random_prompts(8, seed=4)
    settings = settings_for(model_folder("qwen3"), max_batch_tokens=19)
    plain = drive(Engine.start(settings), [new_sequence(i, p, 10) for i, p in enumerate(prompts)])

    scored = drive(Engine.start(settings), [new_sequence(i, p, 10, score_from=1) for i, p in enumerate(prompts)])

    assert scored.outputs == plain.outputs


def test_logits_are_made_in_pieces_of_bounded_size(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "CPU_PIECE_BYTES", 16 * 4 * 512)
    engine = Engine.start(settings_for(model_folder("llama")))
    sizes: list[int] = []
    model: Any = engine.loaded.model
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, arguments, logits: sizes.append(logits.shape[-2]))

    drive(engine, [new_sequence(i, p, 0, score_from=1) for i, p in enumerate(random_prompts(9, seed=6))])

    assert max(sizes) == 16
    assert sum(sizes) == sum(len(p) - 1 for p in random_prompts(9, seed=6))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_context_is_computed_once_and_every_continuation_scored(
    family: str, lookahead: int, model_folder: Callable[[str], Path]
) -> None:
    """As multiple-choice evaluation sends them; contexts end within a block, and one is shorter than any."""
    contexts = [random_prompts(1, seed=i, max_len=60)[0] + [7] * num for i, num in ((31, 5), (32, 30), (33, 1))]
    contexts[2] = contexts[2][:9]
    prompts = [context + end for context in contexts for end in random_prompts(4, seed=len(context), max_len=6)]
    starts = [len(context) for context in contexts for _ in range(4)]
    expected = plain_logprobs(model_folder(family), prompts)
    engine = Engine.start(settings_for(model_folder(family), lookahead=lookahead))

    sequences = [
        new_sequence(i, prompt, 0, score_from=start, num_top=2)
        for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True))
    ]
    run = drive(engine, sequences, wave=12)

    for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        assert_scores(run, i, prompt, start, 2, expected[i])
    assert run.num_prefix_hit_tokens == sum(3 * (len(context) - 1) for context in contexts)
