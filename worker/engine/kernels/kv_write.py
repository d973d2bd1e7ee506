"""KV write: a step's keys and values to their slots in one launch.

Letters: T tokens, G key/value heads, E head size, N blocks, B block size.
"""

import triton
import triton.language as tl
from torch import Tensor

#: Tokens per program where there are enough of them to fill the device.
_MANY, _PER_PROGRAM = 4096, 4


def write_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """key and value (T, G, E) to `slots` (T,) int64 of the caches (N, B, G, E); a negative slot is not written.

    Strides are free but for the last. Caches of float8 get the nearest number that there is.
    """
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    per_program = _PER_PROGRAM if num_tokens >= _MANY else 1
    _write[(triton.cdiv(num_tokens, per_program),)](
        key,
        value,
        k_cache,
        v_cache,
        slots,
        num_tokens,
        *key.stride()[:2],
        *value.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        BLOCK=k_cache.shape[1],
        TOKENS=per_program,
        HEADS=num_heads,
        HEADS_PAD=triton.next_power_of_2(num_heads),
        HEAD=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_tokens"])  # or each new kind of number would be compiled for
def _write(
    key,
    value,
    k_cache,
    v_cache,
    slots,
    num_tokens,
    key_token,
    key_head,
    value_token,
    value_head,
    k_block,
    k_token,
    k_head,
    v_block,
    v_token,
    v_head,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    index = tl.arange(0, TOKENS * HEADS_PAD)
    token = tl.program_id(0) * TOKENS + index // HEADS_PAD
    head = index % HEADS_PAD
    e_index = tl.arange(0, HEAD_PAD)[None, :]
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    is_written = (slot >= 0) & (head < HEADS)
    block, offset = slot // BLOCK, slot % BLOCK
    mask = is_written[:, None] & (e_index < HEAD)
    token = token.to(tl.int64)
    k = tl.load(key + (token * key_token + head * key_head)[:, None] + e_index, mask=mask)
    v = tl.load(value + (token * value_token + head * value_head)[:, None] + e_index, mask=mask)
    if k_cache.dtype.element_ty == tl.float8e4nv:
        k, v = tl.clamp(k.to(tl.float32), -448.0, 448.0), tl.clamp(v.to(tl.float32), -448.0, 448.0)
    k, v = k.to(k_cache.dtype.element_ty), v.to(v_cache.dtype.element_ty)
    tl.store(k_cache + (block * k_block + offset * k_token + head * k_head)[:, None] + e_index, k, mask=mask)
    tl.store(v_cache + (block * v_block + offset * v_token + head * v_head)[:, None] + e_index, v, mask=mask)
