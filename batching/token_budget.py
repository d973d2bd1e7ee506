"""TokenBudget: the tokens a step may have. Halved when a step was too much for the memory, and slowly back again."""

#: Steps without trouble after which a part of what was lost comes back, and that part of the whole.
_STEPS = 64
_PART = 16


class TokenBudget:
    def __init__(self, full: int, least: int) -> None:
        self.full, self.least = full, min(least, full)
        self.tokens = full
        self._num_good_steps = 0

    def halve(self) -> bool:
        """False when it is as small as it may be already."""
        self._num_good_steps = 0
        if self.tokens == self.least:
            return False
        self.tokens = max(self.tokens // 2, self.least)
        return True

    def step_done(self) -> None:
        """A step has fitted."""
        if self.tokens == self.full:
            return
        self._num_good_steps += 1
        if self._num_good_steps % _STEPS == 0:
            self.tokens = min(self.tokens + max(self.full // _PART, 1), self.full)
