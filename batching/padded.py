"""PaddedScheduler: rectangles of Sequences of like length, for models that need a mask and a cache of their own.

A rectangle runs until all its rows have ended, and the next one starts then, with the most urgent that waits. Rows that
have ended are dropped, and their room comes back, when the steps to come save more than the copy of what stays costs.

What waits while something less urgent is here does not wait for that: it starts in a rectangle of its own, while the
other one stands still, and joins it once its prompts are computed. Where rows or room are short, the least urgent rows
go back to waiting, with their tokens so far. Rectangles that cannot become one run by turns.

Letters: R rows, W columns of the prompts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batching.fair_share import FairShare
from batching.rectangle import Rectangle
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


@dataclass(frozen=True, slots=True)
class Join:
    """Two caches become one, under the number of the first."""

    number: int
    other: int
    num_pads: int  # columns of padding before those of the first
    num_other_pads: int


@dataclass(slots=True)
class PaddedPlan(StepPlan):
    """One step: some columns of a rectangle. Segments are its live rows with a token in them, `rows[i]` their row.

    `num_decode` stays 0: all tokens come from the host, those of the last step too.
    """

    #: Changes of caches, by their numbers, in the order in which they are made: all others are gone, rows are dropped
    #: but for those kept, and then some become one.
    caches: list[int] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)
    joins: list[Join] = field(default_factory=list)
    number: int = 0  # of the cache of the rectangle that runs
    rows: list[int] = field(default_factory=list)
    rectangle: list[Sequence] = field(default_factory=list)  # all rows, ended ones too
    pads: list[int] = field(default_factory=list)  # of all rows
    is_new: bool = False
    first_column: int = 0
    num_columns: int = 0
    num_rows: int = 0  # of all rectangles

    @property
    def num_padding_tokens(self) -> int:
        return len(self.rectangle) * self.num_columns - self.num_scheduled_tokens


@dataclass(slots=True)
class CacheSpace:
    """What the KV cache may hold, in tokens, and how much of it rectangles have not taken for all they may become."""

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
        self.num_preemptions = 0
        self.max_model_len = max_model_len
        self._num_arrivals = 0
        self._fair_share = FairShare()
        self._alive: dict[int, Sequence] = {}
        self._waiting = UrgencyOrder()
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))
        self._rectangles: list[Rectangle] = []  # the one that started last at the end
        self._num_steps = 0
        self._num_rectangles = 0  # that there ever were

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

    def change_priority(self, seq_id: int, priority: int) -> None:
        """Somebody more urgent waits for this one too, or does no longer; an unknown one is ignored."""
        seq = self._alive.get(seq_id)
        if seq is None or seq.priority == priority:
            return
        is_waiting = seq.state is SequenceState.WAITING
        if is_waiting:
            self._waiting.remove(seq)
        self._fair_share.move(seq, priority)
        if is_waiting:
            self._waiting.add(seq)

    def schedule(self) -> PaddedPlan | None:
        """The next step; None when there is nothing to do. The last step's tokens must have been processed."""
        self._rectangles = [rectangle for rectangle in self._rectangles if rectangle.live]
        plan = PaddedPlan()
        chosen = self._choose() if self._may_start() else []
        if chosen:
            rectangle = self._start(plan, chosen)
        elif self._rectangles:
            rectangle = self._next(plan)
            self._drop_ended(plan, rectangle)
        else:
            return None
        self._num_steps += 1
        rectangle.last_step = self._num_steps
        self._fill(plan, rectangle)
        self._reserve()
        plan.caches = [x.number for x in self._rectangles] + [join.other for join in plan.joins]
        plan.num_rows = sum(len(x.rows) for x in self._rectangles)
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
        self.max_rows = max(sum(len(rectangle.rows) for rectangle in self._rectangles) // 2, 1)
        for rectangle in self._rectangles:
            for row in rectangle.live:
                self._preempt(rectangle.rows[row])
        self._rectangles = []
        self._reserve()

    def _fill(self, plan: PaddedPlan, rectangle: Rectangle) -> None:
        """The next columns, of which each live row's are a segment."""
        rectangle.skip_padding()
        left = rectangle.width - rectangle.column
        num_columns = min(left, max(self.max_batch_tokens // len(rectangle.rows), 1)) if left > 0 else 1
        plan.number, plan.rectangle, plan.pads = rectangle.number, rectangle.rows, rectangle.pads
        plan.first_column, plan.num_columns = rectangle.column, num_columns
        rectangle.column += num_columns
        for row in rectangle.live:
            seq, end = rectangle.rows[row], rectangle.column - rectangle.pads[row]
            if end > seq.num_computed:
                plan.rows.append(row)
                plan.append(seq, end - seq.num_computed, is_sampled=not rectangle.is_in_prefill)

    def _may_start(self) -> bool:
        """Whether the most urgent that waits may start now, room provided."""
        if not self._waiting or not self._rectangles:
            return bool(self._waiting)
        first, newest = self._waiting.first(1)[0], self._rectangles[-1]
        least_running = max(rectangle.least_priority for rectangle in self._rectangles)
        if first.priority < max(least_running, self._waiting.last().priority):
            # What starts is not held up by its like, nor the others without end by all that starts.
            has_just_run = len(self._rectangles) > 1 and newest.last_step == self._num_steps
            return first.priority < newest.least_priority if newest.is_in_prefill or has_just_run else True
        # What is less urgent than all that runs uses the room beside it, if that is worth a rectangle.
        has_room = 2 * sum(len(rectangle.live) for rectangle in self._rectangles) <= self.max_rows
        return first.priority > least_running and has_room and not any(x.is_in_prefill for x in self._rectangles)

    def _start(self, plan: PaddedPlan, chosen: list[Sequence]) -> Rectangle:
        self.max_rows = min(self.max_rows + max(self.max_num_seqs // _RECOVERY, 1), self.max_num_seqs)
        self._num_rectangles += 1
        rectangle = Rectangle.of(self._num_rectangles, chosen)
        for seq in chosen:
            self._waiting.remove(seq)
            self._fair_share.admit(seq)
            seq.state, seq.num_prefill = SequenceState.RUNNING, seq.num_known
        self._make_room(plan, rectangle)
        for seq in chosen:
            seq.row = self._free_rows.pop()
        self._rectangles.append(rectangle)
        plan.is_new = True
        plan.admitted = chosen
        return rectangle

    def _make_room(self, plan: PaddedPlan, newcomer: Rectangle) -> None:
        """Drop rows that have ended, then the least urgent, as far as it needs their places or their room."""
        running = self._rectangles
        num_rows = sum(len(x.rows) for x in running) + len(newcomer.rows)
        if num_rows <= self.max_rows and sum(x.num_cells for x in running) + newcomer.num_cells <= self.blocks.capacity:
            return
        priority = newcomer.rows[0].priority
        sequences = [x.rows[row] for x in running for row in x.live]
        less_urgent = sorted((seq for seq in sequences if seq.priority > priority), key=lambda seq: seq.urgency)
        while True:
            num_rows = sum(len(x.live) for x in running) + len(newcomer.rows)
            num_cells = sum(len(x.live) * x.num_columns for x in running) + newcomer.num_cells
            if num_rows <= self.max_rows and num_cells <= self.blocks.capacity:
                break
            self._preempt(less_urgent.pop())
        # Of one that is gone altogether there is no cache to keep rows of.
        self._rectangles = [rectangle for rectangle in running if rectangle.live]
        for rectangle in self._rectangles:
            self._keep_live(plan, rectangle)

    def _preempt(self, seq: Sequence) -> None:
        seq.state, seq.num_computed = SequenceState.WAITING, 0
        self._free_row(seq)
        self._waiting.add(seq)
        self.num_preemptions += 1

    def _next(self, plan: PaddedPlan) -> Rectangle:
        """The one that is starting, if it is more urgent than others; else all by turns."""
        *others, newest = self._rectangles
        if newest.is_in_prefill and any(newest.least_priority < other.least_priority for other in others):
            return newest
        rectangles: list[Rectangle] = []
        for rectangle in self._rectangles:
            into = next((other for other in rectangles if self._may_join(other, rectangle)), None)
            if into is None:
                rectangles.append(rectangle)
                continue
            for one in (into, rectangle):
                self._keep_live(plan, one)
            plan.joins.append(Join(into.number, rectangle.number, *into.join(rectangle)))
        self._rectangles = rectangles
        return min(rectangles, key=lambda rectangle: rectangle.last_step)

    def _may_join(self, one: Rectangle, other: Rectangle) -> bool:
        num_columns = one.num_columns_with(other)
        num_cells = (len(one.live) + len(other.live)) * num_columns - one.num_cells - other.num_cells
        has_room = num_cells + sum(x.num_cells for x in self._rectangles) <= self.blocks.capacity
        is_done = not one.is_in_prefill and not other.is_in_prefill
        return is_done and num_columns <= self.max_model_len and has_room

    def _choose(self) -> list[Sequence]:
        """The most urgent Sequence, and those that fit beside it: by priority first, then the nearest in length.

        Beside others that run only those of its own class, in the place of what is less urgent; none, if there is none.
        """
        first, *others = self._waiting.first(_WINDOW_RECTANGLES * self.max_num_seqs)
        max_rows, max_cells = self.max_rows, self.blocks.capacity
        if self._rectangles:
            others = [seq for seq in others if seq.priority == first.priority]
            for rectangle in self._rectangles:
                num_staying = sum(rectangle.rows[row].priority <= first.priority for row in rectangle.live)
                max_rows -= num_staying
                max_cells -= num_staying * rectangle.num_columns
            if max_rows < 1 or first.num_known + _num_left(first) > max_cells:
                return []

        def distance(seq: Sequence) -> tuple[int, int, int, int]:
            longer = seq.num_known - first.num_known
            return seq.priority, abs(longer), longer, abs(_num_left(seq) - _num_left(first))

        chosen, width, num_outputs = [first], first.num_known, _num_left(first)
        for seq in sorted(others, key=distance):
            if len(chosen) >= max_rows:
                break
            columns = max(width, seq.num_known) + max(num_outputs, _num_left(seq))
            # Columns are positions to a model that makes its own mask, those of padding too.
            if columns <= self.max_model_len and (len(chosen) + 1) * columns <= max_cells:
                chosen.append(seq)
                width, num_outputs = max(width, seq.num_known), max(num_outputs, _num_left(seq))
        return chosen

    def _drop_ended(self, plan: PaddedPlan, rectangle: Rectangle) -> None:
        """If it pays."""
        live = [rectangle.rows[row] for row in rectangle.live]
        num_ended = len(rectangle.rows) - len(live)
        num_left = max(rectangle.width - rectangle.column, 0) + max(map(_num_left, live))
        if num_ended * num_left >= _COPY_COST_STEPS * len(live):
            self._keep_live(plan, rectangle)

    def _keep_live(self, plan: PaddedPlan, rectangle: Rectangle) -> None:
        live = rectangle.live
        if len(live) < len(rectangle.rows):
            plan.kept[rectangle.number] = live
            rectangle.keep(live)

    def _reserve(self) -> None:
        """Of the cache, what rectangles take when the last of their live rows ends."""
        self.blocks.num_free = self.blocks.num_blocks - sum(rectangle.num_cells for rectangle in self._rectangles)

    def _finish(self, seq: Sequence) -> None:
        if seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)
        else:
            self._free_row(seq)
        seq.state = SequenceState.FINISHED
        self._fair_share.leave(seq)
        del self._alive[seq.seq_id]
        if not self.num_running:
            self._rectangles = []
            self._reserve()

    def _free_row(self, seq: Sequence) -> None:
        self._free_rows.append(seq.row)
        seq.row = -1


def _num_left(seq: Sequence) -> int:
    """Output tokens to come at most."""
    return seq.max_tokens - len(seq.output_ids)
