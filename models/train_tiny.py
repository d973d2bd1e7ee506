"""Trains the bundled model `models/millrace-tiny/` from nothing: corpus, tokenizer, weights, folder.

Run as `python models/train_tiny.py --device cuda --steps N` (or `--minutes M`); the last line is one JSON object.
Letters of tensor shapes: B rows of a batch, T tokens of a row.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import evaluate_tiny
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT, TURN_START, TURN_END, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PADDING)
MAX_NEW_TOKENS = 128

#: Words with their leading space, runs of digits no longer than three, punctuation, indentation. A line's end stands
#: alone: merged with the indentation behind it, a prompt that ends in it could not be continued with an indented line.
SPLIT_PATTERN = r" ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\n|[^\S\n]+(?!\S)|[^\S\n]+"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("roles are system, user and assistant, not " ~ message.role) }}
    {%- endif %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

#: bfloat16 halves of these 3.98 million parameters stay under the 8 MB that the repository allows.
SHAPE: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Settings:
    """How long and how to train. It ends with the first limit of `steps` and `minutes`, which exclude compilation."""

    device: str
    steps: int
    minutes: float | None
    rows: int
    dropout: float
    weight_decay: float
    learning_rate: float
    seed: int

    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    #: The learning rate's end, as a share of its peak.
    final_share: float = 0.02


@dataclass(frozen=True)
class Batch:
    """Rows packed from several documents; `segments` says which token belongs to which. All int64 (B, T)."""

    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor


def train_tokenizer(documents: Sequence[corpus.Document]) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE: every byte is in the vocabulary and nothing is normalised, so any text round-trips."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A function repeats text of its module, so modules, topics and answers are all the text there is.
    texts = [doc.text or doc.messages[-1]["content"] for doc in documents if doc.kind != "function"]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=SHAPE["max_position_embeddings"],
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[corpus.Document]) -> list[np.ndarray[Any, Any]]:
    texts = [evaluate_tiny.document_text(tokenizer, document) for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def pack(
    encoded: Sequence[np.ndarray[Any, Any]], end: int, num_rows: int, device: str, rng: np.random.Generator
) -> Iterator[Batch]:
    """Lays shuffled documents end to end and cuts them into rows; a document's rest begins the next row.

    Every document ends with the end-of-text token and half of them begin with it, so that the model expects prompts
    with and without it.
    """
    width: int = SHAPE["max_position_embeddings"]
    mark = np.array([end], dtype=np.int64)
    empty = mark[:0]
    coins = rng.random(len(encoded)) < 0.5
    pieces = [
        np.concatenate([mark if coins[index] else empty, encoded[index], mark])
        for index in rng.permutation(len(encoded))
    ]
    lengths = np.array([len(piece) for piece in pieces])
    flat = np.concatenate(pieces)
    segments = np.repeat(np.arange(len(pieces)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    num_tokens = (len(flat) - 1) // width * width
    index = np.arange(num_tokens)
    positions = index - np.maximum(starts[:num_tokens], index // width * width)
    targets = np.where(segments[1 : num_tokens + 1] == segments[:num_tokens], flat[1 : num_tokens + 1], -100)
    columns = [flat[:num_tokens], positions, segments[:num_tokens], targets]
    rows = [torch.from_numpy(column).view(-1, width) for column in columns]
    for start in range(0, len(rows[0]) - num_rows + 1, num_rows):
        yield Batch(*(column[start : start + num_rows].to(device) for column in rows))


def epochs(
    encoded: Sequence[np.ndarray[Any, Any]], end: int, settings: Settings, rng: np.random.Generator
) -> Iterator[Batch]:
    while True:
        yield from pack(encoded, end, settings.rows, settings.device, rng)


def packed_loss(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Returns the mean cross-entropy in nats; no token sees another document of its row."""
    width = ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
    mask = (segments[:, None, :, None] == segments[:, None, None, :]) & causal  # bool (B, 1, T, T)
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    logits = model.lm_head(hidden).float()  # float32 (B, T, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch_loss(loss: Callable[..., torch.Tensor], model: Any, batch: Batch) -> torch.Tensor:
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16):
        return loss(model, batch.ids, batch.positions, batch.segments, batch.targets)


@torch.no_grad()
def validation_loss(model: Any, batches: Sequence[Batch]) -> float:
    model.eval()
    losses = [batch_loss(packed_loss, model, batch).item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def add_dropout(model: Any, probability: float) -> None:
    """Drops parts of what each block adds to the residual stream; hooks leave the saved model as it is."""

    def hook(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, probability, training=module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


def build_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Any:
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        **SHAPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    model: Any = Qwen3ForCausalLM(config).to(settings.device).train()
    if settings.dropout:
        add_dropout(model, settings.dropout)
    return model


def build_optimizer(model: Any, settings: Settings) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = settings.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    warmth = min(1.0, (step + 1) / settings.warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.learning_rate * warmth * (settings.final_share + (1 - settings.final_share) * decay)


def train(
    model: Any, batches: Iterator[Batch], validation: Sequence[Batch], settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains until the steps or the minutes are used up; returns the figures and the validation curve."""
    optimizer = build_optimizer(model, settings)
    loss_function = torch.compile(packed_loss) if settings.device.startswith("cuda") else packed_loss
    curve: list[dict[str, Any]] = []
    began = compiled = time.monotonic()
    step, num_tokens, progress = 0, 0, 0.0
    window = torch.zeros((), device=settings.device)
    while progress < 1.0:
        rate = learning_rate(settings, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        loss = batch_loss(loss_function, model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window += loss.detach()
        step += 1
        num_tokens += batch.ids.numel()
        if step == 1:
            print(f"first step, loss {loss.item():.3f}, {time.monotonic() - began:.1f} s", flush=True)
            compiled = time.monotonic()
        elapsed_s = time.monotonic() - compiled
        time_progress = elapsed_s / 60 / settings.minutes if settings.minutes else 0.0
        progress = max(step / settings.steps, time_progress)
        if step % 100 == 0 or progress >= 1.0:
            mean = window.item() / (step % 100 or 100)
            window.zero_()
            elapsed_s = time.monotonic() - compiled
            speed = num_tokens / max(elapsed_s, 1e-9)
            print(f"step {step} loss {mean:.4f} rate {rate:.2e} {speed:,.0f} tokens/s {elapsed_s:.0f} s", flush=True)
            if step % 500 == 0 or progress >= 1.0:
                held = validation_loss(model, validation)
                curve.append({"step": step, "train_loss": round(mean, 4), "validation_loss": round(held, 4)})
                print(f"step {step} validation loss {held:.4f}", flush=True)
    figures: dict[str, Any] = {"steps": step, "tokens": num_tokens, "train_s": round(time.monotonic() - compiled, 1)}
    return figures | {"compile_s": round(compiled - began, 1)} | curve[-1], curve


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def write_folder(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, functions: Sequence[corpus.HeldoutFunction]
) -> None:
    """Writes the weights in bfloat16 and every file a loader looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
    # By hand: the libraries leave out values equal to their own defaults, and readers need them stated.
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tokenizer.bos_token_id,
            "do_sample": False,
            "eos_token_id": [tokenizer.eos_token_id, turn_end],
            "max_new_tokens": MAX_NEW_TOKENS,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "additional_special_tokens": [TURN_START, TURN_END],
            "bos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": SHAPE["max_position_embeddings"],
            "pad_token": PADDING,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    lines = [json.dumps(asdict(function)) + "\n" for function in functions]
    (folder / "heldout_functions.jsonl").write_text("".join(lines), "utf-8")


def run(settings: Settings, corpus_file: Path | None, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    documents = corpus.load(corpus_file)
    training = [document for document in documents if document.split == "train"]
    tokenizer = train_tokenizer(training)
    encoded = encode(tokenizer, training)
    num_unique = sum(map(len, encoded))
    end: int = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    print(f"{len(training)} documents, {num_unique:,} tokens, {time.monotonic() - began:.0f} s", flush=True)

    held = encode(tokenizer, [document for document in documents if document.split == "validation"])
    validation = list(pack(held, end, min(8, settings.rows), settings.device, np.random.default_rng(0)))
    model = build_model(tokenizer, settings)
    batches = epochs(encoded, end, settings, np.random.default_rng(settings.seed))
    figures, curve = train(model, batches, validation, settings)

    write_folder(folder, model, tokenizer, corpus.heldout_functions(documents))
    figures |= {"documents": len(training), "unique_tokens": num_unique, "torch": torch.__version__}
    figures |= {"settings": asdict(settings), "curve": curve}
    return figures


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="a limit on training itself, without compilation"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=32, help="rows of 2,048 tokens in a batch")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="corpus file, read or, where it does not exist yet, written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "millrace-tiny")
    options = vars(parser.parse_args(arguments))
    corpus_file, folder = options.pop("corpus"), options.pop("out")
    print(json.dumps(run(Settings(**options), corpus_file, folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
