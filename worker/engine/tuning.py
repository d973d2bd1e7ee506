"""Tuning: what a machine does with a model at given limits of a step, measured while there is always more to do.

One loaded model serves all measurements; each has an engine, and so a KV cache and graphs, of its own.
"""

import gc
import time
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from protocol.errors import ConfigurationError
from protocol.frames import NewSequence, StepFrame
from protocol.settings import EngineSettings
from worker.engine.engine import Engine
from worker.engine.limits import most_tokens
from worker.engine.loader import LoadedModel, load_model
from worker.engine.model_files import resolve_folder
from worker.engine.task import choose_task

#: Limits that are tried: (Sequences, tokens) of a step; on a GPU what it takes if nothing is set as well.
GPU_LIMITS = ([128, 256, 512, 1024], [4096, 8192])
CPU_LIMITS = ([16, 64, 256], [512, 2048, 8192])
#: Of two that give nearly as many tokens, the one that answers sooner is better.
_NEARLY = 0.98


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured at one pair of limits."""

    max_num_seqs: int
    max_batch_tokens: int
    output_tokens_per_s: float
    computed_tokens_per_s: float  # those of prompts included
    latency_ms: float  # between two tokens of a Sequence: the median time of a step
    slowest_ms: float  # of 99 in 100 steps
    kv_tokens: int


class Tuner:
    """Raises ConfigurationError when the model or the settings do not fit the machine."""

    def __init__(self, settings: EngineSettings) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self._settings = settings
        folder = resolve_folder(settings.model, settings.revision)
        if (task := choose_task(folder, settings)) != "generate":
            raise ConfigurationError(
                f"{settings.model} is a model to {task}, and what is measured are limits of models that generate: set "
                "engine.max_batch_tokens of this one to the longest text that it is to take, or more"
            )
        self._loaded: LoadedModel = load_model(folder, settings)
        self.is_cuda = self._loaded.device.type == "cuda"

    @property
    def limits(self) -> tuple[list[int], list[int]]:
        """(Sequences, tokens) that are worth trying here."""
        if not self.is_cuda:
            return CPU_LIMITS
        num_seqs, num_tokens = GPU_LIMITS
        return num_seqs, [*num_tokens, most_tokens(self._loaded.device)]

    def measure(self, max_num_seqs: int, max_batch_tokens: int, seconds: float, num_tokens: int) -> Point:
        """Prompts and outputs of `num_tokens` on average, for so many seconds after the rows are full or nearly so."""
        changes = {"max_num_seqs": max_num_seqs, "max_batch_tokens": max_batch_tokens}
        try:
            engine = Engine(self._loaded, msgspec.structs.replace(self._settings, **changes))
            return self._run(engine, max_num_seqs, max_batch_tokens, seconds, num_tokens)
        finally:
            engine = None  # type: ignore[assignment]  # its memory is free before the next one takes its own
            if self.is_cuda:
                torch.cuda.synchronize(self._loaded.device)
            gc.collect()
            if self.is_cuda:
                torch.cuda.empty_cache()

    def _run(self, engine: Engine, max_num_seqs: int, max_batch_tokens: int, seconds: float, num_tokens: int) -> Point:
        longest = min(2 * num_tokens, self._loaded.max_model_len // 2, engine.scheduler.blocks.capacity // 2)
        if longest < 2:
            raise ConfigurationError("the KV cache is too small to measure anything: raise engine.kv_tokens")
        load = Load(engine, longest)
        load.fill(seconds)
        times: list[float] = []
        num_output = num_computed = 0
        started = last = time.perf_counter()
        while not times or last - started < seconds:
            frame = load.step()
            now = time.perf_counter()
            if frame is not None:
                times.append(now - last)
                num_output += len(frame.token_ids) // 4
                num_computed += frame.num_scheduled_tokens
            last = now
        elapsed = last - started
        return Point(
            max_num_seqs,
            max_batch_tokens,
            num_output / elapsed,
            num_computed / elapsed,
            1e3 * float(np.median(times)),
            1e3 * float(np.quantile(times, 0.99)),
            engine.scheduler.blocks.capacity,
        )


class Load:
    """Always more Sequences than an engine may run, of 1 to `longest` random tokens, and as many to come."""

    def __init__(self, engine: Engine, longest: int) -> None:
        self._engine = engine
        self._longest = longest
        self._rng, self._next_id = np.random.default_rng(0), 0

    def step(self) -> StepFrame | None:
        engine, rng = self._engine, self._rng
        while engine.scheduler.num_waiting < engine.scheduler.max_num_seqs:
            self._next_id += 1
            prompt = rng.integers(0, engine.loaded.vocab_size, int(rng.integers(1, self._longest + 1)))
            token_ids, num_out = prompt.astype("<i4").tobytes(), int(rng.integers(1, self._longest + 1))
            engine.add(NewSequence(self._next_id, token_ids, num_out, (), 1.0, 1.0, 0, self._next_id, 0))
        return engine.step()

    def fill(self, seconds: float) -> None:
        """Steps until there is no room for more rows, or so much time has passed."""
        scheduler, started = self._engine.scheduler, time.perf_counter()
        while time.perf_counter() - started <= seconds:
            num_running = scheduler.num_running
            frame = self.step()
            # Where the tokens of a step were too few, the next one may still have room for a row.
            has_tokens_left = frame is not None and frame.num_scheduled_tokens < scheduler.max_batch_tokens
            is_growing = scheduler.num_running != num_running or not num_running
            if scheduler.num_running >= scheduler.max_num_seqs or (has_tokens_left and not is_growing):
                return


def best_of(points: list[Point]) -> Point:
    """The most output tokens; of those that give nearly as many, the one with the least latency."""
    most = max(point.output_tokens_per_s for point in points)
    return min(
        (point for point in points if point.output_tokens_per_s >= _NEARLY * most), key=lambda point: point.latency_ms
    )
