"""Checkpoints: a folder's config and weights through transformers, complete and of a kind that is supported, or refused
with the name of what is wrong.
"""

import json
import logging
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from protocol.errors import ConfigurationError
from worker.engine.model_files import LAYER, weight_files

log = logging.getLogger("millrace.engine")


def read_config(folder: Path, supported: str) -> Any:
    """transformers' config of the model. Raises ConfigurationError; `supported` ends the message on unknown types."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(_cannot_load(folder, error, supported)) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(
            f"the model in {folder} is quantized, which the engine does not run yet: use its unquantized original, "
            "with engine.quantization float8 or int8"
        )
    return config


def check_checkpoint(folder: Path) -> None:
    """Raises ConfigurationError for a config or weights that cannot be read; loads no tensor."""
    read_config(folder, "decoders to generate, and decoders and encoders to embed and classify")
    if damage := _damage(folder):
        raise ConfigurationError(damage)


def read_model(
    auto_class: Any,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    attention: str,
    supported: str,
    unused: Collection[str] = (),
) -> Any:
    """The model that `auto_class` makes of the folder, with its attention called `attention` where it takes one.

    Tensors whose names begin with one of `unused` may be missing. Raises ConfigurationError when the weights are
    damaged, when others are missing, and for models that transformers cannot make.
    """

    def load(implementation: str | None) -> Any:
        model, found = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _check_weights(folder, config, found, tuple(unused))
        return model

    try:
        try:
            return load(attention)
        except (ValueError, KeyError) as error:
            if attention not in str(error):
                raise
            # A class with attention functions of its own has none of our name; it may still run padded.
            return load(None)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(_damage(folder) or _cannot_load(folder, error, supported)) from error


def _check_weights(folder: Path, config: Any, found: Mapping[str, Collection[str]], unused: tuple[str, ...]) -> None:
    """transformers fills what a checkpoint lacks with random numbers and says so in a warning."""
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(unused)):
        raise ConfigurationError(
            f"the weights in {folder} lack {len(missing)} tensors that config.json asks for, {missing[0]} among them: "
            "give a folder whose weights belong to its config.json, with the head of the task it is to do"
        )
    num_layers = config.get_text_config().num_hidden_layers
    unexpected = sorted(found["unexpected_keys"])
    surplus = [name for name in unexpected if any(int(n) >= num_layers for n in LAYER.findall(name))]
    if surplus:
        raise ConfigurationError(
            f"the weights in {folder} have more than the {num_layers} layers that config.json names ({surplus[0]}): "
            "give a folder whose weights belong to its config.json"
        )
    if unexpected:
        log.warning("%d tensors of the weights are not used, %s among them", len(unexpected), unexpected[0])


def _damage(folder: Path) -> str | None:
    """Which file of the weights cannot be read, if that is the trouble."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            return f"{path} is not a complete safetensors file ({error}): download or copy it again"
    return None


def _cannot_load(folder: Path, error: Exception, supported: str) -> str:
    """transformers' own words are long, and name ways out that are none here."""
    model_type = _model_type(folder)
    if model_type is not None and repr(model_type) in str(error).replace("`", "'"):
        known = f"transformers {version('transformers')}"
        return f"models of type {model_type!r} are unknown to {known}. Supported are {supported}"
    if "Unrecognized configuration class" in str(error):  # followed by the names of all that there are
        return f"models of type {model_type!r} are of no class that does this. Supported are {supported}"
    return f"transformers cannot load the model in {folder}: {error}"


def _model_type(folder: Path) -> str | None:
    try:
        model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return model_type if isinstance(model_type, str) else None
