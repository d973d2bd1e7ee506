"""Telemetry: what steps did and where the time between them went; a few additions per step, so it is always on."""

import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Telemetry:
    num_steps: int = 0
    num_captured: int = 0  # steps replayed from a CUDA graph
    num_rows: int = 0  # Sequences in steps, one after the other
    num_tokens: int = 0
    num_padding: int = 0  # tokens computed for nobody, to fill a rectangle or a graph
    host_s: float = 0.0  # scheduling, launching, and taking tokens in
    wait_s: float = 0.0  # for the device
    #: The device had nothing to do since its last step was known to be done. With a step ahead there should be none.
    gap_s: float = 0.0
    num_gaps: int = 0
    _idle_since: float | None = None
    _reported_gap_s: float = 0.0

    def reset(self) -> None:
        for name, value in asdict(Telemetry()).items():
            setattr(self, name, value)

    def count_launch(
        self, started: float, begun: float, num_rows: int, num_tokens: int, num_padding: int, is_captured: bool
    ) -> None:
        """A step has been launched, at which the host was from `started` and the device from `begun` on (of
        time.perf_counter)."""
        self.num_steps += 1
        self.num_captured += is_captured
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        self.num_padding += num_padding
        self.host_s += begun - started
        self.wait_s += time.perf_counter() - begun
        if self._idle_since is not None:
            self.gap_s += begun - self._idle_since
            self.num_gaps += 1
            self._idle_since = None

    def count_wait(self, started: float, *, is_idle: bool) -> None:
        """A step's tokens are here; `is_idle` says that no other step is under way."""
        now = time.perf_counter()
        self.wait_s += now - started
        self._idle_since = now if is_idle else None

    def stop(self) -> None:
        """There is nothing to do: what follows is no gap."""
        self._idle_since = None

    def take_gap(self) -> float:
        """Seconds of gaps since the last call."""
        gap_s, self._reported_gap_s = self.gap_s - self._reported_gap_s, self.gap_s
        return gap_s

    def summary(self) -> dict[str, Any]:
        """Sums, and milliseconds per step."""
        num = max(self.num_steps, 1)
        return {
            "steps": self.num_steps,
            "captured": self.num_captured,
            "rows_per_step": round(self.num_rows / num, 1),
            "padding_share": round(self.num_padding / max(self.num_tokens, 1), 4),
            "host_ms": round(1000 * self.host_s / num, 3),
            "wait_ms": round(1000 * self.wait_s / num, 3),
            "gap_ms": round(1000 * self.gap_s / num, 4),
            "gaps": self.num_gaps,
        }
