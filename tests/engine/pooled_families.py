"""Tiny random models that embed or classify, and what transformers says of one text at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protocol.frames import NewSequence
from worker.engine.pooling_engine import PoolingEngine

VOCAB_SIZE = 300
_BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
_DECODER = {**_BERT, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_MODERN = {
    **_BERT,
    "global_attn_every_n_layers": 2,
    "local_attention": 16,
    "num_hidden_layers": 3,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
}


@dataclass(frozen=True)
class PooledFamily:
    """`config` names a class of transformers; `pooling` is what suits it, `layout` the best it runs in."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"
    layout: str = "packed"

    def make_config(self, **changes: Any) -> Any:
        import transformers

        return getattr(transformers, self.config)(**self.fields, **changes)


FAMILIES: dict[str, PooledFamily] = {
    "bert": PooledFamily("BertConfig", _BERT),
    "roberta": PooledFamily("RobertaConfig", _BERT),
    "distilbert": PooledFamily(
        "DistilBertConfig",
        {"vocab_size": VOCAB_SIZE, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    ),
    "modernbert": PooledFamily("ModernBertConfig", _MODERN),
    "qwen3": PooledFamily("Qwen3Config", {**_DECODER, "head_dim": 32}, pooling="last"),
    "qwen2": PooledFamily("Qwen2Config", _DECODER, pooling="last"),
    "llama": PooledFamily("LlamaConfig", _DECODER, pooling="last"),
    "gemma3": PooledFamily(
        "Gemma3TextConfig",
        {
            **_DECODER,
            "head_dim": 16,
            "sliding_window": 17,
            "use_bidirectional_attention": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mpnet": PooledFamily("MPNetConfig", _BERT, layout="padded"),
    "deberta": PooledFamily(
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 64},
        layout="padded",
    ),
    "bloom": PooledFamily(
        "BloomConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 128},
        pooling="last",
        layout="padded",
    ),
}


def build(family: str, auto_class: str = "AutoModel", **changes: Any) -> Any:
    """A random model, with weights wide enough that texts differ."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(FAMILIES[family].make_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@torch.inference_mode()
def plain_embedding(model: Any, ids: list[int], pooling: str) -> torch.Tensor:
    """(E,), not normalised"""
    hidden = model(torch.tensor([ids])).last_hidden_state[0]
    vectors: dict[str, torch.Tensor] = {"mean": hidden.mean(dim=0), "last": hidden[-1], "cls": hidden[0]}
    return vectors[pooling]


@torch.inference_mode()
def plain_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """(C,)"""
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.softmax(dim=-1)


def load(folder: Path, auto_class: str = "AutoModel") -> Any:
    import transformers

    # Plain attention computes every family's terms.
    return getattr(transformers, auto_class).from_pretrained(folder, attn_implementation="eager").eval()


def drive(engine: PoolingEngine, texts: Sequence[list[int]], wave: int = 7) -> dict[int, np.ndarray]:
    """The vectors by number of the text, which arrive in waves, as steps go on."""
    vectors: dict[int, np.ndarray] = {}
    for start in range(0, len(texts), wave):
        for number, text in enumerate(texts[start : start + wave], start):
            ids = np.array(text, dtype="<i4").tobytes()
            engine.add(NewSequence(number, ids, 0, (), 0.0, 1.0, 0, 0, 0))
        collect(engine, vectors)
    while engine.has_work:
        collect(engine, vectors)
    return vectors


def collect(engine: PoolingEngine, vectors: dict[int, np.ndarray]) -> None:
    frame = engine.step()
    assert frame is not None
    assert frame.refused == []
    for number, values in frame.pooled:
        assert number not in vectors
        vectors[number] = np.frombuffer(values, dtype="<f4")
    assert [number for number, _ in frame.pooled] == [number for number, _, _ in frame.finished]
