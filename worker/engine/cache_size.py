"""How large the KV cache may be: what a full step leaves of the memory, measured by running one, and never guessed."""

from typing import Any

import numpy as np
import torch

from batching.block_manager import BlockManager
from batching.padded import PaddedScheduler
from batching.scheduler import Scheduler
from batching.sequence import Sequence
from protocol.errors import ConfigurationError
from protocol.frames import LogitTerms
from protocol.settings import EngineSettings
from worker.engine.attention import AttentionBackend
from worker.engine.kv_cache import block_bytes
from worker.engine.limits import Limits
from worker.engine.loader import LoadedModel
from worker.engine.memory import available_bytes, check_cache
from worker.engine.runner import Runner

#: On a CPU the cache competes with everything else on the machine: this many tokens a Sequence, and no more than this.
CPU_TOKENS_PER_SEQUENCE = 1024
CPU_MAX_BYTES = 1 << 30
#: Kept by the driver for the graphs' own descriptions, beside the memory that their tensors take.
GRAPH_BYTES = 1 << 29


def new_scheduler(
    loaded: LoadedModel, settings: EngineSettings, limits: Limits, num_blocks: int, block_size: int
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        max_model_len=loaded.max_model_len,
        admission=settings.admission,
        prefix_reuse=settings.prefix_reuse,
    )


def new_padded_scheduler(loaded: LoadedModel, limits: Limits, num_tokens: int) -> PaddedScheduler:
    return PaddedScheduler(
        num_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        max_model_len=loaded.max_model_len,
    )


def num_cache_blocks(
    loaded: LoadedModel, settings: EngineSettings, limits: Limits, backend: AttentionBackend, *, is_captured: bool
) -> int:
    """Raises ConfigurationError when nothing is left, or less than the settings ask for."""
    block_size = backend.block_size
    bytes_each = block_bytes(loaded.layers, block_size, loaded.kv_dtype)
    if settings.kv_tokens is not None:
        if settings.kv_tokens < block_size:
            raise ConfigurationError(
                f"engine.kv_tokens={settings.kv_tokens} is less than a block of {block_size} tokens: make it that or "
                "more"
            )
        check_cache(loaded.device, settings.kv_tokens // block_size * bytes_each, settings.kv_tokens, settings)
        return settings.kv_tokens // block_size
    if loaded.device.type != "cuda":
        return _cpu_tokens(loaded, settings, limits) // block_size or 1
    peak = _peak_bytes(loaded, settings, limits, backend, is_captured)
    return _left_beside(peak, bytes_each, loaded, settings, limits) // bytes_each - 1  # one is nobody's


def num_padded_tokens(loaded: LoadedModel, settings: EngineSettings, limits: Limits, runner: Runner) -> int:
    """Raises ConfigurationError as `num_cache_blocks`."""
    bytes_each = block_bytes(loaded.layers, 1, loaded.dtype)
    if settings.kv_tokens is not None:
        check_cache(loaded.device, settings.kv_tokens * bytes_each, settings.kv_tokens, settings)
        return settings.kv_tokens
    if loaded.device.type != "cuda":
        return _cpu_tokens(loaded, settings, limits)
    most = limits.max_num_seqs * loaded.max_model_len
    peak = _measure(loaded, limits, new_padded_scheduler(loaded, limits, most), runner)
    # Each step a layer's cache is copied into one that is longer by a column: for a moment it is there twice.
    bytes_each += -(-bytes_each // len(loaded.layers))
    return min(_left_beside(peak, bytes_each, loaded, settings, limits) // bytes_each, most)


def _cpu_tokens(loaded: LoadedModel, settings: EngineSettings, limits: Limits) -> int:
    """A cache that is always enough for some Sequences, and leaves the machine's other work its memory."""
    wanted = limits.max_num_seqs * min(loaded.max_model_len, CPU_TOKENS_PER_SEQUENCE)
    bytes_each = block_bytes(loaded.layers, 1, loaded.dtype)
    limit = min(CPU_MAX_BYTES, available_bytes(loaded.device, settings) // 2)
    return max(min(wanted, limit // bytes_each), 1)


def _left_beside(peak: int, bytes_each: int, loaded: LoadedModel, settings: EngineSettings, limits: Limits) -> int:
    available = available_bytes(loaded.device, settings) - peak
    if available < 2 * bytes_each:
        lacking = (2 * bytes_each - available) / torch.cuda.get_device_properties(loaded.device).total_memory
        raise ConfigurationError(
            f"engine.memory_fraction={settings.memory_fraction} leaves no memory for a KV cache beside the model and "
            f"steps of {limits.max_batch_tokens} tokens, which take {peak / 2**30:.2f} GiB: raise it by "
            f"{lacking:.3f} or more, or lower engine.max_batch_tokens or engine.max_num_seqs"
        )
    return available


def _peak_bytes(
    loaded: LoadedModel, settings: EngineSettings, limits: Limits, backend: AttentionBackend, is_captured: bool
) -> int:
    """What weights, graphs and the largest step take without the KV cache, measured by running the step.

    It is full, samples as many rows as may run, draws them all with top_p, whose sort takes most memory, has penalties
    and log-probabilities for all of them, and scores every token.
    """
    num_blocks = limits.max_num_seqs * -(-(_tokens_each(loaded, limits) + 1) // backend.block_size)
    scheduler = new_scheduler(loaded, settings, limits, num_blocks, backend.block_size)
    runner = Runner(loaded, backend, max_num_seqs=limits.max_num_seqs, num_blocks=1)
    peak = _measure(loaded, limits, scheduler, runner)
    cache_bytes = 2 * block_bytes(loaded.layers, backend.block_size, loaded.kv_dtype)
    return peak - cache_bytes + (_graph_bytes(runner) if is_captured else 0)


def _graph_bytes(runner: Runner) -> int:
    """What the graphs keep for themselves: as much as the largest needs while it runs, in which the others fit too."""
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    runner.decode.rehearse()
    peak = torch.cuda.max_memory_allocated(runner.device) - before
    torch.cuda.empty_cache()
    return peak + GRAPH_BYTES


def _tokens_each(loaded: LoadedModel, limits: Limits) -> int:
    return max(1, min(limits.max_batch_tokens // limits.max_num_seqs, loaded.max_model_len - 1))


def _measure(loaded: LoadedModel, limits: Limits, scheduler: Scheduler | PaddedScheduler, runner: Runner) -> int:
    """Bytes at the height of a full step. Raises ConfigurationError when there is no room for one."""
    num_each = _tokens_each(loaded, limits)
    for i in range(limits.max_num_seqs):
        prompt = np.zeros(num_each, dtype=np.int32)
        terms = LogitTerms(repetition_penalty=1.5)
        wishes: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 0.5,
            "terms": terms,
            "logprobs": 1,
            "score_from": 1,
            "num_top": 1,
        }
        scheduler.add(Sequence(i, prompt, max_tokens=1, **wishes))
    plan = scheduler.schedule()
    assert plan is not None
    plan.new_blocks = [(row, i, 0) for row, i, _ in plan.new_blocks]  # what they read does not matter, and it fits
    torch.cuda.reset_peak_memory_stats(loaded.device)
    try:
        runner.launch(plan).wait()
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"the memory has no room for a step of {limits.max_batch_tokens} tokens of {limits.max_num_seqs} Sequences "
            "beside the model: lower engine.max_batch_tokens or engine.max_num_seqs, or raise engine.memory_fraction"
        ) from error
    peak = torch.cuda.max_memory_allocated(loaded.device)
    torch.cuda.empty_cache()
    return peak
