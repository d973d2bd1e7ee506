"""GraphPool: the memory that all CUDA graphs of an engine share, and the stream on which they are captured.

Whoever runs a graph knows what is in it; this knows what a capture needs of torch and the driver, also when it fails.
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

_Output = TypeVar("_Output")


class Graph(Protocol):
    def replay(self) -> None: ...


class GraphPool:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._num_graphs = 0

    def capture(self, run: Callable[[], _Output]) -> tuple[Graph, _Output] | None:
        """What `run` does as a graph, and what it gave; None where the memory does not suffice for it.

        Then all that was taken for it is free again, and the stream is as it was.
        """
        for _ in range(2):
            # Within a capture the allocator cannot give back what it keeps for steps that are not captured, so the
            # second time it has done so before.
            with suppress(torch.OutOfMemoryError):
                return self._capture(run)
            self._recover()
        return None

    def _capture(self, run: Callable[[], _Output]) -> tuple[Graph, _Output]:
        """torch.cuda.graph would collect garbage around each of them, which takes longer than the rest."""
        run()  # what is built or chosen at first use must not be within
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
                try:
                    output = run()
                finally:
                    # Also of half a capture: until then all that the stream is given would be recorded, and the pool
                    # would not be told of the graph's end.
                    graph.capture_end()
        except RuntimeError as error:  # the driver found no memory for the graph itself
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error
        self._num_graphs += 1
        return graph, output

    def _recover(self) -> None:
        """After a capture that failed, whose graph and tensors nothing but garbage refers to any more."""
        gc.collect()
        if self._num_graphs == 0:
            self._handle = torch.cuda.graph_pool_handle()  # torch takes no pool again whose last graph is gone
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
