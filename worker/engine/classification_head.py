"""ClassificationHead: a model's own head, run on pooled texts without the layers below it.

Heads stand in many places: on top of the backbone, or inside of it (BERT's pooler). The model's forward is run with
what lies below the head replaced by the pooled vectors, each as a text of one token; which replacement gives the
model's own logits is found by trying. Letters: N texts, E hidden size, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from protocol.errors import ConfigurationError
from worker.engine.pooling import Pooling

POOLINGS: tuple[Pooling, ...] = ("last", "cls", "mean")


class ClassificationHead:
    def __init__(self, model: Any, below: Any, activation: str) -> None:
        """`below` is the module whose output the head reads; `activation` is softmax, sigmoid or none."""
        self._model = model
        self._below = below
        self._activation = activation

    def logits(self, pooled: Tensor) -> Tensor:
        """pooled (N, E) -> (N, C) in the model's dtype."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=pooled.to(self._model.dtype).unsqueeze(1))
        dummy = torch.zeros(len(pooled), 1, dtype=torch.int64, device=pooled.device)
        self._below.forward = lambda *arguments, **keywords: output
        try:
            logits: Tensor = self._model(input_ids=dummy).logits
        finally:
            del self._below.forward  # the class's own is found again
        return logits

    def probabilities(self, pooled: Tensor) -> Tensor:
        """pooled (N, E) -> (N, C) float32."""
        logits = self.logits(pooled).float()
        if self._activation == "softmax":
            return logits.softmax(dim=-1)
        return logits.sigmoid() if self._activation == "sigmoid" else logits


@torch.inference_mode()
def find_head(model: Any, hidden: list[Tensor], expected: list[Tensor], tolerance: float) -> tuple[Any, Pooling]:
    """Where the model's head begins, and of which pooled vector it speaks.

    `hidden` (1, L, E) are the backbone's outputs for some texts, `expected` (1, C) the model's own logits for them.
    Raises ConfigurationError when no way gives them.
    """
    base = model.base_model
    encoder = getattr(base, "encoder", None)
    for below in (base, encoder):
        if below is model or not isinstance(below, nn.Module):
            continue
        head = ClassificationHead(model, below, "none")
        for pooling in POOLINGS:
            try:
                logits = head.logits(torch.cat([_pool(text, pooling) for text in hidden]))
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
                break  # the model reads more of that module's output than hidden states
            wanted = torch.cat(expected).float()
            if (logits.float() - wanted).norm() <= tolerance * wanted.norm():
                return below, pooling
    raise ConfigurationError("its head cannot be run apart from its backbone")


def activation_of(config: Any) -> str:
    """As transformers' own pipeline for text classification has it."""
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def labels_of(config: Any) -> tuple[str, ...]:
    """In the order of the logits."""
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def _pool(hidden: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "mean":
        return hidden.float().mean(dim=1)
    return hidden[:, -1 if pooling == "last" else 0].float()
