"""Attention over the paged KV cache, registered in transformers' AttentionInterface under one name.

A step's context is not handed through the model's forward: `running` names it, and compiled layers come back to it
through one custom operator. What the model itself asks of its attention (scale, window, softcap) is honoured; anything
else it hands over is refused: an ignored term would be a wrong answer.

Letters: T tokens of the step, D decode rows, S prefill pieces, P their tokens, H query heads, G key/value heads, E head
size, N blocks, B block size, M blocks per table.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from protocol.errors import ConfigurationError
from worker.engine.kernels.obstacle import triton_obstacle
from worker.engine.kernels.prefix_groups import PrefixGroups
from worker.engine.kv_cache import KVCache

log = logging.getLogger("millrace.engine")

#: The implementation's name.
NAME = "millrace"
#: The buffer in which a compiled layer's attention finds its number; as a plain int it would be compiled in.
LAYER_BUFFER = "millrace_layer"

#: What engine.attention may be.
BACKENDS = ("auto", "sdpa", "sparse", "flash-attn-2", "triton")

#: Keywords that models pass on and that change nothing here: positions are in the queries and keys already, dropout
#: is zero outside training, and the cache is ours.
_IGNORED = frozenset(
    {
        "cache_position",
        "deterministic",  # of gradients
        "dropout",
        "is_causal",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """What a layer asks of its attention beyond causality."""

    scale: float
    window: int | None = None  # tokens attended to, the query's own included
    softcap: float | None = None
    is_causal: bool = True  # else all tokens of a text attend to each other, those within a window to both sides


class AttentionBackend(Protocol):
    name: str
    block_size: int
    #: Decode asks the host for nothing, so that it can be captured in a CUDA graph.
    is_capturable: bool
    #: Decode reads once what several rows begin with, given the step's `prefixes`.
    shares_prefixes: bool

    # Either takes the step's own K and V from the caches, (N, B, G, E) each: they are there already.

    def decode(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: "AttentionStep", terms: AttentionTerms
    ) -> Tensor:
        """query (D, H, E) of the decode rows, of which there are some; result (D, H, E)."""

    def attend_pieces(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, step: "AttentionStep", terms: AttentionTerms
    ) -> Tensor:
        """query (P, H, E) of the prefill pieces, of which there are some; result (P, H, E)."""


class Step(Protocol):
    """What runs: the engine's step, or the probe's."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        """query (T, H, E), key and value (T, G, E), result (T, H, E)."""


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where a step's tokens are written and what they attend to. Decode rows first, then prefill pieces."""

    cache: KVCache
    backend: AttentionBackend
    num_decode: int
    slots: Tensor  # (T,) int64
    decode_tables: Tensor  # (D, M) int32
    decode_lens: Tensor  # (D,) int32, this step's token included
    prefill_tables: Tensor  # (S, M) int32
    # Lengths on the host, so that no backend has to ask the device.
    decode_kv_lens: npt.NDArray[np.int64] | None  # (D,); None in a step that is captured
    query_lens: npt.NDArray[np.int64]  # (S,)
    kv_lens: npt.NDArray[np.int64]  # (S,)
    prefixes: PrefixGroups | None = None  # of the decode rows
    duplicates: tuple[Tensor, Tensor] | None = None  # (U,) tokens and further slots for their K and V, int64
    #: What the backend works out once for all layers of the step.
    plans: dict[Any, Any] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        k_cache, v_cache = self.cache.write(layer, self.slots, key, value)
        if self.duplicates is not None:
            tokens, slots = self.duplicates
            self.cache.write(layer, slots, key.index_select(0, tokens), value.index_select(0, tokens))
        parts: list[Tensor] = []
        if self.num_decode:
            parts.append(self.backend.decode(query[: self.num_decode], k_cache, v_cache, self, terms))
        if len(self.query_lens):
            parts.append(self.backend.attend_pieces(query[self.num_decode :], k_cache, v_cache, self, terms))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


_running: Step | None = None
#: Names that transformers knows from here.
_registered: set[str] = set()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Attention within is `step`'s. One step runs at a time: an engine has one thread."""
    global _running
    assert _running is None
    _running = step
    try:
        yield
    finally:
        _running = None


class Attend(Protocol):
    """What stands in for a model's attention."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, carried: Any
    ) -> Tensor:
        """query (T, H, E), key and value (T, G, E), result (T, H, E)."""


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    register_as(NAME, _attend_in_step)


def register_as(
    name: str, attend: Attend, keyword: str | None = None, make_mask: Callable[..., Tensor] | None = None
) -> None:
    """Make `attn_implementation=name` known to transformers; `keyword` is one that the model's forward carries to it.

    What `make_mask` makes is carried in its place. Without it there must be no mask function under that name, so that
    transformers builds no mask at all.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module,
        query: Tensor,  # (1, H, T, E)
        key: Tensor,  # (1, G, T, E)
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        carried = None if keyword is None else others.pop(keyword, None)
        if make_mask is not None:
            carried, attention_mask = attention_mask, None
        terms = terms_of(module, query, attention_mask, scaling, sliding_window, softcap, others)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend(module, q, k, v, terms, carried).unsqueeze(0), None

    if make_mask is None:
        assert name not in ALL_MASK_ATTENTION_FUNCTIONS
    else:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, make_mask)
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    _registered.add(name)


def leave_to(model: Any) -> None:
    """A model that takes no attention of others runs its own, with masks that are made by the name in its config."""
    if model.config._attn_implementation in _registered:  # else it is one that transformers chose for it
        model.config._attn_implementation = "eager"


def _attend_in_step(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, carried: Any
) -> Tensor:
    if not terms.is_causal:
        raise ConfigurationError(f"{type(module).__name__} asks its attention for is_causal=False: it is no decoder")
    if torch.compiler.is_compiling():
        layer_number, window, limit = getattr(module, LAYER_BUFFER), terms.window or 0, terms.softcap or 0.0
        output: Tensor = torch.ops.millrace.attend(query, key, value, layer_number, terms.scale, window, limit)
        return output
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ConfigurationError(f"{type(module).__name__} does not know which layer it is")
    assert _running is not None, "the model was run outside a step"
    return _running.attend(layer, query, key, value, terms)


@torch.library.custom_op("millrace::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Opaque to the compiler: attention of the step that runs when the compiled code does. `layer` is on the CPU."""
    assert _running is not None, "the model was run outside a step"
    terms = AttentionTerms(scale, window or None, softcap or None)
    return _running.attend(int(layer), query, key, value, terms).contiguous()


@_attend.register_fake
def _shape_of(
    query: Tensor, key: Tensor, value: Tensor, layer: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    return query.new_empty(query.shape)


def terms_of(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    others: Mapping[str, Any],
) -> AttentionTerms:
    """What a layer asks for. Raises ConfigurationError for anything in `others` that is not computed here."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise ConfigurationError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which the engine does not compute"
        )
    is_causal = others.get("is_causal")
    return AttentionTerms(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap,
        bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
    )


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> AttentionBackend:
    """The backend called `name`, or the fastest that runs here for "auto". `kv_dtype` is the cache's, if not `dtype`.

    Raises ConfigurationError for an unknown name and for one that cannot run here.
    """
    if name not in BACKENDS:
        raise ConfigurationError(f"engine.attention={name!r} is unknown: it is one of {', '.join(BACKENDS)}")
    obstacles = {
        "triton": triton_obstacle(device),
        "flash-attn-2": flash_attention_obstacle(device, dtype),
        "sparse": sparse_obstacle(device, dtype),
    }
    if kv_dtype == torch.float8_e4m3fn:
        obstacles = {name: obstacle or _float8_obstacle(name, device) for name, obstacle in obstacles.items()}
    if obstacle := obstacles.get(name):
        raise ConfigurationError(f"engine.attention={name!r} cannot run here: {obstacle}; use auto or sdpa")
    if name == "auto":
        name = next((faster for faster, obstacle in obstacles.items() if obstacle is None), "sdpa")
        if device.type == "cuda" and name != "triton":
            log.warning("a faster attention backend cannot run: %s", obstacles["triton"])
    if name == "triton":
        from worker.engine.backends.triton import TritonBackend

        return TritonBackend()
    if name == "flash-attn-2":
        from worker.engine.backends.flash_attention import FlashAttentionBackend

        return FlashAttentionBackend()
    if name == "sparse":
        from worker.engine.backends.sparse import SparseBackend

        return SparseBackend()
    from worker.engine.backends.sdpa import SDPABackend

    return SDPABackend()


def _float8_obstacle(name: str, device: torch.device) -> str | None:
    """Why a backend that runs here cannot read a KV cache of float8; None where it can."""
    if name != "triton":
        return f"{name} reads no float8, which engine.kv_dtype asks for"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.9, which float8 needs"
    return None


def sparse_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why decode cannot run on sparse matrices here; None where it can, and then it is faster than gathering."""
    if device.type != "cpu":
        return f"the device is {device}, and sparse is for the CPU"
    if dtype != torch.float32:
        return f"torch's sparse products are in float32, not in {str(dtype).removeprefix('torch.')}"
    return None


def flash_attention_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn does not run here; None where it does."""
    if device.type != "cuda":
        return f"the device is {device}, and flash-attn needs CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        return f"the package flash-attn does not load ({error})"
    return None
