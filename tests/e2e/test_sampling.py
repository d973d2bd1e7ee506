"""Sampling parameters and token ids from a file of lines to a file of Results, with the real worker."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TEXT = "the queue holds the"
GREEDY = {"temperature": 0, "max_tokens": 8}
FORCED = {"logit_bias": {"7": 100}, "stop_token_ids": [7], "ignore_eos": True}

CONTEXT = 64
LONG = [5 + number % 7 for number in range(100)]


def lines(ids: list[int]) -> list[dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": 3, **GREEDY}
    return [
        {"id": "text", "prompt": TEXT, "logprobs": 2, **GREEDY},
        {"id": "ids", "prompt": ids, "logprobs": 2, **GREEDY},
        {"custom_id": "chat", "url": "/v1/chat/completions", "body": body},
        {"id": "forced", "prompt": TEXT, **FORCED, **GREEDY},
        {"id": "held off", "prompt": TEXT, "min_tokens": 3, **FORCED, **GREEDY},
        {"id": "drawn", "prompt": TEXT, "seed": 5, "n": 3, "min_p": 0.01, "repetition_penalty": 1.2, "logprobs": 0},
        {"id": "outside", "prompt": [5, 512]},
        {"id": "too long", "prompt": LONG, **GREEDY},
        {"id": "cut", "prompt": LONG, "too_long": "truncate-left", "n": 2, "seed": 3, "max_tokens": 8},
        {"id": "end", "prompt": LONG[-CONTEXT + 8 :], "n": 2, "seed": 3, "max_tokens": 8},
        {"id": "whole", "prompt": ids, "too_long": "truncate-left", **GREEDY},
        {"id": "impossible", "prompt": TEXT, "min_tokens": 17},
    ]


@torch.inference_mode()
def plain_logprobs(folder: Path, prompt: list[int], num_tokens: int) -> list[tuple[int, float]]:
    """Greedy tokens one by one, each with its log-probability."""
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), list(prompt)
    found = []
    for _ in range(num_tokens):
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        ids.append(int(logprobs.argmax()))
        found.append((ids[-1], float(logprobs.max())))
    return found


def test_sampling_parameters_of_a_file_reach_its_results(start: Start, model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT)["input_ids"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(ids)))

    code, _, stderr = start(
        "run", "lines.jsonl", "-o", "results.jsonl", "--model", model, engine_max_model_len=str(CONTEXT)
    ).finish()

    assert code == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    results = {(row["custom_id"], row["sample"]): row for row in rows}
    text, by_ids, chat = (results[name, 0] for name in ("text", "ids", "chat"))

    expected = plain_logprobs(model, ids, 8)
    content = text["logprobs"]["content"]
    assert text["text"] == tokenizer.decode([token for token, _ in expected])
    assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace") == text["text"]
    assert [token["logprob"] for token in content] == pytest.approx([value for _, value in expected], abs=1e-4)
    # Greedy decoding says the most likely token.
    assert all(token["top_logprobs"][0]["bytes"] == token["bytes"] for token in content)
    assert {len(token["top_logprobs"]) for token in content} == {2}
    assert (by_ids["text"], by_ids["logprobs"]) == (text["text"], text["logprobs"])
    assert {len(token["top_logprobs"]) for token in chat["logprobs"]["content"]} == {3}

    forced, held_off = results["forced", 0], results["held off", 0]
    assert (forced["text"], forced["finish_reason"], forced["usage"]["completion_tokens"]) == ("", "stop", 1)
    assert (held_off["finish_reason"], held_off["usage"]["completion_tokens"]) == ("stop", 4)
    assert "logprobs" not in forced
    assert forced["params"]["logit_bias"] == {"7": 100.0}
    assert forced["params"]["stop_token_ids"] == [7]

    drawn = [results["drawn", sample] for sample in range(3)]
    assert len({row["text"] for row in drawn}) == 3
    for row in drawn:
        assert len(row["logprobs"]["content"]) == row["usage"]["completion_tokens"] == 16
        assert all(math.isfinite(token["logprob"]) for token in row["logprobs"]["content"])
        assert (row["params"]["min_p"], row["params"]["repetition_penalty"]) == (0.01, 1.2)

    assert results["too long", 0]["error"]["code"] == "prompt_too_long"
    cut = [results["cut", sample] for sample in range(2)]
    assert [(row["usage"]["prompt_tokens"], row["params"]["truncated_tokens"]) for row in cut] == [(56, 44)] * 2
    assert [row["text"] for row in cut] == [results["end", sample]["text"] for sample in range(2)]
    assert results["whole", 0]["text"] == text["text"]
    assert "truncated_tokens" not in results["whole", 0]["params"]

    assert results["outside", 0]["error"] == {
        "code": "invalid_token",
        "message": "prompt has the token id 512: this model's are from 0 to 511",
    }
    assert results["impossible", 0]["error"]["code"] == "invalid_parameter"
