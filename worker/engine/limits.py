"""Limits of a step: the settings' where they are set, and what suits the device where they are not."""

from dataclasses import dataclass

import torch

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine.kernels.multiprocessors import num_multiprocessors

#: (Sequences, tokens) of a step. A GPU reads its weights once for all rows, so more rows are nearly free; a CPU's cache
#: would not hold them, and a call would wait long for the end of such a step. A GPU's tokens are rounded: see below.
_GPU = (1024, 16_384)
_CPU = (256, 2048)
#: Where texts must be whole in their step, the longest decides.
_CPU_WHOLE = (256, 8192)
#: Rows of the tiles in which GPUs compute products.
_TILE = 128


@dataclass(frozen=True, slots=True)
class Limits:
    max_num_seqs: int  # no more than tokens: every running Sequence gets its one token per step
    max_batch_tokens: int


def step_limits(settings: EngineSettings, device: torch.device, *, is_whole: bool = False) -> Limits:
    """`is_whole`: texts are not cut into pieces."""
    if device.type == "cuda":
        num_seqs, num_tokens = _GPU[0], _GPU[1] if is_whole else most_tokens(device)
    else:
        num_seqs, num_tokens = _CPU_WHOLE if is_whole else _CPU
    max_batch_tokens = num_tokens if settings.max_batch_tokens is None else settings.max_batch_tokens
    max_num_seqs = num_seqs if settings.max_num_seqs is None else settings.max_num_seqs
    return Limits(min(max_num_seqs, max_batch_tokens), max_batch_tokens)


def most_tokens(device: torch.device) -> int:
    """Of a GPU's step where nothing is set: a row of tiles for each multiprocessor, or some.

    Then they end together, whatever the number of columns is. Of 128 rows of 16 tiles, 132 multiprocessors would do 15
    rounds and half a one.
    """
    round_tokens = _TILE * num_multiprocessors(device)
    return round_tokens * max(round(_GPU[1] / round_tokens), 1)


def check_limits(settings: EngineSettings) -> None:
    """Raises ConfigurationError."""
    # A Sequence is a prompt of one token and an output of one, at least.
    limits = {"max_batch_tokens": 1, "max_num_seqs": 1, "max_model_len": 2, "kv_tokens": 2, "num_threads": 1}
    for name, least in limits.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ConfigurationError(f"engine.{name}={value} is too small: it must be at least {least}")
    if settings.lookahead not in (None, 0, 1):
        raise ConfigurationError(f"engine.lookahead={settings.lookahead} is out of range: it is 0 or 1")
    if not 0 < settings.memory_fraction <= 1:
        raise ConfigurationError(
            f"engine.memory_fraction={settings.memory_fraction} is out of range: it must be above 0 and at most 1"
        )
