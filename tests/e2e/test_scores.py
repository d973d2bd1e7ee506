"""Scores from a file of lines to a file of Results, with the real worker, against a plain forward of the model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LINES: list[dict[str, Any]] = [
    {"id": "pair", "context": "the queue holds ", "continuation": "the prompts", "prompt_logprobs": 2},
    {"id": "again", "context": "the queue holds", "continuation": " the prompts", "prompt_logprobs": 2},
    {"id": "twin", "context": "the queue holds ", "continuation": "the prompts", "prompt_logprobs": 2},
    {"id": "text", "kind": "score", "text": "and the worker pulls them"},
    {"id": "prompt", "prompt": "the worker pulls", "max_tokens": 3, "prompt_logprobs": 0, "temperature": 0},
    {"id": "empty", "context": "the queue", "continuation": ""},
    {"id": "wrong", "context": "the queue", "continuation": " holds", "temperature": 0.5},
]


@torch.inference_mode()
def plain_scores(folder: Path, context: str, text: str) -> list[tuple[int, float]]:
    """(token id, log-probability) of every token behind those of the context."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, start = tokenizer(text)["input_ids"], max(len(tokenizer(context)["input_ids"]), 1)
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return [(ids[i], float(logprobs[i - 1, ids[i]])) for i in range(start, len(ids))]


def test_scores_of_a_file_equal_a_plain_forward(start: Start, model: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))

    code, _, stderr = start("run", "lines.jsonl", "-o", "results.jsonl", "--model", model).finish()

    assert code == 0, stderr
    results = {r["custom_id"]: r for r in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    expected = {
        "pair": plain_scores(model, "the queue holds", "the queue holds the prompts"),
        "text": plain_scores(model, "", "and the worker pulls them"),
        "prompt": plain_scores(model, "", "the worker pulls"),
    }
    for name, tokens in expected.items():
        score = results[name]["score"]
        assert [t["token_id"] for t in score["tokens"]] == [token for token, _ in tokens]
        assert [t["logprob"] for t in score["tokens"]] == pytest.approx([value for _, value in tokens], abs=1e-4)
        assert score["logprob"] == pytest.approx(sum(value for _, value in tokens), abs=1e-3)
        assert score["num_tokens"] == len(tokens)
        assert score["is_greedy"] == all(t["rank"] == 1 for t in score["tokens"])
    assert "".join(t["token"] for t in results["pair"]["score"]["tokens"]) == " the prompts"
    assert all(len(t["top_logprobs"]) == 2 for t in results["pair"]["score"]["tokens"])
    assert results["pair"]["usage"]["completion_tokens"] == 0
    # The same pair in other company: how a step's products are cut up may move the last digit.
    pair, again = results["pair"]["score"], results["again"]["score"]
    assert [t["token_id"] for t in again["tokens"]] == [t["token_id"] for t in pair["tokens"]]
    assert again["logprob"] == pytest.approx(pair["logprob"], abs=1e-5)
    assert results["twin"]["score"] in (pair, again)
    assert results["twin"]["cached"]
    assert results["prompt"]["usage"]["completion_tokens"] == 3
    assert results["empty"]["error"]["code"] == "empty_continuation"
    assert results["wrong"]["error"]["code"] == "unsupported_parameter"
