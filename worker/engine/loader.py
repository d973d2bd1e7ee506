"""Loading: a folder becomes a model, on its device and in its dtype, whose layers all run packed and paged."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine import attention
from worker.engine.attention import AttentionTerms
from worker.engine.backends.sdpa import attend_causally
from worker.engine.kv_cache import LayerShape

log = logging.getLogger("millrace.engine")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Tokens per half of the probe's row.
_PROBE_TOKENS = 8
#: The halves must agree this well; a model that mixes them or ignores positions is off by the size of its logits.
_PROBE_TOLERANCE = 0.05

_SUPPORTED = (
    "decoder-only models whose attention goes through transformers' AttentionInterface, among them Llama, Mistral, "
    "Qwen2, Qwen3, Gemma 3, Phi-3 and GPT-2"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    layers: list[LayerShape]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_device(settings: EngineSettings) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"engine.device={name!r} is unknown: it is auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"engine.device={name!r} is not supported: it is auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"engine.device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices: use cpu or auto"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def choose_dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if settings.dtype not in DTYPES:
        raise ConfigurationError(
            f"engine.dtype={settings.dtype!r} is unknown: it is auto or one of {', '.join(DTYPES)}"
        )
    return DTYPES[settings.dtype]


def load_model(folder: Path, settings: EngineSettings) -> LoadedModel:
    """Raises ConfigurationError for a model that cannot be read or that the engine cannot run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = choose_device(settings)
    dtype = choose_dtype(settings, device)
    attention.register()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigurationError(
                f"the model in {folder} is quantized, which the engine does not run yet: use its unquantized original"
            )
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if attention.NAME in str(error):  # a model class with attention functions of its own has none of our name
            raise ConfigurationError(_unsupported(config, "they do not use the AttentionInterface")) from error
        raise ConfigurationError(f"transformers cannot load the model in {folder}: {error}") from error
    return adopt(model.to(device), settings)


def adopt(model: Any, settings: EngineSettings) -> LoadedModel:
    """Check a model that is on its device already and make it ready.

    Raises ConfigurationError when it does not run packed and paged, or not at the length asked for.
    """
    attention.register()
    model.eval()
    model.set_attn_implementation(attention.NAME)
    config = model.config.get_text_config()
    # Packed rows hold no padding; with a pad token set, transformers looks for it and waits for the device to tell.
    model.config.pad_token_id = config.pad_token_id = None
    terms, layers = _probe(model, config)
    max_model_len = _max_model_len(config, settings)
    _check_windows(config, terms, max_model_len)
    weight = model.get_input_embeddings().weight
    loaded = LoadedModel(model, weight.device, weight.dtype, max_model_len, config.vocab_size, layers)
    log.info(
        "model type %s: %d layers, %d parameters, %s on %s, up to %d tokens a Sequence",
        config.model_type,
        len(layers),
        sum(parameter.numel() for parameter in model.parameters()),
        loaded.dtype_name,
        weight.device,
        max_model_len,
    )
    return loaded


def _max_model_len(config: Any, settings: EngineSettings) -> int:
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None and settings.max_model_len is None:
        raise ConfigurationError(
            "the model's config.json names no max_position_embeddings: set engine.max_model_len to its context length"
        )
    max_model_len = min(x for x in (limit, settings.max_model_len) if x is not None)
    if max_model_len < 2:
        raise ConfigurationError(f"engine.max_model_len={max_model_len} has no room for a prompt and an output token")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        original = parameters.get("original_max_position_embeddings")
        # Its frequencies follow the longest Sequence of the batch, so one answer would depend on its neighbours.
        if parameters.get("rope_type") == "longrope" and original and max_model_len > original:
            raise ConfigurationError(
                f"this model's longrope scaling beyond {original} tokens is not supported (max_model_len is "
                f"{max_model_len}): set engine.max_model_len to {original} or less"
            )
    return max_model_len


class _ProbeStep:
    """Attends within each half of the row, and notes what every layer asked for."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.terms: dict[int, AttentionTerms] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            raise ConfigurationError(
                f"layer {layer} has keys of shape {tuple(key.shape[1:])}, values of {tuple(value.shape[1:])} and "
                f"queries of {tuple(query.shape[1:])}: they must agree"
            )
        self.shapes[layer] = LayerShape(num_kv_heads=key.shape[1], head_dim=key.shape[2])
        self.terms[layer] = terms
        halves = zip(query.chunk(2), key.chunk(2), value.chunk(2), strict=True)
        return torch.cat([attend_causally(q, k, v, terms) for q, k, v in halves])


@torch.inference_mode()
def _probe(model: Any, config: Any) -> tuple[dict[int, AttentionTerms], list[LayerShape]]:
    """Run the same few tokens twice in one packed row; a model fit for packing gives the same logits twice."""
    device = model.get_input_embeddings().weight.device
    half = torch.arange(min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or 1), device=device)
    step = _ProbeStep()
    try:
        output = model(
            input_ids=(half * 7 % config.vocab_size).repeat(2).unsqueeze(0),
            position_ids=half.repeat(2).unsqueeze(0),
            use_cache=False,
            **{attention.STEP: step},
        )
    except (ConfigurationError, TypeError) as error:
        raise ConfigurationError(_unsupported(config, str(error))) from error
    num_layers = config.num_hidden_layers
    if set(step.shapes) != set(range(num_layers)):
        found = f"{len(step.shapes)} of {num_layers} layers use the AttentionInterface"
        raise ConfigurationError(_unsupported(config, found))
    first, second = output.logits[0].float().chunk(2)
    if not (first - second).norm() <= _PROBE_TOLERANCE * first.norm():
        found = "packed Sequences influence each other, or positions are ignored"
        raise ConfigurationError(_unsupported(config, found))
    return step.terms, [step.shapes[layer] for layer in range(num_layers)]


def _check_windows(config: Any, terms: dict[int, AttentionTerms], max_model_len: int) -> None:
    """A layer that leaves its window to the mask, which is not built here, would attend to too much."""
    for layer, layer_type in enumerate(getattr(config, "layer_types", None) or []):
        window = getattr(config, "sliding_window", None)
        matters = window is None or window < max_model_len
        if layer_type == "sliding_attention" and terms[layer].window is None and matters:
            raise ConfigurationError(_unsupported(config, f"layer {layer} does not name its sliding window"))
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ConfigurationError(_unsupported(config, f"layer {layer} is of type {layer_type!r}"))


def _unsupported(config: Any, reason: str) -> str:
    return f"models of type {config.model_type!r} are not supported ({reason}). Supported are {_SUPPORTED}"
