"""Embeddings and classifications from a file of lines to a file of Results, with the real worker, against transformers
one text at a time."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.conftest import Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TEXT = "the queue holds the prompts"
LINES: list[dict[str, Any]] = [
    {"id": "plain", "input": TEXT},
    {"id": "twin", "input": TEXT},
    {"id": "short", "input": TEXT, "dimensions": 8},
    {"custom_id": "batch", "url": "/v1/embeddings", "body": {"input": "pulls them", "encoding_format": "base64"}},
    {"id": "several", "input": ["the worker", [5, 6, 7]]},
    {"id": "too-many", "input": TEXT, "dimensions": 65},
    {"id": "too-long", "input": "the " * 200},
    {"id": "generate", "prompt": TEXT},
]
CLASSIFY_LINES: list[dict[str, Any]] = [
    {"id": "plain", "kind": "classify", "input": TEXT},
    {"custom_id": "batch", "url": "/classify", "body": {"input": ["the worker", "pulls them"]}},
    {"id": "embed", "input": TEXT},
]


def save_model(folder: Path, auto_class: str) -> Path:
    """A random BERT that reads words, begins texts with [CLS] and ends them with [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from tests.engine.pooled_families import build

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *f"{TEXT} and worker pulls them".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    labels = {} if auto_class == "AutoModel" else {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    build("bert", auto_class, **labels).save_pretrained(folder)
    return folder


def run(start: Start, folder: Path, model: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, stderr = start("run", "lines.jsonl", "-o", "results.jsonl", "--model", model).finish()
    assert code == 0, stderr
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@torch.inference_mode()
def plain(model: Path, auto_class: str, text: str | list[int]) -> Any:
    """A normalised mean of the text's tokens, or its classes' probabilities."""
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(model)(text)["input_ids"] if isinstance(text, str) else text
    output = getattr(transformers, auto_class).from_pretrained(model).eval()(torch.tensor([ids]))
    if auto_class == "AutoModel":
        return torch.nn.functional.normalize(output.last_hidden_state[0].mean(dim=0), dim=0).numpy()
    return output.logits[0].softmax(dim=-1).numpy()


def test_embeddings_of_a_file_equal_transformers_one_at_a_time(start: Start, tmp_path: Path) -> None:
    model = save_model(tmp_path / "bert", "AutoModel")

    results = run(start, tmp_path, model, LINES)

    by_id = {(r["custom_id"], r["sample"]): r for r in results}
    expected = plain(model, "AutoModel", TEXT)
    assert by_id["plain", 0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert by_id["plain", 0]["usage"] == {"prompt_tokens": 7, "completion_tokens": 0}
    assert by_id["twin", 0]["embedding"] == by_id["plain", 0]["embedding"]
    assert by_id["twin", 0]["cached"]
    short = expected[:8] / np.linalg.norm(expected[:8])
    assert by_id["short", 0]["embedding"] == pytest.approx(short.tolist(), abs=1e-5)
    batch = np.frombuffer(base64.b64decode(by_id["batch", 0]["embedding"]), "<f4")
    assert batch == pytest.approx(plain(model, "AutoModel", "pulls them"), abs=1e-5)
    for sample, text in enumerate(LINES[4]["input"]):
        found = by_id["several", sample]["embedding"]
        assert found == pytest.approx(plain(model, "AutoModel", text).tolist(), abs=1e-5)
    errors = {name: r["error"]["code"] for (name, _), r in by_id.items() if r["error"]}
    assert errors == {
        "too-many": "invalid_dimensions",
        "too-long": "prompt_too_long",
        "generate": "unsupported_kind",
    }
    assert len(results) == len(LINES) + 1


def test_classifications_of_a_file_equal_transformers_one_at_a_time(start: Start, tmp_path: Path) -> None:
    auto_class = "AutoModelForSequenceClassification"
    model = save_model(tmp_path / "bert", auto_class)

    results = run(start, tmp_path, model, CLASSIFY_LINES)

    texts = [TEXT, "the worker", "pulls them"]
    for result, text in zip(results, texts, strict=False):
        expected = plain(model, auto_class, text)
        found = result["classification"]
        assert found["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert found["labels"] == ["bad", "good"]
        assert result["text"] == found["label"] == ["bad", "good"][int(expected.argmax())]
    assert results[3]["error"]["code"] == "unsupported_kind"
