"""Kernels built ahead: what an engine is going to launch is in Triton's cache before it is launched."""

import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.settings import EngineSettings
from tests.engine.reference import build_model
from worker.engine import kv_cache, rehearsal, row_state, scorer
from worker.engine.backends.sdpa import SDPABackend
from worker.engine.kernels import building
from worker.engine.limits import Limits
from worker.engine.loader import adopt
from worker.engine.runner import Runner

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)  # test_kernels.py sees to it that CI has it

LAUNCH = building.Launch("worker.engine.kernels.decode_plan", "no_such_kernel", "{}", "", 1)
LIMITS = Limits(max_num_seqs=16, max_batch_tokens=16_384)


@pytest.fixture
def pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton compiles for a GPU and launches nothing; the folder of what it compiles."""
    from triton import knobs
    from triton.runtime import driver

    from tests.engine.pretended_gpu import PretendedDriver
    from worker.engine.kernels import paged_decode

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(paged_decode, "num_multiprocessors", lambda device: 132)
    for module in (rehearsal, kv_cache, row_state):
        monkeypatch.setattr(module, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(scorer, "_has_kernel", lambda device: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert knobs.cache.dir == str(tmp_path)
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    return tmp_path


def test_what_an_engine_launches_is_built_before(
    pretended_gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from worker.engine.backends.triton import TritonBackend

    settings = EngineSettings(device="cpu", dtype="float32")
    monkeypatch.setattr(scorer, "_has_kernel", lambda device: False)  # the probe scores for real
    loaded = adopt(build_model("qwen3"), settings)
    monkeypatch.setattr(scorer, "_has_kernel", lambda device: True)

    launches = rehearsal.rehearse(loaded, TritonBackend(), LIMITS)

    assert {launch.kernel for launch in launches} >= {
        "_write", "_list_tiles", "_attend_tiles", "_attend_pieces", "_race_pieces", "_race_limited", "_score",
        "_find_best",
    }  # fmt: skip
    monkeypatch.setattr(building, "_BUILDER", "tests.engine.pretended_gpu")
    with caplog.at_level(logging.INFO, logger="millrace.engine"):
        for _ in range(2):
            with building.building(launches, 2):
                pass
    assert caplog.text.count("built in 2 processes") == 1

    found: list[tuple[str, bool]] = []
    own_run = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        own_run(kernel, *arguments, grid=grid, warmup=True, **options)

    with monkeypatch.context() as patched:
        patched.setattr(knobs.compilation, "listener", lambda src, cache_hit, **_: found.append((src.name, cache_hit)))
        patched.setattr(JITFunction, "run", run)
        runner = Runner(loaded, TritonBackend(), max_num_seqs=16, num_blocks=1)
        for num_rows in (2, 9, 16):
            runner.decode.rehearse(num_rows)

    counts = Counter(name for name, _ in found)
    assert counts["_list_tiles"] == 3, "with a common prefix its tiles, those behind it, and those without one"
    assert counts.keys() >= {"_write", "_attend_tiles", "_race_pieces"}
    assert [name for name, is_hit in found if not is_hit] == []
    assert rehearsal.rehearse(loaded, TritonBackend(), LIMITS) == [
        launch for launch in launches if launch.kernel in ("_attend_pieces", "_score", "_find_best")
    ], "what is in this process already is neither built nor launched"


def test_a_backend_whose_kernels_run_while_others_are_noted_stays_within_the_small_cache(
    pretended_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_has_kernel", lambda device: False)  # the probe scores for real
    loaded = adopt(build_model("llama"), EngineSettings(device="cpu", dtype="float32"))
    sizes: list[int] = []
    own_attend = SDPABackend.attend_pieces

    def attend(backend: SDPABackend, query: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(query))
        return own_attend(backend, query, *others)

    monkeypatch.setattr(SDPABackend, "attend_pieces", attend)

    rehearsal.rehearse(loaded, SDPABackend(), Limits(max_num_seqs=16, max_batch_tokens=100))

    assert set(sizes) == {100}, "no more than a step may have"


def test_an_engine_starts_where_nothing_can_be_built_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    with building.building([LAUNCH]):
        pass

    assert "no_such_kernel cannot be compiled ahead of its launch" in capfd.readouterr().err
    assert list(tmp_path.glob("millrace-*")) == [], "it would not be tried again"


@pytest.mark.parametrize(("executable", "cache"), [("/nowhere/python", "cache"), (sys.executable, "file/cache")])
def test_an_engine_starts_where_no_process_or_no_file_can_be_made(
    executable: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "builder.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / cache))
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(building, "_BUILDER", "builder")
    is_run = False

    with building.building([LAUNCH]):
        is_run = True

    assert is_run
    assert not (tmp_path / cache).exists()


def test_builders_end_with_whoever_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builder.py").write_text("import signal; signal.pause()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(building, "_BUILDER", "builder")
    processes: list[subprocess.Popen[bytes]] = []
    own_start = building._start

    def start(launches: Sequence[building.Launch]) -> subprocess.Popen[bytes]:
        processes.append(own_start(launches))
        return processes[-1]

    monkeypatch.setattr(building, "_start", start)

    with pytest.raises(ZeroDivisionError), building.building([LAUNCH, LAUNCH], 2):
        raise ZeroDivisionError
    monkeypatch.setattr(building, "_PATIENCE", 0.1)
    with building.building([LAUNCH]):
        pass

    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 3
    assert list(tmp_path.glob("millrace-*")) == []


def test_a_builder_whose_engine_has_died_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([asdict(LAUNCH)] * 3)))
    parents = iter([7, 7, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))

    building.main()

    assert caplog.text.count("no_such_kernel cannot be compiled") == 1
