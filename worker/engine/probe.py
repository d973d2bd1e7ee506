"""The probe: which layout a model can run in, found by running it, and what its layers keep per token."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocol.errors import ConfigurationError
from worker.engine import attention
from worker.engine.attention import AttentionTerms
from worker.engine.backends.sdpa import attend_causally
from worker.engine.kv_cache import LayerShape
from worker.engine.padded_forward import PaddedForward
from worker.engine.scorer import Scorer

#: Tokens per half of the packed row, and of the longer row of the rectangle.
_TOKENS = 8
#: Tokens of the rectangle's shorter row.
_FEWER_TOKENS = 5
#: Two ways to the same logits must agree this well; a model that mixes texts, ignores positions or attends to padding
#: is off by the size of its logits.
_TOLERANCE = 0.05
#: What an exchanged last token may change in the logits before it, of what it changes in its own: nothing but noise.
_LOOKAHEAD_TOLERANCE = 1e-3


@dataclass
class _ProbeStep:
    """Attends within each half of the row, and notes what every layer keeps."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            raise ConfigurationError(
                f"layer {layer} has keys of shape {tuple(key.shape[1:])}, values of {tuple(value.shape[1:])} and "
                f"queries of {tuple(query.shape[1:])}: they must agree"
            )
        if layer in self.shapes:  # its cache would keep the last of them alone
            raise ConfigurationError(f"layer {layer} attends more than once")
        self.shapes[layer] = LayerShape(num_kv_heads=key.shape[1], head_dim=key.shape[2])
        halves = zip(query.chunk(2), key.chunk(2), value.chunk(2), strict=True)
        return torch.cat([attend_causally(q, k, v, terms) for q, k, v in halves])


@torch.inference_mode()
def probe_packed(model: Any, config: Any) -> list[LayerShape]:
    """Run the same few tokens twice in one packed row; a model fit for packing gives the same logits twice.

    Raises ConfigurationError with what speaks against packing.
    """
    ids = probe_tokens(model, config)
    step = _ProbeStep()
    try:
        with attention.running(step):
            output = model(
                input_ids=ids.repeat(2).unsqueeze(0),
                position_ids=torch.arange(len(ids), device=ids.device).repeat(2).unsqueeze(0),
                use_cache=False,
            )
    except (TypeError, RuntimeError) as error:
        raise ConfigurationError(str(error)) from error
    num_layers = config.num_hidden_layers
    if set(step.shapes) != set(range(num_layers)):
        raise ConfigurationError(f"{len(step.shapes)} of {num_layers} layers use the AttentionInterface")
    first, second = output.logits[0].chunk(2)
    if not _agree(first, second):
        raise ConfigurationError("packed Sequences influence each other, or positions are ignored")
    return [step.shapes[layer] for layer in range(num_layers)]


@torch.inference_mode()
def probe_padded(model: Any, config: Any) -> list[LayerShape]:
    """Run two texts alone, then as a rectangle whose last column comes through the cache; and once more with the
    shorter one in a rectangle of its own that joins the other's.

    Raises ConfigurationError with what speaks against padding.
    """
    ids = probe_tokens(model, config)
    fewer = ids[-min(_FEWER_TOKENS, len(ids)) :]
    num_pads = len(ids) - len(fewer)
    rectangle = torch.stack((ids, torch.cat((ids.new_zeros(num_pads), fewer))))
    pads = torch.tensor([0, num_pads], device=ids.device)
    forward = PaddedForward(model)
    other_end = torch.cat((ids[:-1], (ids[-1:] + 1) % int(config.vocab_size)))
    try:
        change = _logits(model, other_end) - _logits(model, ids)  # (tokens, V)
        alone = [model(input_ids=text.unsqueeze(0), use_cache=False).logits[0, -1] for text in (ids, fewer)]
        for number, (rows, row_pads) in enumerate(((rectangle, pads), (ids[None], pads[:1]), (fewer[None], pads[:1]))):
            forward.start(number)
            forward.run(number, rows[:, :-1], row_pads, 0)
        forward.join(1, 2, 0, num_pads)
        together, joined = (forward.run(i, rectangle[:, -1:], pads, len(ids) - 1)[:, -1] for i in (0, 1))
        layers = [(layer.keys, layer.values) for layer in forward.caches[0].layers]
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, RuntimeError) as error:
        raise ConfigurationError(f"it does not run with a mask and a DynamicCache: {error}") from error
    if change[:-1].norm() > _LOOKAHEAD_TOLERANCE * change[-1].norm():
        raise ConfigurationError("its tokens attend to those after them")
    if not all(_agree(row, text) for row, text in zip((*together, *joined), alone * 2, strict=True)):
        raise ConfigurationError("it does not keep to its mask, its positions or its cache")
    if len(layers) != config.num_hidden_layers:
        raise ConfigurationError(f"{len(layers)} of {config.num_hidden_layers} layers keep keys and values")
    # K and V may differ in size; a shape stands for both together.
    return [LayerShape(k.shape[1], -(-(k.shape[-1] + v.shape[-1]) // 2)) for k, v in layers]


@torch.inference_mode()
def scoring_obstacle(model: Any, config: Any) -> str | None:
    """Score the probe's tokens and compare with the logits themselves; why it cannot be done, or None."""
    ids = probe_tokens(model, config)
    scorer = Scorer(model)
    try:
        with scorer.watch(True), attention.running(WholeStep()):
            logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        places = torch.arange(len(ids) - 1, device=ids.device)
        scores = scorer.score(places, ids[1:], 0)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"its backbone and its head cannot be run apart ({type(error).__name__}: {error})"
    expected = logits[:-1].float().log_softmax(dim=-1).gather(1, ids[1:, None]).squeeze(1)
    return None if _agree(expected, scores.logprobs) else "its head gives other logits apart from its backbone"


class WholeStep:
    """The packed row is one text."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        return attend_causally(query, key, value, terms)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits


def probe_tokens(model: Any, config: Any, num: int = _TOKENS) -> Tensor:
    num = min(num, getattr(config, "max_position_embeddings", None) or num)
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.arange(num, device=device) * 7 % int(config.vocab_size)


def _agree(one: Tensor, other: Tensor) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= _TOLERANCE * one.norm())
