"""KV write against its twin. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

import pytest
import torch

from worker.engine.kernels import kv_write
from worker.engine.kernels.plain import plain_write_kv
from worker.engine.kv_cache import to_cache_dtype


@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(2, 16, 16), (3, 24, 32), (1, 80, 256)])
@pytest.mark.parametrize("is_many", [False, True])
def test_write_equals_its_twin(
    heads: int, head_dim: int, block_size: int, is_many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_write, "_MANY", 1 if is_many else 1 << 30)
    torch.manual_seed(0)
    fused = torch.randn(11, 4 * heads, head_dim)
    key, value = fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads :]
    k_cache, v_cache = torch.randn(2, 5, block_size, heads, head_dim)
    expected = k_cache.clone(), v_cache.clone()
    slots = torch.randperm(5 * block_size)[:11]
    slots[[3, 10]] = -1

    plain_write_kv(key, value, *expected, slots)
    kv_write.write_kv(key, value, k_cache, v_cache, slots)
    kv_write.write_kv(key[:0], value[:0], k_cache, v_cache, slots[:0])

    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])


def test_float8_gets_the_nearest_number_there_is() -> None:
    torch.manual_seed(0)
    # Near to what float8 has, since the interpreter rounds none up to a power of two.
    key, value = (torch.randn(2, 9, 2, 16).to(torch.float8_e4m3fn).float() * 1.01).half()
    key[0, 0, :4] = torch.tensor([500.0, -6e4, 448.0, 1e-7])
    caches = torch.zeros(2, 3, 16, 2, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    slots = torch.randperm(3 * 16)[:9]

    kv_write.write_kv(key, value, caches[0], caches[1], slots)

    for cache, x in zip(caches, (key, value), strict=True):
        assert torch.equal(cache.float().flatten(0, 1)[slots], to_cache_dtype(x, cache.dtype).float())
    assert caches[0].float().flatten(0, 1)[slots[0], 0, :4].tolist() == [448.0, -448.0, 448.0, 0.0]
