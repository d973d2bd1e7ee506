"""What the engine is measured with: models by their shape alone, workloads by their lengths, and the floor of both."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.frames import NewSequence

#: Of one H200, measured: copying, and bf16 matrix products.
BYTES_PER_SECOND = 4.2e12
FLOPS_PER_SECOND = 790e12

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": True,
        },
    ),
    "llama3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
    ),
    # To try the benchmark itself where there is no GPU.
    "tiny": (
        "Qwen3Config",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
}

#: random256-limited is random256 with top_p and top_k; of random256-eos the scheduler does not know the true ends.
WORKLOADS = ("random256", "random1024", "random256-eos", "random256-limited", "prefix", "score")


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    num_tokens: int  # output tokens that it gets; 0: its prompt is scored


@dataclass(frozen=True)
class Workload:
    requests: list[Request]
    #: What the engine is told of output lengths; None: the truth.
    max_tokens: int | None = None
    shared_tokens: int = 0  # of each prompt, with others of its group
    num_groups: int = 0

    @property
    def num_tokens(self) -> int:
        """What is counted: output tokens, or scored ones."""
        return sum(r.num_tokens or len(r.prompt) - 1 for r in self.requests)

    def sequences(
        self, first_id: int, vocab_size: int, temperature: float, top_p: float, top_k: int
    ) -> list[NewSequence]:
        # A stop token makes lengths mere limits for the scheduler; that it is never drawn, the driver sees to.
        stop = () if self.max_tokens is None else (vocab_size,)
        return [
            NewSequence(
                first_id + i,
                np.array(request.prompt, dtype="<i4").tobytes(),
                (self.max_tokens or request.num_tokens) if request.num_tokens else 0,
                stop,
                temperature,
                top_p,
                top_k,
                first_id + i,
                0,
                score_from=-1 if request.num_tokens else 1,
            )
            for i, request in enumerate(self.requests)
        ]


def make_workload(name: str, vocab_size: int, run: int, scale: float = 1.0) -> Workload:
    """The lengths are the same in every run, the tokens are not, so that no run finds another's prefixes computed."""
    lengths, tokens = random.Random(0), random.Random(f"{name} {run}")

    def prompt(num: int) -> list[int]:
        return tokens.choices(range(vocab_size), k=num)

    if name == "prefix":
        groups, each, shared, own, out = 64, 16, 2048, 128, 256
        if scale < 1:
            groups, shared, own, out = 4, 64, 16, 16
        prefixes = [prompt(shared) for _ in range(groups)]
        requests = [Request(prefix + prompt(own), out) for prefix in prefixes for _ in range(each)]
        lengths.shuffle(requests)
        return Workload(requests, shared_tokens=shared, num_groups=groups)
    num = max(int({"random1024": 1024, "score": 4096}.get(name, 256) * scale), 2)
    longest = max(int(1024 * min(1.0, scale * 8)), 101)
    num_in = [lengths.randint(100, longest) for _ in range(num)]
    num_out = [0 if name == "score" else lengths.randint(100, longest) for _ in range(num)]
    requests = [Request(prompt(a), b) for a, b in zip(num_in, num_out, strict=True)]
    return Workload(requests, max_tokens=longest if name == "random256-eos" else None)


def floor_seconds(workload: Workload, config: Any, num_parameters: int) -> float:
    """Weights once per step, every byte of KV once per token that attends to it (a group's once per group), and the
    prompts' arithmetic: how long it takes at the least on one H200. The arithmetic of decoding is not counted."""
    kv_bytes: float = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * config.hidden_size
    inner = num_parameters - embedding * (1 if config.tie_word_embeddings else 2)
    head = embedding
    steps = max(r.num_tokens for r in workload.requests)
    seconds: float = steps * 2 * (inner + head) / BYTES_PER_SECOND
    flops: float = 0
    for request in workload.requests:
        num_in, num_out, shared = len(request.prompt), request.num_tokens, workload.shared_tokens
        seconds += kv_bytes * (num_out * (num_in - shared) + num_out * num_out / 2) / BYTES_PER_SECOND
        computed = num_in - shared
        flops += 2 * inner * computed + (2 * head * num_in if not num_out else 0)
        width = config.num_attention_heads * config.head_dim
        flops += 2 * config.num_hidden_layers * width * (num_in * num_in - shared * shared)
    group_steps = max((r.num_tokens for r in workload.requests), default=0)
    shared = workload.shared_tokens * workload.num_groups
    seconds += kv_bytes * shared * group_steps / BYTES_PER_SECOND
    flops += 2 * inner * shared
    return float(seconds + flops / FLOPS_PER_SECOND)
