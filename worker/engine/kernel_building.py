"""Kernel building: our kernels are compiled in a thread while torch compiles the layers, which takes about as long.

They are compiled by running them on nothing, in all the ways in which decode graphs will: Triton compiles anew for each
kind of argument, and a kernel that was not foreseen here is compiled where it is first needed.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from batching.shared_prefixes import MAX_MEMBERS
from protocol.settings import EngineSettings
from worker.engine.attention import AttentionBackend, AttentionStep, AttentionTerms, choose_backend
from worker.engine.graph_sizes import graph_sizes, sharing_sizes
from worker.engine.kernels.obstacle import triton_obstacle
from worker.engine.kernels.prefix_groups import PrefixGroups
from worker.engine.kv_cache import KVCache, LayerShape
from worker.engine.limits import step_limits

log = logging.getLogger("millrace.engine")

#: Of the prompt that builds what prompts need.
_PROMPT_TOKENS = 48


@contextmanager
def building_kernels(
    layers: list[LayerShape],
    num_heads: int,
    vocab_size: int,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    settings: EngineSettings,
) -> Iterator[None]:
    """The kernels are built meanwhile, and are there at the end. One that fails is compiled again where it is needed,
    and fails there for all to see."""
    if triton_obstacle(device) is not None:
        yield
        return
    _keep_one_cache()

    def build() -> None:
        from worker.engine.kernels.sampling import build as build_sampler

        try:
            with torch.inference_mode(), torch.cuda.device(device):
                build_sampler(vocab_size, dtype, device)
                backend = choose_backend(settings.attention, device, dtype)
                if backend.is_capturable:
                    num_rows = step_limits(settings, device).max_num_seqs
                    build_attention(backend, layers, num_heads, max_model_len, num_rows, dtype, device)
        except Exception:
            log.exception("kernels cannot be compiled in advance")

    thread = threading.Thread(target=build, name="build", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def build_attention(
    backend: AttentionBackend,
    layers: list[LayerShape],
    num_heads: int,
    max_model_len: int,
    max_num_seqs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Decode at every size of a graph, with shared prefixes where there are such graphs, and a prompt."""
    sizes = graph_sizes(max_num_seqs)
    max_blocks = -(-max_model_len // backend.block_size)
    for shape in set(layers):
        if num_heads % shape.num_kv_heads:
            continue
        cache = KVCache([shape], 2, backend.block_size, device, dtype)
        steps = [(size, 0, False) for size in sizes]
        steps += [(size, 0, True) for size in (sharing_sizes(sizes) if backend.shares_prefixes else [])]
        for num_rows, num_tokens, is_sharing in [*steps, (0, min(_PROMPT_TOKENS, max_model_len), False)]:
            step = _step_of_nothing(cache, backend, num_rows, num_tokens, max_blocks, device, is_sharing=is_sharing)
            num = num_rows + num_tokens
            query = torch.zeros(num, num_heads, shape.head_dim, dtype=dtype, device=device)
            key, value = torch.zeros(2, num, shape.num_kv_heads, shape.head_dim, dtype=dtype, device=device)
            step.attend(0, query, key, value, AttentionTerms(shape.head_dim**-0.5))


def _step_of_nothing(
    cache: KVCache,
    backend: AttentionBackend,
    num_rows: int,
    num_tokens: int,
    max_blocks: int,
    device: torch.device,
    *,
    is_sharing: bool,
) -> AttentionStep:
    """`num_rows` rows that decode their first token, or a prompt of `num_tokens`."""
    prefixes, num_tiles = None, max(num_rows // 2, 1)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    if is_sharing:
        members = torch.full((num_tiles, MAX_MEMBERS), -1, **ints)
        prefixes = PrefixGroups(members, torch.zeros(num_tiles, **ints), torch.zeros(num_rows, **ints))
    lens = np.array([num_tokens] if num_tokens else [], dtype=np.int64)
    cu_lens = torch.tensor([0, *lens.tolist()], **ints)
    return AttentionStep(
        cache=cache,
        backend=backend,
        num_decode=num_rows,
        slots=torch.zeros(num_rows + num_tokens, dtype=torch.int64, device=device),
        decode_tables=torch.zeros(num_rows, max_blocks, **ints),
        decode_lens=torch.ones(num_rows, **ints),
        prefill_tables=torch.zeros(len(lens), max_blocks, **ints),
        cu_query_lens=cu_lens,
        cu_kv_lens=cu_lens,
        decode_kv_lens=None,
        query_lens=lens,
        kv_lens=lens,
        prefixes=prefixes,
    )


def _keep_one_cache() -> None:
    """Triton's own folder for all compiled kernels. torch.compile would set another one in passing, whenever it first
    has something to compile: what is compiled after that would not be found by a process that has nothing to."""
    from triton import knobs

    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
