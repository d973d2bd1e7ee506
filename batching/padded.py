"""PaddedScheduler: rectangles of Sequences of like length, for models that need a mask and a cache of their own.

A rectangle's prompts end in the same column, so those shorter than the longest begin with padding; from there on every
row gets a token a step. It runs until all its rows have ended, and the next one starts then, with the most urgent that
waits. Rows that have ended are padding too; they are dropped, and their room comes back, when the steps to come save
more than the copy of what stays costs.

Letters: R rows, W columns of the prompts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batching.fair_share import FairShare
from batching.scheduler import Outcome, StepPlan, apply_tokens, check_fits
from batching.sequence import Sequence, SequenceState
from batching.urgency_order import UrgencyOrder
from protocol.errors import InvalidRequest

#: Waiting Sequences from which a rectangle is chosen, as a multiple of its most rows: enough to find like lengths, and
#: a bound on the cost of sorting them.
_WINDOW_RECTANGLES = 8
#: Reading a row once for a step costs about as much as half of copying it.
_COPY_COST_STEPS = 2
#: Part of the most rows that comes back with every rectangle, after memory was too small for some.
_RECOVERY = 16


@dataclass(slots=True)
class PaddedPlan(StepPlan):
    """One step: some columns of the rectangle. Segments are its live rows with a token in them, `rows[i]` their row.

    `num_decode` stays 0: all tokens come from the host, those of the last step too.
    """

    rows: list[int] = field(default_factory=list)
    rectangle: list[Sequence] = field(default_factory=list)  # all rows, ended ones too
    is_new: bool = False
    kept: list[int] | None = None  # rows of the last step's rectangle that are this one's; None: all of them
    width: int = 0  # W
    first_column: int = 0
    num_columns: int = 0

    @property
    def num_padding_tokens(self) -> int:
        return len(self.rectangle) * self.num_columns - self.num_scheduled_tokens


@dataclass(slots=True)
class CacheSpace:
    """What the KV cache may hold, in tokens, and how much of it the rectangle has taken for all it may become."""

    num_blocks: int
    num_free: int
    block_size: int = 1

    @property
    def capacity(self) -> int:
        return self.num_blocks


class PaddedScheduler:
    def __init__(self, num_tokens: int, *, max_num_seqs: int, max_batch_tokens: int, max_model_len: int) -> None:
        self.blocks = CacheSpace(num_tokens, num_tokens)
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self.max_rows = self.max_num_seqs  # fewer where memory has proven too small
        self.num_preemptions = 0  # only then: a rectangle has its room from the start
        self.max_model_len = max_model_len
        self._num_arrivals = 0
        self._fair_share = FairShare()
        self._alive: dict[int, Sequence] = {}
        self._waiting = UrgencyOrder()
        self._rectangle: list[Sequence] = []
        self._width = 0
        self._column = 0  # the next one

    @property
    def num_running(self) -> int:
        return len(self._alive) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def get(self, seq_id: int) -> Sequence | None:
        return self._alive.get(seq_id)

    def add(self, seq: Sequence, *, sample_of: Sequence | None = None) -> None:
        """Raises InvalidRequest when the Sequence could never finish. Every row computes its whole prompt."""
        if seq.seq_id in self._alive:
            raise InvalidRequest("duplicate_sequence", f"Sequence {seq.seq_id} is already here")
        check_fits(seq, self.max_model_len, self.blocks.capacity)
        self._num_arrivals += 1
        seq.arrival = self._num_arrivals
        self._fair_share.join(seq)
        self._alive[seq.seq_id] = seq
        self._waiting.add(seq)

    def finish(self, seq_id: int, num_kept: int) -> None:
        """End a Sequence from outside, keeping its first `num_kept` output tokens; an unknown one is ignored."""
        seq = self._alive.get(seq_id)
        if seq is not None:
            del seq.output_ids[num_kept:]
            self._finish(seq)

    def raise_priority(self, seq_id: int, priority: int) -> None:
        """Somebody more urgent waits for this one too; one that runs, or is as urgent already, stays as it is."""
        seq = self._alive.get(seq_id)
        if seq is not None and seq.state is SequenceState.WAITING and seq.priority > priority:
            self._waiting.remove(seq)
            self._fair_share.move(seq, priority)
            self._waiting.add(seq)

    def schedule(self) -> PaddedPlan | None:
        """The next step; None when there is nothing to do. The last step's tokens must have been processed."""
        plan = PaddedPlan()
        if self._rectangle:
            self._drop_ended(plan)
        elif self._waiting:
            self._start(plan)
        else:
            return None
        self._fill(plan)
        return plan

    def process(self, plan: StepPlan, tokens: npt.NDArray[np.int64]) -> Outcome:
        """Apply a step's sampled tokens, one per entry of `plan.sampled`."""
        return apply_tokens(plan, tokens, self._finish)

    def take_back(self, plans: Iterable[StepPlan]) -> None:
        """These steps, the last ones launched, have failed: their rectangle waits again, to start with fewer rows."""
        for plan in plans:
            for segment in plan.sampled:
                plan.sequences[segment].num_in_flight -= 1
            for segment, start, _ in plan.scored:
                plan.sequences[segment].num_scored = min(plan.sequences[segment].num_scored, start)
        self.max_rows = max(len(self._rectangle) // 2, 1)
        for seq in self._rectangle:
            if seq.state is SequenceState.RUNNING:
                seq.state, seq.row, seq.num_computed = SequenceState.WAITING, -1, 0
                self._waiting.add(seq)
                self.num_preemptions += 1
        self._rectangle = []
        self.blocks.num_free = self.blocks.num_blocks

    def _fill(self, plan: PaddedPlan) -> None:
        plan.rectangle, plan.width, plan.first_column = self._rectangle, self._width, self._column
        left = self._width - self._column
        plan.num_columns = min(left, max(self.max_batch_tokens // len(self._rectangle), 1)) if left > 0 else 1
        self._column += plan.num_columns
        for row, seq in enumerate(self._rectangle):
            end = self._column - (self._width - seq.num_prefill)
            if seq.state is SequenceState.RUNNING and end > seq.num_computed:
                plan.rows.append(row)
                plan.append(seq, end - seq.num_computed, is_sampled=self._column >= self._width)

    def _start(self, plan: PaddedPlan) -> None:
        self._rectangle = chosen = self._choose()
        self.max_rows = min(self.max_rows + max(self.max_num_seqs // _RECOVERY, 1), self.max_num_seqs)
        self._width, self._column = max(seq.num_known for seq in chosen), 0
        for row, seq in enumerate(chosen):
            self._waiting.remove(seq)
            self._fair_share.admit(seq)
            seq.state, seq.row, seq.num_prefill = SequenceState.RUNNING, row, seq.num_known
        self._reserve(chosen)
        plan.is_new = True
        plan.admitted = list(chosen)

    def _choose(self) -> list[Sequence]:
        """The most urgent Sequence, and those that fit beside it: by priority first, then the nearest in length."""
        first, *others = self._waiting.first(_WINDOW_RECTANGLES * self.max_num_seqs)

        def distance(seq: Sequence) -> tuple[int, int, int, int]:
            longer = seq.num_known - first.num_known
            return seq.priority, abs(longer), longer, abs(_num_left(seq) - _num_left(first))

        chosen, width, num_outputs = [first], first.num_known, _num_left(first)
        for seq in sorted(others, key=distance):
            if len(chosen) >= self.max_rows:
                break
            columns = max(width, seq.num_known) + max(num_outputs, _num_left(seq))
            # Columns are positions to a model that makes its own mask, those of padding too.
            if columns <= self.max_model_len and (len(chosen) + 1) * columns <= self.blocks.capacity:
                chosen.append(seq)
                width, num_outputs = max(width, seq.num_known), max(num_outputs, _num_left(seq))
        return chosen

    def _drop_ended(self, plan: PaddedPlan) -> None:
        kept = [row for row, seq in enumerate(self._rectangle) if seq.state is SequenceState.RUNNING]
        live = [self._rectangle[row] for row in kept]
        num_ended = len(self._rectangle) - len(kept)
        num_left = max(self._width - self._column, 0) + max(map(_num_left, live))
        if num_ended and num_ended * num_left >= _COPY_COST_STEPS * len(kept):
            plan.kept = kept
            self._rectangle = live
        self._reserve(live)

    def _reserve(self, live: list[Sequence]) -> None:
        """Of the cache, what the rectangle takes when the last of its live rows ends."""
        columns = self._width + max(seq.num_prompt_tokens + seq.max_tokens - seq.num_prefill for seq in live)
        self.blocks.num_free = self.blocks.num_blocks - len(self._rectangle) * columns

    def _finish(self, seq: Sequence) -> None:
        if seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)
        seq.state = SequenceState.FINISHED
        self._fair_share.leave(seq)
        del self._alive[seq.seq_id]
        if not self.num_running:
            self._rectangle = []
            self.blocks.num_free = self.blocks.num_blocks


def _num_left(seq: Sequence) -> int:
    """Output tokens to come at most."""
    return seq.max_tokens - len(seq.output_ids)
