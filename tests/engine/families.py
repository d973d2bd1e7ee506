"""The model families of the equality suite, and the ways in which each of them is run: one table, to be extended."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

VOCAB_SIZE = 512
_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_ALTERNATING = {"sliding_window": 16, "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Family:
    """`config` names a class of transformers; prompts are longer where a window has to be left behind.

    `seed` is one whose texts hold next to no ties, behind which rounding decides and nothing can be compared.
    """

    config: str
    fields: dict[str, Any]
    max_prompt: int = 60
    seed: int = 0
    std: float = 0.15
    is_packable: bool = True

    def build(self) -> Any:
        """A model of two layers whose weights are wide enough that its texts vary."""
        import transformers

        torch.manual_seed(self.seed)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, self.config)(**_TOKENS, **self.fields)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=self.std)
        return model.eval()


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", _DECODER),
    "qwen2": Family("Qwen2Config", _DECODER, seed=1),
    "qwen3": Family("Qwen3Config", {**_DECODER, "head_dim": 32}),
    "mistral": Family("MistralConfig", {**_DECODER, "sliding_window": 16}, max_prompt=100),
    "gemma2": Family("Gemma2Config", {**_DECODER, **_ALTERNATING, "attn_logit_softcapping": 2.0}, max_prompt=100),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**_DECODER, **_ALTERNATING, "layer_types": ["sliding_attention", "full_attention"]},
        max_prompt=100,
        seed=1,
    ),
    "phi3": Family("Phi3Config", _DECODER, seed=1),
    "gpt2": Family("GPT2Config", _GPT2),
    "bloom": Family(
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 512, "tie_word_embeddings": False},
        std=0.3,
        is_packable=False,
    ),
}


@dataclass(frozen=True)
class Variant:
    """A way to run a family: settings, the size of the waves in which prompts arrive, and what must have happened."""

    settings: dict[str, Any] = field(default_factory=dict)
    wave: int = 4
    layout: str = "packed"
    check: Callable[[Any, Any], bool] = lambda engine, run: True


def _preempted(engine: Any, run: Any) -> bool:
    return bool(engine.scheduler.num_preemptions > 0)


def _within(max_tokens: int) -> Callable[[Any, Any], bool]:
    return lambda engine, run: bool(run.max_step_tokens <= max_tokens)


_TIGHT = {"kv_tokens": 256, "max_batch_tokens": 23}

VARIANTS: dict[str, Variant] = {
    "in lockstep": Variant({"lookahead": 0}),
    "in lockstep, gathered": Variant({"lookahead": 0, "attention": "sdpa"}),
    "one step ahead": Variant({"lookahead": 1}),
    "preempted": Variant({"lookahead": 0, **_TIGHT}, wave=8, check=_preempted),
    "preempted, one step ahead": Variant({"lookahead": 1, **_TIGHT}, wave=8, check=_preempted),
    "chunks of 7": Variant({"lookahead": 1, "max_batch_tokens": 7}, check=_within(7)),
    "padded": Variant({"layout": "padded"}, layout="padded"),
    "padded, tight": Variant({"layout": "padded", **_TIGHT}, wave=8, layout="padded", check=_within(23)),
    "padded, chunks of 7": Variant({"layout": "padded", "max_batch_tokens": 7}, layout="padded", check=_within(7)),
}

#: Every family in every way that it can be run.
CASES = [(name, way) for name, family in FAMILIES.items() for way in VARIANTS if family.is_packable or "padded" in way]
