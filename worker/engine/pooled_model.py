"""PooledModel: a model that makes one vector of a text, an embedding or the probabilities of classes.

Which layout it runs in is found by running it: two texts alone, with transformers' own plain attention, then both in
one flat row, then as a rectangle. Letters: L tokens of a text, T of a flat row, R rows, W columns, E hidden size.
"""

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine import text_attention
from worker.engine.attention import leave_to
from worker.engine.checkpoint import read_config, read_model
from worker.engine.classification_head import ClassificationHead, activation_of, find_head, labels_of
from worker.engine.dtypes import choose_dtype
from worker.engine.loader import model_len_limit, take_device
from worker.engine.memory import check_memory
from worker.engine.pooling import Pooling, StatedPooling, choose_pooling, read_pooling
from worker.engine.quantizing import check_quantization, quantize_linears
from worker.engine.task import Task
from worker.engine.text_attention import Texts, TextStep, choose_text_attention

log = logging.getLogger("millrace.engine")

_SUPPORTED = (
    "encoders and decoders whose attention goes through transformers' AttentionInterface (among them BERT, RoBERTa, "
    "ModernBERT, Qwen3, Llama and Gemma 3), and, padded, those that keep to an attention mask (MPNet, DeBERTa, BLOOM)"
)
#: Tokens of the probe's two texts; more where a window has to be left behind, if it is not too long for a start.
_TOKENS, _FEWER_TOKENS = 12, 7
_MAX_PROBED_WINDOW = 1024
#: The first token ids often mean something to a model: padding above all.
_FIRST_TOKEN = 5
#: Two ways to the same vectors must agree this well.
_TOLERANCE = {torch.float32: 1e-3}
_ROUGH_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class PooledModel:
    task: Task
    backbone: "Backbone"
    layout: str  # packed or padded
    pooling: Pooling
    is_normalized: bool
    head: ClassificationHead | None  # of a classification
    labels: tuple[str, ...]
    max_model_len: int
    num_dimensions: int
    vocab_size: int
    attention: str  # transformers' name of it
    quantization: str = "none"  # of the layers' weights

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype_name(self) -> str:
        return str(self.backbone.dtype).removeprefix("torch.")

    @property
    def description(self) -> str:
        """All that decides the vectors beside the files and the dtype."""
        return f"{self.task} {self.pooling}{' normalized' if self.is_normalized else ''}"


class Backbone:
    """A model below its head, run over flat rows and rectangles. `first_position` is that of a text's first token."""

    def __init__(self, module: Any, pad_id: int) -> None:
        self._module = module
        self._pad_id = pad_id
        weight = module.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.first_position = 0
        names = inspect.signature(module.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
        self.takes_positions = "position_ids" in names
        self._options = {"use_cache": False} if "use_cache" in names or takes_any else {}

    def run_flat(self, token_ids: Tensor, positions: Tensor, step: TextStep) -> Tensor:
        """token_ids and positions (T,), from 0 for each text -> (T, E)."""
        given: dict[str, Any] = {"position_ids": (positions + self.first_position).unsqueeze(0)}
        given[text_attention.STEP] = step
        hidden: Tensor = self._module(input_ids=token_ids.unsqueeze(0), **given, **self._options).last_hidden_state
        return hidden[0]

    def run_rows(self, token_ids: Tensor, lens: Tensor) -> Tensor:
        """token_ids (R, W) with each text from the first column on, lens (R,) -> (R, W, E)."""
        is_text = torch.arange(token_ids.shape[1], device=token_ids.device) < lens[:, None]
        given = {"input_ids": token_ids.masked_fill(~is_text, self._pad_id), "attention_mask": is_text.long()}
        hidden: Tensor = self._module(**given, **self._options).last_hidden_state
        return hidden

    def run_alone(self, token_ids: Tensor, first_position: int | None = None) -> Tensor:
        """token_ids (L,) -> (1, L, E), at the model's own positions unless told."""
        given: dict[str, Any] = {"input_ids": token_ids.unsqueeze(0)}
        if first_position is not None:
            places = torch.arange(len(token_ids), device=self.device) + first_position
            given["position_ids"] = places.unsqueeze(0)
        hidden: Tensor = self._module(**given, **self._options).last_hidden_state
        return hidden


def load_pooled(folder: Path, task: Task, settings: EngineSettings) -> PooledModel:
    """Raises ConfigurationError for a model that cannot be read or that the engine cannot run."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    device = take_device(settings)
    dtype = choose_dtype(settings, device, folder)
    check_quantization(settings.quantization, device, dtype)
    text_attention.register()
    config = read_config(folder, _SUPPORTED)
    stated = read_pooling(folder, settings) if task == "embed" else StatedPooling()
    check_memory(folder, device, dtype, settings, task)
    auto_class = AutoModel if task == "embed" else AutoModelForSequenceClassification
    # What an encoder was trained with on top of its first token is no part of its embeddings.
    unused = ("pooler.",) if task == "embed" else ()
    model = read_model(auto_class, folder, config, dtype, text_attention.NAME, _SUPPORTED, unused)
    return adopt_pooled(model.to(device), task, settings, stated)


def adopt_pooled(model: Any, task: Task, settings: EngineSettings, stated: StatedPooling) -> PooledModel:
    """Check a model that is on its device already, choose its layout and make it ready.

    Raises ConfigurationError when it runs in no layout, or not in the one asked for.
    """
    text_attention.register()
    model.eval()
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ConfigurationError(_unsupported(config, "it has an encoder and a decoder"))
    pad_id = config.pad_token_id or 0
    if task == "classify":
        # Heads that look for a text's last token find it by this id; here every text is cut to one token for them.
        model.config.pad_token_id = config.pad_token_id = -1
    backbone = Backbone(model.base_model if task == "classify" else model, pad_id)
    try:
        probe = _Probe(model, backbone, config, task)
        layout, reason = _choose_layout(model, probe, settings)
        head, pooling = None, choose_pooling(stated, settings, is_causal=probe.is_causal)
        if task == "classify":
            below, pooling = find_head(model, probe.alone, probe.expected, probe.tolerance)
            head = ClassificationHead(model, below, activation_of(model.config))
    except (ConfigurationError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ConfigurationError(_unsupported(config, str(error))) from error
    log.info("layout %s: %s", layout, reason)
    if settings.quantization != "none":
        quantize_linears(model.base_model, config, settings.quantization, backbone.device)
    limit = model_len_limit(config, settings) - backbone.first_position
    pooled = PooledModel(
        task=task,
        backbone=backbone,
        layout=layout,
        pooling=pooling,
        is_normalized=task == "embed" and _is_normalized(stated, settings),
        head=head,
        labels=labels_of(model.config) if task == "classify" else (),
        max_model_len=limit if settings.max_model_len else min(limit, stated.max_tokens or limit),
        num_dimensions=probe.alone[0].shape[-1] if task == "embed" else 0,
        vocab_size=config.vocab_size,
        attention=model.config._attn_implementation,
        quantization=settings.quantization,
    )
    log.info(
        "model type %s to %s: %d parameters, %s on %s, up to %d tokens a text",
        config.model_type,
        pooled.description,
        sum(parameter.numel() for parameter in model.parameters()),
        pooled.dtype_name,
        backbone.device,
        pooled.max_model_len,
    )
    return pooled


def _is_normalized(stated: StatedPooling, settings: EngineSettings) -> bool:
    if settings.normalize is not None:
        return settings.normalize
    return stated.is_normalized is not False


class _Probe:
    """What transformers itself says of two texts, one at a time."""

    @torch.inference_mode()
    def __init__(self, model: Any, backbone: Backbone, config: Any, task: Task) -> None:
        if model._can_set_attn_implementation():
            model.set_attn_implementation("eager")
        else:
            leave_to(model)
        self.backbone = backbone
        self.texts = [_tokens(num, config, backbone.device) for num in _lengths(config)]
        self.tolerance = _TOLERANCE.get(backbone.dtype, _ROUGH_TOLERANCE)
        self.alone = [backbone.run_alone(ids) for ids in self.texts]  # (1, L, E) each
        self.expected: list[Tensor] = []  # (1, C) each
        if task == "classify":
            self.expected = [model(input_ids=ids.unsqueeze(0)).logits for ids in self.texts]
        other_end = self.texts[0].clone()
        other_end[-1] = _FIRST_TOKEN + (other_end[-1] - _FIRST_TOKEN + 1) % (config.vocab_size - _FIRST_TOKEN)
        change = (backbone.run_alone(other_end) - self.alone[0])[0].float().norm(dim=-1)  # (L,)
        self.is_causal = bool(change[:-1].max() <= self.tolerance * change[-1])
        if backbone.takes_positions:
            backbone.first_position = self._first_position()

    def _first_position(self) -> int:
        """RoBERTa and its kin count from behind the padding's id."""
        for first in (0, self.backbone._pad_id + 1):
            if _agree(self.backbone.run_alone(self.texts[0], first), self.alone[0], self.tolerance):
                return first
        raise ConfigurationError("it ignores the positions it is given")

    @torch.inference_mode()
    def run_flat(self, attention: text_attention.TextAttention) -> None:
        """Raises ConfigurationError when both texts in one flat row are not what they are alone."""
        lens = np.array([len(ids) for ids in self.texts])
        device = self.backbone.device
        cu_lens = torch.tensor([0, *lens.cumsum()], dtype=torch.int32, device=device)
        positions = torch.cat([torch.arange(num, device=device) for num in lens.tolist()])
        step = TextStep(attention, Texts(lens, cu_lens))
        together = torch.split(self.backbone.run_flat(torch.cat(self.texts), positions, step), lens.tolist())
        for row, text in zip(together, self.alone, strict=True):
            if not _agree(row, text[0], self.tolerance):
                raise ConfigurationError("packed texts influence each other, or its positions cannot be given")

    @torch.inference_mode()
    def run_rows(self) -> None:
        """Raises ConfigurationError when both texts as a rectangle are not what they are alone."""
        lens = torch.tensor([len(ids) for ids in self.texts], device=self.backbone.device)
        rows = torch.nn.utils.rnn.pad_sequence(self.texts, batch_first=True)
        for row, text in zip(self.backbone.run_rows(rows, lens), self.alone, strict=True):
            if not _agree(row[: text.shape[1]], text[0], self.tolerance):
                raise ConfigurationError("it does not keep to its attention mask")


def _choose_layout(model: Any, probe: _Probe, settings: EngineSettings) -> tuple[str, str]:
    """Packed where the model allows it, since it wastes nothing; with the reason."""
    reason = "engine.layout asks for it"
    if settings.layout != "padded":
        try:
            if not model._can_set_attn_implementation():
                raise ConfigurationError("it does not use the AttentionInterface")
            if not probe.backbone.takes_positions:
                raise ConfigurationError("it takes no positions")
            model.set_attn_implementation(text_attention.NAME)
            probe.run_flat(choose_text_attention(settings.attention, probe.backbone.device, probe.backbone.dtype))
            return "packed", "every layer attends within its own text"
        except (ConfigurationError, TypeError, ValueError, RuntimeError) as error:
            if settings.layout == "packed":
                raise ConfigurationError(f"engine.layout='packed', but it cannot run packed ({error})") from error
            reason = str(error)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        probe.run_rows()
    except ConfigurationError as error:
        raise ConfigurationError(f"not packed: {reason}; not padded: {error}") from error
    return "padded", reason


def _lengths(config: Any) -> tuple[int, int]:
    window = getattr(config, "sliding_window", None) or 0
    longest = getattr(config, "max_position_embeddings", None) or _TOKENS
    num = window + _TOKENS if window <= _MAX_PROBED_WINDOW else _TOKENS
    # RoBERTa and its kin have fewer positions for a text than their config says.
    return max(min(num, longest - _FIRST_TOKEN), 2), min(_FEWER_TOKENS, max(longest - _FIRST_TOKEN, 2))


def _tokens(num: int, config: Any, device: torch.device) -> Tensor:
    return torch.arange(num, device=device) * 7 % (int(config.vocab_size) - _FIRST_TOKEN) + _FIRST_TOKEN


def _agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= tolerance * other.norm())


def _unsupported(config: Any, reason: str) -> str:
    return (
        f"models of type {config.model_type!r} are not supported for embeddings or classification ({reason}). "
        f"Supported are {_SUPPORTED}"
    )
