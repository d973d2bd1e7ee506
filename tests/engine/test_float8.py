"""A KV cache of float8: exactly what rounding every key and value to it gives, and half the bytes or less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import ConfigurationError
from tests.engine.reference import build_model, drive, new_sequence, random_prompts, settings_for
from worker.engine import attention
from worker.engine.attention import choose_backend
from worker.engine.engine import Engine
from worker.engine.kv_cache import KVCache, LayerShape, block_bytes, to_cache_dtype

FLOAT8 = torch.float8_e4m3fn


def test_texts_are_those_of_rounded_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model("qwen3").save_pretrained(tmp_path)
    stem = random_prompts(1, seed=3, max_len=40)[0] * 2
    prompts = [stem[:37] + end for end in random_prompts(6, seed=4, max_len=20)]
    sequences = [new_sequence(i, prompt, 40) for i, prompt in enumerate(prompts)]
    # Prefixes end within blocks, which are copied then; and there is so little room that some are preempted.
    sequences += [new_sequence(9, prompts[0], 40, sample=1, temperature=1.0, seed=5)]

    engine = Engine.start(settings_for(tmp_path, kv_dtype="float8", kv_tokens=208))
    found = drive(engine, sequences, wave=7)

    assert engine.attention_name == "sdpa"
    assert engine.scheduler.num_preemptions > 0
    assert found.num_prefix_hit_tokens > 0
    own_write = KVCache.write

    def write(self: Any, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (to_cache_dtype(x, FLOAT8).to(x.dtype) for x in (key, value))
        return own_write(self, layer, slots, key, value)

    plain = Engine.start(settings_for(tmp_path, attention="sdpa", kv_tokens=208))
    exact = drive(plain, sequences, wave=7)
    monkeypatch.setattr(KVCache, "write", write)
    rounded = Engine.start(settings_for(tmp_path, attention="sdpa", kv_tokens=208))
    assert found.outputs == drive(rounded, sequences, wave=7).outputs
    assert found.outputs != exact.outputs, "rounding must be seen, or nothing is compared"
    assert engine.fingerprint != plain.fingerprint


def test_the_cache_takes_half_of_what_16_bits_take() -> None:
    shapes = [LayerShape(2, 8), LayerShape(4, 16)]
    cache = KVCache(shapes, 3, 16, torch.device("cpu"), FLOAT8)

    assert 2 * block_bytes(shapes, 16, FLOAT8) == block_bytes(shapes, 16, torch.bfloat16)
    assert sum(x.nbytes for pair in cache._layers for x in pair) == 3 * block_bytes(shapes, 16, FLOAT8)


def test_what_is_beyond_float8_becomes_its_largest_number() -> None:
    assert to_cache_dtype(torch.tensor([1e4, -1e4, 448.0, 3.1]), FLOAT8).tolist() == [448.0, -448.0, 448.0, 3.0]


@pytest.mark.parametrize(
    ("name", "capability", "problem"),
    [
        ("flash-attn-2", (9, 0), "flash-attn-2 reads no float8"),
        ("triton", (8, 0), "older than compute capability 8.9"),
        ("triton", (8, 9), None),
        ("auto", (9, 0), None),
    ],
)
def test_backends_that_read_no_float8_say_so(
    name: str, capability: tuple[int, int], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(attention, "flash_attention_obstacle", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    if problem is None:
        assert choose_backend(name, torch.device("cuda"), torch.bfloat16, FLOAT8).name == "triton"
    else:
        with pytest.raises(ConfigurationError, match=problem):
            choose_backend(name, torch.device("cuda"), torch.bfloat16, FLOAT8)


def test_the_padded_layout_keeps_what_transformers_keeps(tmp_path: Path) -> None:
    build_model("qwen3").save_pretrained(tmp_path)

    with pytest.raises(ConfigurationError, match=r"engine\.kv_dtype='float8' is for the packed layout.*use auto"):
        Engine.start(settings_for(tmp_path, kv_dtype="float8", layout="padded"))
