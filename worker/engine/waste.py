"""Waste: tokens that steps compute for nobody, beside those they were scheduled for; told in the log."""

import logging
import time

log = logging.getLogger("millrace.engine")

#: Between two reports while there is no end of work.
_INTERVAL_S = 60.0
#: Fewer scheduled tokens than this are not worth a line each time the engine has nothing to do for a moment.
_MIN_TOKENS = 10_000


class Waste:
    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.num_scheduled = 0
        self.num_padding = 0
        self._last_num = 0
        self._last_time = time.monotonic()

    @property
    def share(self) -> float:
        """Padding per scheduled token."""
        return self.num_padding / max(self.num_scheduled, 1)

    def count(self, num_scheduled: int, num_padding: int) -> None:
        self.num_scheduled += num_scheduled
        self.num_padding += num_padding
        if time.monotonic() - self._last_time >= _INTERVAL_S:
            self._report()

    def report(self) -> None:
        """There is no more work: say what this run of work has wasted, if it was long enough."""
        if self.num_scheduled - self._last_num >= _MIN_TOKENS:
            self._report()

    def _report(self) -> None:
        self._last_num, self._last_time = self.num_scheduled, time.monotonic()
        log.info(
            "layout %s: %d tokens scheduled so far and %d of padding, %.1f %% of them",
            self.layout, self.num_scheduled, self.num_padding, 100 * self.share,
        )  # fmt: skip
