"""KVCache: the tensors that hold K and V of every token, one pair per layer, and how large they may be.

Letters: T tokens, N blocks, B block size, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.kernels.obstacle import triton_obstacle

#: The largest number of float8_e4m3fn; what is beyond would become no number.
_MOST_FLOAT8 = 448.0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Seen at load, layer by layer, since models may differ from layer to layer."""

    num_kv_heads: int
    head_dim: int


class KVCache:
    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_fused = triton_obstacle(device) is None
        # Zeros: gathered padding is masked, but 0 * NaN from uninitialised memory would still be NaN.
        self._layers = [
            tuple(
                torch.zeros(
                    num_blocks, block_size, shape.num_kv_heads, shape.head_dim, device=device, dtype=_moved_as(dtype)
                ).view(dtype)
                for _ in range(2)
            )
            for shape in layers
        ]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put key and value (T, G, E) at `slots` (T,); returns the layer's caches (N, B, G, E)."""
        k_cache, v_cache = self._layers[layer]
        if self._is_fused:
            from worker.engine.kernels.kv_write import write_kv

            write_kv(key, value, k_cache, v_cache, slots)
        else:
            for cache, x in ((k_cache, key), (v_cache, value)):
                moved = _moved_as(cache.dtype)
                cache.view(moved).flatten(0, 1).index_copy_(0, slots, to_cache_dtype(x, cache.dtype).view(moved))
        return k_cache, v_cache

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Whole blocks, in every layer; no block is in both (int64)."""
        for caches in self._layers:
            for cache in caches:
                blocks = cache.view(_moved_as(cache.dtype))
                blocks.index_copy_(0, targets, blocks.index_select(0, sources))


def to_cache_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """K or V as the cache keeps them; the nearest number that there is."""
    return x.clamp(-_MOST_FLOAT8, _MOST_FLOAT8).to(dtype) if dtype == torch.float8_e4m3fn else x


def read_blocks(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Those of a layer's cache (N, B, G, E), to compute in `dtype`; blocks are (n,), the result is (n, B, G, E)."""
    return cache.view(_moved_as(cache.dtype)).index_select(0, blocks).view(cache.dtype).to(dtype)


def _moved_as(dtype: torch.dtype) -> torch.dtype:
    """torch moves and fills no float8 by index."""
    return torch.uint8 if dtype == torch.float8_e4m3fn else dtype


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    return sum(2 * block_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize for shape in layers)
