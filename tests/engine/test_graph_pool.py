"""Captures that find no room: CUDA is imitated, with torch's own rules for graphs and the pools they share."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from worker.engine.graph_pool import GraphPool


class _Cuda:
    """What torch.cuda keeps account of. `room` is all memory there is, and `kept` what the allocator holds back."""

    def __init__(self) -> None:
        self.room, self.kept = 100, 0
        self.num_handles = 0
        self.graphs: dict[int, int] = {}  # that are alive, by the handle of their pool
        self.is_capturing = False
        self.handle = 0

    def graph_pool_handle(self) -> int:
        self.num_handles += 1
        return self.num_handles

    def allocate(self, num: int) -> None:
        if not self.is_capturing and num > self.room - self.kept:
            self.empty_cache()
        if num > self.room - self.kept:
            raise torch.OutOfMemoryError("CUDA out of memory. As if it were")

    def empty_cache(self) -> None:
        assert not self.is_capturing
        self.kept = 0


class _Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, cuda: _Cuda, *, is_too_large: bool = False) -> None:
        self.cuda = cuda
        self.is_too_large = is_too_large
        self.handle: int | None = None

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert not self.cuda.is_capturing
        assert self.cuda.graphs.get(pool) != 0, "the last graph of this pool is gone"
        self.cuda.is_capturing, self.handle = True, pool
        self.cuda.graphs[pool] = self.cuda.graphs.get(pool, 0) + 1

    def capture_end(self) -> None:
        self.cuda.is_capturing = False
        if self.is_too_large:
            raise RuntimeError("CUDA error: out of memory")  # of the driver, for the graph as such

    def __del__(self) -> None:
        if self.handle is not None:
            self.cuda.graphs[self.handle] -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    cuda = _Cuda()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", cuda.graph_pool_handle)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", cuda.empty_cache)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(cuda))
    return cuda


def test_a_capture_without_room_leaves_the_stream_and_the_pool_to_the_next(cuda: _Cuda) -> None:
    pool = GraphPool(torch.device("cpu"))

    captured = [pool.capture(partial(cuda.allocate, num)) for num in (200, 150, 60, 300, 50)]

    assert [found is not None for found in captured] == [False, False, True, False, True]
    assert not cuda.is_capturing


def test_a_capture_has_what_the_allocator_kept_for_steps_outside_it(cuda: _Cuda) -> None:
    pool = GraphPool(torch.device("cpu"))

    def run() -> SimpleNamespace:
        cuda.allocate(80)
        if not cuda.is_capturing and len(runs) == 0:
            cuda.kept = 60  # the step before the capture has left it
        runs.append(cuda.is_capturing)
        return SimpleNamespace(tokens=[1])

    runs: list[bool] = []
    captured = pool.capture(run)

    assert captured is not None
    assert captured[1].tokens == [1]
    assert runs == [False, False, True]  # the first capture has come to its end without a second allocation


def test_a_graph_that_the_driver_has_no_memory_for_is_one_without_room(
    cuda: _Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = GraphPool(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(cuda, is_too_large=True))
    assert pool.capture(lambda: cuda.allocate(1)) is None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(cuda))
    assert pool.capture(lambda: cuda.allocate(1)) is not None


def test_what_is_no_lack_of_memory_is_not_taken_for_one(cuda: _Cuda) -> None:
    def run() -> None:
        if cuda.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        GraphPool(torch.device("cpu")).capture(run)
    assert not cuda.is_capturing
