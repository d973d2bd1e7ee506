"""Loading: a folder becomes a model, on its device and in its dtype, whose layers all run packed and paged."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine import attention
from worker.engine.checkpoint import read_config, read_model
from worker.engine.dtypes import cache_dtype, choose_dtype
from worker.engine.fusing import fuse_linears
from worker.engine.gating import gate_layers
from worker.engine.kernels.obstacle import product_obstacle
from worker.engine.kv_cache import LayerShape
from worker.engine.mask_probe import check_masks
from worker.engine.memory import available_bytes, check_memory, weight_bytes
from worker.engine.probe import probe_packed, probe_padded, scoring_obstacle
from worker.engine.quantizing import check_quantization, quantize_linears
from worker.engine.wide_linears import replace_wide_linears

log = logging.getLogger("millrace.engine")

LAYOUTS = ("auto", "packed", "padded")
#: Part of what is free on a GPU that weights may take there before they are quantized, and some of them fused.
_MOST_UNQUANTIZED = 0.8

_SUPPORTED = (
    "decoder-only models whose attention goes through transformers' AttentionInterface (among them Llama, Mistral, "
    "Qwen2, Qwen3, Gemma 3, Phi-3 and GPT-2), and, padded, those that run with a mask and a DynamicCache (BLOOM)"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of what is kept of K and V
    max_model_len: int
    vocab_size: int
    layers: list[LayerShape]
    layout: str = "packed"
    attention: str = attention.NAME  # transformers' name of it
    scoring_obstacle: str | None = None  # why prompts cannot be scored, if they cannot
    quantization: str = "none"  # of the layers' weights

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def rounding(self) -> str:
        """What is kept in 8 bits, as the fingerprint names it."""
        weights = [] if self.quantization == "none" else [self.quantization]
        return "+".join([*weights, *([] if self.kv_dtype == self.dtype else ["kv-float8"])]) or "none"


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


def take_device(settings: EngineSettings) -> torch.device:
    """As `choose_device`, and it is the current one from here on: Triton launches there, wherever its tensors are."""
    device = choose_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def load_model(folder: Path, settings: EngineSettings) -> LoadedModel:
    """Raises ConfigurationError for a model that cannot be read or that the engine cannot run."""
    from transformers import AutoModelForCausalLM

    device = take_device(settings)
    dtype = choose_dtype(settings, device, folder)
    check_quantization(settings.quantization, device, dtype)
    attention.register()
    config = read_config(folder, _SUPPORTED)
    check_memory(folder, device, dtype, settings)
    model = read_model(AutoModelForCausalLM, folder, config, dtype, attention.NAME, _SUPPORTED)
    if settings.quantization == "none" or _fits_unquantized(folder, device, dtype, settings):
        model = model.to(device)
    return adopt(model, settings, device)


def _fits_unquantized(folder: Path, device: torch.device, dtype: torch.dtype, settings: EngineSettings) -> bool:
    """What does not is probed and fused on the CPU, and quantized on its way to the device."""
    is_small = weight_bytes(folder, dtype) <= _MOST_UNQUANTIZED * available_bytes(device, settings)
    return device.type != "cuda" or is_small


def adopt(model: Any, settings: EngineSettings, device: torch.device | None = None) -> LoadedModel:
    """Check a model, choose its layout and make it ready. It is on `device` already, unless it is to be quantized.

    Raises ConfigurationError when it runs in no layout, not in the one asked for, or not at the length asked for.
    """
    if settings.layout not in LAYOUTS:
        raise ConfigurationError(f"engine.layout={settings.layout!r} is unknown: it is one of {', '.join(LAYOUTS)}")
    attention.register()
    model.eval()
    config = model.config.get_text_config()
    # Padding is told by the mask alone; with a pad token set, transformers looks for it and waits for the device.
    model.config.pad_token_id = config.pad_token_id = None
    max_model_len = model_len_limit(config, settings)
    layout, layers = _choose_layout(model, config, settings, max_model_len)
    if layout == "padded" and settings.kv_dtype != "auto":
        raise ConfigurationError(
            f"engine.kv_dtype={settings.kv_dtype!r} is for the packed layout, and this model runs padded: use auto"
        )
    weight = model.get_input_embeddings().weight
    device = weight.device if device is None else device
    is_fused, is_quantized = layout == "packed" and settings.fuse_weights, settings.quantization != "none"
    has_products = is_fused and product_obstacle(device, weight.dtype) is None
    if has_products and not is_quantized:  # its kernel multiplies 16 bits
        gate_layers(model, config)
    if is_fused:
        fuse_linears(model, config)
    if is_quantized:
        check_quantization(settings.quantization, device, weight.dtype)
        quantize_linears(model, config, settings.quantization, device)
        model.to(device)
    if has_products:
        replace_wide_linears(model)
    loaded = LoadedModel(
        model,
        device,
        weight.dtype,
        cache_dtype(settings, weight.dtype),
        max_model_len,
        config.vocab_size,
        layers,
        layout,
        model.config._attn_implementation,
        scoring_obstacle(model, config),
        settings.quantization,
    )
    if loaded.scoring_obstacle is not None:
        log.warning("prompts cannot be scored: %s", loaded.scoring_obstacle)
    log.info(
        "model type %s: %d layers, %d parameters, %s on %s, up to %d tokens a Sequence",
        config.model_type,
        len(layers),
        sum(parameter.numel() for parameter in model.parameters()),
        loaded.dtype_name,
        device,
        max_model_len,
    )
    return loaded


def _choose_layout(
    model: Any, config: Any, settings: EngineSettings, max_model_len: int
) -> tuple[str, list[LayerShape]]:
    """Packed where the model allows it, since it wastes nothing; the log says which it is and why."""
    reason = "engine.layout asks for it"
    if settings.layout != "padded":
        try:
            layers = _try_packed(model, config, max_model_len)
            log.info("layout packed: every layer attends within its own Sequence")
            return "packed", layers
        except ConfigurationError as error:
            if settings.layout == "packed":
                raise ConfigurationError(
                    f"engine.layout='packed', but models of type {config.model_type!r} cannot run packed ({error}): "
                    "use auto or padded"
                ) from error
            reason = str(error)
    # torch's own kernels have no softcap, and transformers leaves it out there.
    has_sdpa = getattr(model, "_supports_sdpa", False) and not getattr(config, "attn_logit_softcapping", None)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("sdpa" if has_sdpa else "eager")
    else:
        attention.leave_to(model)
    try:
        layers = probe_padded(model, config)
    except ConfigurationError as error:
        raise ConfigurationError(_unsupported(config, f"not packed: {reason}; not padded: {error}")) from error
    log.info("layout padded, with transformers' attention %r: %s", model.config._attn_implementation, reason)
    return "padded", layers


def _try_packed(model: Any, config: Any, max_model_len: int) -> list[LayerShape]:
    if not model._can_set_attn_implementation():
        raise ConfigurationError("it does not use the AttentionInterface")
    model.set_attn_implementation(attention.NAME)
    layers = probe_packed(model, config)
    for layer, layer_type in enumerate(getattr(config, "layer_types", None) or []):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ConfigurationError(f"layer {layer} is of type {layer_type!r}")
    check_masks(model, config, max_model_len)
    return layers


def model_len_limit(config: Any, settings: EngineSettings) -> int:
    """Tokens of the longest text. Raises ConfigurationError when the config names none, or one that is too short."""
    # BLOOM's positions have no end; its configs name the length of its training.
    limit: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
    if limit is not None and limit < 1:  # XLNet's way to say that there is none
        limit = None
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


def _unsupported(config: Any, reason: str) -> str:
    return f"models of type {config.model_type!r} are not supported ({reason}). Supported are {_SUPPORTED}"
