"""The Triton kernels: held to their twins by an interpreter, and compiled for a GPU that need not be here."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worker.engine import attention
from worker.engine.decode_step import graph_sizes
from worker.engine.kernels.obstacle import compiler_obstacle

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    if os.environ.get("CI") == "true":
        raise ImportError("triton is not installed, and CI must have it")
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "has_triton", "chosen"),
    [
        ("auto", True, "triton"),
        ("triton", True, "triton"),
        ("auto", False, "sdpa"),
        ("sdpa", True, "sdpa"),
    ],
)
def test_the_backend_is_the_fastest_that_runs(
    name: str, has_triton: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "triton_obstacle", lambda device: None if has_triton else "it is not here")
    monkeypatch.setattr(attention, "flash_attention_obstacle", lambda *_: "it is not here")

    assert attention.choose_backend(name, torch.device("cuda"), torch.bfloat16).name == chosen


def test_kernels_equal_their_twins() -> None:
    """In a process of their own: whether kernels are interpreted is decided when triton is imported."""
    files = sorted(map(str, (HERE / "interpreted").glob("*.py")))
    assert len(files) >= 3

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--override-ini=addopts=--import-mode=importlib", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (32, 8, 128), (28, 4, 128), (8, 4, 256)])
def test_decode_compiles_for_hopper(heads: int, kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.ahead_of_time import SHARED_BYTES, SHARED_BYTES_OF_ALL, compiled
    from worker.engine.kernels import paged_decode
    from worker.engine.kernels.decode_plan import plan_decode
    from worker.engine.kernels.decode_variant import choose_variant
    from worker.engine.kernels.paged_decode import decode
    from worker.engine.kernels.prefix_groups import PrefixGroups

    monkeypatch.setattr(paged_decode, "num_multiprocessors", lambda device: 132)
    block_size, num_rows = 256, 48
    query = torch.zeros(num_rows, heads, head_dim, dtype=torch.bfloat16)
    k_cache, v_cache = torch.zeros(2, 2, block_size, kv_heads, head_dim, dtype=torch.bfloat16)
    tables, lens = torch.zeros(num_rows, 160, dtype=torch.int32), torch.ones(num_rows, dtype=torch.int32)
    members = torch.zeros(32, max(64 * kv_heads // heads, 1), dtype=torch.int32)
    groups = PrefixGroups(members, lens[:32], lens)

    one, many = (
        choose_variant(heads // kv_heads, head_dim),
        choose_variant(members.shape[1] * heads // kv_heads, head_dim),
    )
    with compiled() as found:
        plan = plan_decode(tables, lens, block_size, kv_heads, one)
        decode(query, k_cache, v_cache, plan, scale=0.1)
        prefix_plan = plan_decode(tables, groups.lens, block_size, kv_heads, many, table_rows=members)
        prefix = decode(query, k_cache, v_cache, prefix_plan, scale=0.1, groups=groups)
        own = plan_decode(tables, lens, block_size, kv_heads, one, starts=groups.starts)
        decode(query, k_cache, v_cache, own, scale=0.1, prefix=prefix)

    assert {x.kernel for x in found} == {"_list_tiles", "_attend_tiles"}
    assert [x.kernel for x in found if x.spilled_bytes] == []
    for kernel, variant in zip([x for x in found if x.kernel == "_attend_tiles"], [one, many, one], strict=True):
        assert kernel.shared_bytes <= SHARED_BYTES
        assert kernel.shared_bytes * variant.programs_per_sm <= SHARED_BYTES_OF_ALL
        assert kernel.num_registers * 32 * variant.num_warps * variant.programs_per_sm <= 65_536
        assert "cp.async.cg.shared.global" in kernel.ptx  # 16 bytes each


def test_decode_is_compiled_a_few_times_for_all_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.ahead_of_time import compiled
    from worker.engine.kernels import paged_decode
    from worker.engine.kernels.decode_plan import plan_decode
    from worker.engine.kernels.decode_variant import DECODE

    monkeypatch.setattr(paged_decode, "num_multiprocessors", lambda device: 132)
    k_cache, v_cache = torch.zeros(2, 2, 64, 8, 128, dtype=torch.bfloat16)
    with compiled() as found:
        for num_rows in graph_sizes(1024):
            query = torch.zeros(num_rows, 16, 128, dtype=torch.bfloat16)
            tables, lens = torch.zeros(num_rows, 64, dtype=torch.int32), torch.ones(num_rows, dtype=torch.int32)
            plan = plan_decode(tables, lens, 64, 8, DECODE)
            paged_decode.decode(query, k_cache, v_cache, plan, scale=0.1)

    ways = {(x.kernel, x.specialization) for x in found}
    assert Counter(kernel for kernel, _ in ways) == {"_list_tiles": 2, "_attend_tiles": 1}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(16, 8, 128, 64), (32, 8, 128, 256), (8, 4, 256, 64)]
)
def test_prefill_compiles_for_hopper(heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    from tests.engine.ahead_of_time import SHARED_BYTES, compiled
    from worker.engine.kernels.paged_prefill import plan_prefill, prefill

    query = torch.zeros(300, heads, head_dim, dtype=torch.bfloat16)
    k_cache, v_cache = torch.zeros(2, 2, block_size, kv_heads, head_dim, dtype=torch.bfloat16)
    lens, tables = np.array([100, 200]), torch.zeros(2, 16, dtype=torch.int32)
    plan = plan_prefill(lens, lens, heads // kv_heads, head_dim, query.device)

    with compiled() as found:
        for window in (None, 64):
            prefill(query, k_cache, v_cache, tables, plan, scale=0.1, window=window)

    for kernel in found:
        assert kernel.shared_bytes <= SHARED_BYTES
        assert kernel.spilled_bytes == 0
        assert "wgmma" in kernel.ptx


def test_writing_keys_and_values_compiles_for_hopper() -> None:
    from tests.engine.ahead_of_time import compiled
    from worker.engine.kernels.kv_write import write_kv

    cache: Any = torch.zeros(2, 256, 8, 128, dtype=torch.bfloat16)
    fused = torch.zeros(4096, 32, 128, dtype=torch.bfloat16)
    with compiled() as found:
        for num in (100, 4096):
            write_kv(fused[:num, 16:24], fused[:num, 24:], cache, cache, torch.zeros(num, dtype=torch.int64))

    assert [x.spilled_bytes for x in found] == [0, 0]
    for kernel in found:
        assert ".v4.b32" in kernel.ptx  # 16 bytes at a time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_compile_for_hopper_a_few_times_for_all_numbers_of_best_tokens(dtype: torch.dtype) -> None:
    from tests.engine.ahead_of_time import compiled
    from worker.engine.kernels.token_scores import score_tokens

    logits, targets = torch.zeros(3, 151_936, dtype=dtype), torch.zeros(3, dtype=torch.int64)

    with compiled() as found:
        for num_top in (0, 1, 16, 20):
            score_tokens(logits, targets, num_top)

    ways = {(x.kernel, x.specialization) for x in found}
    assert Counter(kernel for kernel, _ in ways) == {"_score": 2, "_find_best": 1}
    for kernel in found:
        assert kernel.spilled_bytes == 0
        assert ".v4.b32" in kernel.ptx  # 16 bytes at a time
    # Of a multiprocessor's registers at least three rows have enough beside each other, with best tokens and without,
    # and all rows of a piece are searched at once.
    without, scores, search = found[:3]
    assert min(65_536 // (256 * kernel.num_registers) for kernel in (without, scores)) >= (
        3 if dtype.itemsize > 2 else 4
    )
    assert 65_536 // (32 * search.num_registers) >= 1280 / 132


def test_the_sampler_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.ahead_of_time import compiled
    from worker.engine.kernels.sampling import sample_rows

    monkeypatch.setattr(torch.version, "cuda", "13.0")  # with the logarithm that an interpreter does not know
    whole, floats = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    logits = torch.zeros(4, 151_936, dtype=torch.bfloat16)

    with compiled() as found:
        sample_rows(logits, whole, floats, floats, whole, floats, whole, whole, whole)

    assert [x.kernel for x in found] == [
        "_race_pieces", "_finish_race", "_collect", "_race_candidates", "_race_limited",
    ]  # fmt: skip
    # The last is for the rare row that nothing else serves.
    assert [x.spilled_bytes for x in found[:4]] == [0, 0, 0, 0]
    assert "lg2.approx" in found[0].ptx


@pytest.mark.parametrize(
    ("compilers", "has_headers", "expected"),
    [
        (["gcc"], True, None),
        (["clang"], True, None),
        ([], True, "install gcc, or name one with CC"),
        (["gcc"], False, "Python.h: install python3-dev"),
    ],
)
def test_triton_is_left_alone_where_it_could_not_compile(
    compilers: list[str],
    has_headers: bool,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in compilers:
        (folder / name).touch(mode=0o755)
    if has_headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})

    found = compiler_obstacle()

    assert found is None if expected is None else expected in str(found)


def test_products_compile_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.ahead_of_time import SHARED_BYTES, compiled
    from worker.engine.kernels import product as products
    from worker.engine.kernels.product import gate, product

    monkeypatch.setattr(products, "num_multiprocessors", lambda device: 132)
    x, weight = torch.zeros(2048, 1024, dtype=torch.bfloat16), torch.zeros(6144, 1024, dtype=torch.bfloat16)
    with compiled() as found:
        for activation in (None, "silu", "gelu_tanh"):
            product(x, weight, activation)
            gate(torch.zeros(3, 6144, dtype=torch.bfloat16), activation or "silu")
        product(x, weight, residual=torch.zeros(2048, 6144, dtype=torch.bfloat16))

    for kernel in found:
        assert kernel.spilled_bytes == 0
        if kernel.kernel == "_multiply":
            assert kernel.shared_bytes <= SHARED_BYTES
            assert "wgmma.mma_async.sync.aligned.m64n256k16" in kernel.ptx
            assert "cp.async.bulk.tensor" in kernel.ptx
