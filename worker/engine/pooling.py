"""Pooling: how the tokens of a text become one vector, by what a model's folder says, and done.

A folder made by sentence-transformers lists its modules in modules.json; the pooling among them has a config of its
own. Letters: N texts, T tokens in a flat row, R rows, W columns, E hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings

Pooling = Literal["mean", "last", "cls"]

#: sentence-transformers' names, in the two forms in which its files have been written.
_MODES: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class StatedPooling:
    """What the folder says; None where it says nothing."""

    pooling: Pooling | None = None
    is_normalized: bool | None = None
    max_tokens: int | None = None


def read_pooling(folder: Path, settings: EngineSettings) -> StatedPooling:
    """Raises ConfigurationError when the folder asks for something that is not computed here, and the settings for
    nothing else."""
    modules = _read(folder / "modules.json")
    if modules is None:
        return StatedPooling()
    pooling: Pooling | None = None
    is_normalized = False
    for module in modules if isinstance(modules, list) else []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling" and settings.pooling == "auto":
            pooling = _pooling_of(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            is_normalized = True
        elif kind not in ("Transformer", "Pooling"):
            raise ConfigurationError(
                f"{folder / 'modules.json'} asks for a module {kind!r}, which the engine does not compute: it computes "
                "Transformer, Pooling and Normalize"
            )
    limits = _read(folder / "sentence_bert_config.json") or {}
    return StatedPooling(pooling, is_normalized, limits.get("max_seq_length"))


def choose_pooling(stated: StatedPooling, settings: EngineSettings, *, is_causal: bool) -> Pooling:
    """The settings, then the folder, then what suits the model: under causal attention the last token alone has seen
    the whole text."""
    if settings.pooling != "auto":
        return _checked(settings.pooling)
    return stated.pooling or ("last" if is_causal else "mean")


def pool_flat(hidden: Tensor, pooling: Pooling, cu_lens: Tensor) -> Tensor:
    """hidden (T, E), cu_lens (N + 1,) -> (N, E) float32."""
    if pooling == "cls":
        return hidden.index_select(0, cu_lens[:-1]).float()
    if pooling == "last":
        return hidden.index_select(0, cu_lens[1:] - 1).float()
    # Sums in the order of the tokens, unlike index_add on a GPU: the same text has the same embedding each time.
    return torch.segment_reduce(hidden.float(), "mean", lengths=cu_lens.diff().long(), axis=0)


def pool_rows(hidden: Tensor, pooling: Pooling, lens: Tensor) -> Tensor:
    """hidden (R, W, E) of texts that begin in the first column, lens (R,) -> (R, E) float32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last":
        return hidden[torch.arange(len(lens), device=hidden.device), lens - 1].float()
    is_text = torch.arange(hidden.shape[1], device=hidden.device) < lens[:, None]
    return (hidden.float() * is_text.unsqueeze(-1)).sum(dim=1) / lens[:, None]


def _pooling_of(path: Path) -> Pooling:
    config = _read(path)
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} is missing or no JSON object: modules.json names it for the pooling")
    named = config.get("pooling_mode")
    asked = [named] if isinstance(named, str) else [name for name, is_on in config.items() if is_on is True]
    known = [mode for name in asked if (mode := {**_MODES, **_FLAGS}.get(name)) is not None]
    others = [name for name in asked if name.startswith("pooling_mode") and name not in _FLAGS]
    if len(known) != 1 or others:
        wishes = ", ".join(str(name) for name in asked) or "nothing"
        raise ConfigurationError(
            f"{path} asks for the pooling {wishes}; the engine computes one of {', '.join(_FLAGS)}: "
            "set engine.pooling to mean, last or cls if that is what is wanted"
        )
    return known[0]


def _checked(name: str) -> Pooling:
    if name not in ("mean", "last", "cls"):
        raise ConfigurationError(f"engine.pooling={name!r} is unknown: it is one of auto, mean, last, cls")
    return name  # type: ignore[return-value]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
