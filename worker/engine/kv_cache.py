"""KVCache: the tensors that hold K and V of every token, one pair per layer, and how large they may be.

Letters: T tokens, N blocks, B block size, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.kernels.obstacle import triton_obstacle


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
                torch.zeros(num_blocks, block_size, shape.num_kv_heads, shape.head_dim, device=device, dtype=dtype)
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
            k_cache.flatten(0, 1).index_copy_(0, slots, key)
            v_cache.flatten(0, 1).index_copy_(0, slots, value)
        return k_cache, v_cache

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Whole blocks, in every layer; no block is in both (int64)."""
        for caches in self._layers:
            for cache in caches:
                cache.index_copy_(0, targets, cache.index_select(0, sources))


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    return sum(2 * block_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize for shape in layers)
