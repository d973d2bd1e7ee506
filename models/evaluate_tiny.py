"""Measures the bundled model on text it never saw: bits per byte, and how often a completed function parses.

Run as `python models/evaluate_tiny.py [FOLDER] [--corpus FILE]`; the last line is one JSON object.
"""

import argparse
import ast
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Completion lengths in tokens. A greedy completion's beginning does not depend on its limit, so one run serves all.
COMPLETION_LIMITS = (96, 128, 256)
KINDS = ("module", "function", "chat")
ROWS_PER_BATCH = 16


def document_text(tokenizer: Any, document: corpus.Document) -> str:
    if not document.messages:
        return document.text
    rendered: str = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
    return rendered


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Returns the bits needed per byte of UTF-8, each text on its own behind one beginning-of-text token.

    Texts past the context are cut there; markup of the chat template counts as text.
    """
    max_tokens: int = model.config.max_position_embeddings
    rows = [row[: max_tokens - 1] for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    num_bytes = sum(len(tokenizer.decode(row).encode()) for row in rows)
    rows.sort(key=len)
    nats = 0.0
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        width = max(map(len, batch))
        # int64 (rows, width); the padding is on the right, where a causal model never looks back at it.
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in batch], device=model.device)
        ids = torch.cat([targets.new_full((len(batch), 1), tokenizer.bos_token_id), targets[:, :-1]], dim=1)
        logits = model(input_ids=ids.clamp(min=0)).logits.float()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return nats / math.log(2) / num_bytes


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Completes the prompts greedily in one left-padded batch; ends each completion before its first end token."""
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    pad: int = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"), pad}
    completions = output[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in completions]


def trim(completion: str) -> str:
    """Cuts a completion behind its last full line."""
    return completion[: completion.rfind("\n") + 1]


def parses_with_completion(prompt: str, completion: str) -> bool:
    """Says whether the prompt and the trimmed completion are Python. An empty completion counts as a failure."""
    trimmed = trim(completion)
    if not trimmed.strip():
        return False
    try:
        ast.parse(prompt + trimmed)
    except (SyntaxError, ValueError):
        return False
    return True


def parse_rates(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    completions = complete(model, tokenizer, prompts, max(COMPLETION_LIMITS))
    rates: dict[str, Any] = {"num_functions": len(prompts), "num_parsing": {}, "num_ended": {}}
    for limit in COMPLETION_LIMITS:
        texts = [tokenizer.decode(row[:limit]) for row in completions]
        parsing = [parses_with_completion(*pair) for pair in zip(prompts, texts, strict=True)]
        rates["num_parsing"][limit] = sum(parsing)
        rates["num_ended"][limit] = sum(len(row) < limit for row in completions)
    return rates


def evaluate(folder: Path, documents: Sequence[corpus.Document], device: str, split: str = "heldout") -> dict[str, Any]:
    """Loads the folder as any user would, in float32, and measures one split; the functions are always held-out."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    figures: dict[str, Any] = {"split": split, "bits_per_byte": {}}
    for kind in KINDS:
        texts = [document_text(tokenizer, doc) for doc in documents if doc.split == split and doc.kind == kind]
        figures["bits_per_byte"][kind] = round(bits_per_byte(model, tokenizer, texts), 4)
        print(f"{kind}: {figures['bits_per_byte'][kind]} bits per byte over {len(texts)} documents", flush=True)
    lines = (folder / "heldout_functions.jsonl").read_text("utf-8").splitlines()
    figures |= parse_rates(model, tokenizer, [json.loads(line)["prompt"] for line in lines])
    return figures


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "millrace-tiny")
    parser.add_argument("--corpus", type=Path, help="corpus file; gathered from this interpreter when absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--split", choices=("validation", "heldout"), default="heldout")
    options = parser.parse_args(arguments)
    print(json.dumps(evaluate(options.folder, corpus.load(options.corpus), options.device, options.split)))


if __name__ == "__main__":
    main(sys.argv[1:])
