"""Report: what benchmarks of kernels found, one line as soon as it is known; and the time of a call on a GPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda"


class Report:
    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.results: list[dict[str, Any]] = []
        self.num_wrong = 0

    def add(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() > self.end:
            self.results.append({"what": what, "skipped": True})
            return
        try:
            found = measure()
        except Exception as error:  # of whatever kind: the next variant may do
            torch.cuda.empty_cache()
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.num_wrong += found.get("wrong", False)
        self.results.append({"what": what, **found})
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        print(f"{what:<64} {shown}", flush=True)


def time_graph(run: Callable[[], object], num_calls: int, num_replays: int = 20) -> float:
    """Seconds per call, of `num_calls` in one graph."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(num_replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / num_calls
