"""The bundled model as transformers alone sees it, on the CPU; none of our packages is involved."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[2] / "models" / "millrace-tiny"
MAX_WEIGHT_BYTES = 8_000_000
MIN_PARSING_SHARE = 0.7

AWKWARD_TEXTS = [
    "",
    " ",
    " leading and trailing  ",
    "\n\n\ttabs\r\nand\rreturns\n   \n",
    "naïve e\u0301 \u00e9 \u2126 \ufb01",
    "日本語のテキスト、한국어, العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x01\x7f\x80\ufeff\u2028\u00a0\U0010ffff",
    "don't , . ! n't 0x1F 1234567",
    "def f(x):\n    return x\n\n\n        # indented\n",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def heldout_prompts() -> list[str]:
    lines = (FOLDER / "heldout_functions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def test_weights_fit_into_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= MAX_WEIGHT_BYTES


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_holds_every_byte(tokenizer: Any) -> None:
    # Every code point below 256 and every lead byte of longer sequences, none of which may become "unknown".
    text = "".join(map(chr, range(256))) + "".join(
        chr(point) for point in range(0x800, 0x10FFFF, 0x400) if point < 0xD800
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text
    alphabet = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(alphabet) == 256


def test_tokenizer_fits_the_model(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_tokenizer_adds_nothing_to_a_prompt(tokenizer: Any) -> None:
    assert tokenizer.encode("x") == tokenizer.encode("x", add_special_tokens=False)


def test_chat_template_ends_with_the_generation_prompt(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What does `len` do?"},
        {"role": "assistant", "content": "It counts."},
        {"role": "user", "content": "What?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\nWhat does `len` do?<|im_end|>\n"
        "<|im_start|>assistant\nIt counts.<|im_end|>\n"
        "<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_template_markers_are_single_tokens(tokenizer: Any) -> None:
    markers = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
    assert [len(tokenizer.encode(marker)) for marker in markers] == [1, 1, 1, 1]


def test_generation_config_states_greedy_decoding_and_both_ends(tokenizer: Any) -> None:
    stated = json.loads((FOLDER / "generation_config.json").read_text("utf-8"))
    assert stated["do_sample"] is False
    assert stated["max_new_tokens"] == 128
    assert stated["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert stated["pad_token_id"] == tokenizer.pad_token_id


def test_heldout_functions_are_fifty_different_ones() -> None:
    assert len(set(heldout_prompts())) == 50


def test_heldout_completions_parse_as_python(tokenizer: Any, model: Any) -> None:
    prompts = heldout_prompts()
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    # Greedy, at most 128 new tokens: the folder's own generation_config.
    output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = output[:, batch["input_ids"].shape[1] :]
    completions = tokenizer.batch_decode(rows, skip_special_tokens=True)
    trimmed = [completion[: completion.rfind("\n") + 1] for completion in completions]
    num_parsing = sum(
        # A completion of nothing would let the prompt pass on its own.
        bool(completion.strip()) and parses(prompt + completion)
        for prompt, completion in zip(prompts, trimmed, strict=True)
    )
    assert num_parsing >= MIN_PARSING_SHARE * len(prompts), f"{num_parsing} of {len(prompts)} parse"
