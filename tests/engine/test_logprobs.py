"""Log-probabilities of output tokens against a plain forward of the whole text, whatever shaped the draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from protocol.frames import LogitTerms
from tests.engine.reference import Run, drive, new_sequence, random_prompts, settings_for
from worker.engine.engine import Engine

TOLERANCE = 1e-4
NUM_TOKENS = 40


@torch.inference_mode()
def assert_logprobs(run: Run, folder: Path, prompts: list[list[int]], asked: list[int | None]) -> None:
    """Every output token's log-probability and alternatives as transformers has them, and their sum."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for seq_id, (prompt, num_top) in enumerate(zip(prompts, asked, strict=True)):
        outputs = run.outputs[seq_id]
        if num_top is None:
            assert seq_id not in run.logprobs
            continue
        text = torch.tensor([prompt + outputs])
        plain = model(text).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).numpy()
        pieces = run.logprobs[seq_id]
        assert len(pieces) == len(outputs)
        total = 0.0
        for row, token, piece in zip(plain, outputs, pieces, strict=True):
            logprob = np.frombuffer(piece[:4], "<f4")[0]
            top_ids = np.frombuffer(piece[4 : 4 + 4 * num_top], "<i4")
            top = np.frombuffer(piece[4 + 4 * num_top :], "<f4")
            assert len(top_ids) == len(top) == num_top
            assert abs(logprob - row[token]) < TOLERANCE
            assert np.abs(top - np.sort(row)[::-1][:num_top]).max(initial=0) < TOLERANCE
            assert np.abs(top - row[top_ids]).max(initial=0) < TOLERANCE
            total += logprob
        assert abs(total - plain[np.arange(len(outputs)), outputs].sum()) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"lookahead": 0},
        {"lookahead": 1},
        {"lookahead": 1, "kv_tokens": 144, "max_batch_tokens": 17},
        {"layout": "padded"},
    ],
    ids=["plain", "lookahead", "preempted", "padded"],
)
def test_logprobs_are_the_models_own_before_terms_and_temperature(
    changes: dict[str, Any], model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder("llama")
    prompts = random_prompts(16, seed=21, max_len=40)
    asked = [[0, 1, 5, 20, None][i % 5] for i in range(len(prompts))]
    shapes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.4, "min_p": 0.01},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"terms": LogitTerms(repetition_penalty=1.6, logit_bias={5: 9.0, 6: -100.0}, min_tokens=3)},
    ]
    sequences = [
        msgspec.structs.replace(
            new_sequence(i, prompt, NUM_TOKENS, seed=i), logprobs=num_top, **shapes[i % len(shapes)]
        )
        for i, (prompt, num_top) in enumerate(zip(prompts, asked, strict=True))
    ]
    engine = Engine.start(settings_for(folder, **changes))

    run = drive(engine, sequences, wave=8)

    assert_logprobs(run, folder, prompts, asked)
    if "kv_tokens" in changes:
        assert engine.scheduler.num_preemptions > 0


def test_logprobs_change_no_token(model_folder: Callable[[str], Path]) -> None:
    sequences = [
        new_sequence(i, prompt, NUM_TOKENS, temperature=1.0 * (i % 2), seed=i)
        for i, prompt in enumerate(random_prompts(8, seed=22))
    ]
    engine = Engine.start(settings_for(model_folder("qwen3")))

    with_them = drive(engine, [msgspec.structs.replace(new, logprobs=3) for new in sequences])

    assert with_them.outputs == drive(engine, sequences).outputs
