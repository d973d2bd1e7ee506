"""Scheduler: which Sequences run in the next step. Policy alone: it never sees a tensor, and its cost per step does not
grow with the number waiting.

It may be asked for step t+1 before the tokens of step t are known. Lengths are known in advance, so nothing is
scheduled past max_tokens; a stop token is seen one step late and what was sampled behind it is dropped.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batching.block_manager import BlockManager
from batching.sequence import Sequence, SequenceState
from protocol.errors import InvalidRequest
from protocol.frames import FinishReason

#: Tokens. Admission leaves room for this many more of every running Sequence, or for all it may still have, so that a
#: newcomer is not preempted by the next steps of those already running.
HEADROOM_TOKENS = 16


@dataclass(slots=True)
class StepPlan:
    """One step. Segment i is `num_tokens[i]` tokens of `sequences[i]` from position `starts[i]`; decode rows first."""

    num_decode: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # segments whose last token's logits are sampled
    #: Prompt tokens whose log-probabilities this step gives, as (segment, first position, position after the last).
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    completed: list[Sequence] = field(default_factory=list)  # they only had a prompt, and it ends with this step
    admitted: list[Sequence] = field(default_factory=list)  # their row's state on the device starts afresh
    #: Blocks appended since the last plan, as (row, index in the block_table, block).
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(self.num_tokens)

    @property
    def num_padding_tokens(self) -> int:
        """Computed beside them for nobody: none in a flat row."""
        return 0

    def append(self, seq: Sequence, num_tokens: int, *, is_sampled: bool) -> None:
        segment, end = len(self.sequences), seq.num_computed + num_tokens
        if is_sampled and seq.max_tokens:
            self.sampled.append(segment)
            seq.num_in_flight += 1
        elif is_sampled:
            self.completed.append(seq)
        # The token at a position is scored by the logits of the one before it.
        if seq.num_scored < (scored_end := min(end + 1, seq.num_prompt_tokens)):
            self.scored.append((segment, seq.num_scored, scored_end))
            seq.num_scored = scored_end
        self.sequences.append(seq)
        self.starts.append(seq.num_computed)
        self.num_tokens.append(num_tokens)
        seq.num_computed = end


@dataclass(slots=True)
class Outcome:
    """What a step gave: parallel `seq_ids` and `token_ids`, and those finished as (seq_id, reason, output tokens)."""

    seq_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: list[tuple[int, FinishReason, int]] = field(default_factory=list)


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        headroom_tokens: int = HEADROOM_TOKENS,
    ) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        # Every running Sequence must get its one token per step, so more rows than tokens make no sense.
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self.max_model_len = max_model_len
        self.headroom_tokens = headroom_tokens
        self.num_preemptions = 0
        self._alive: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()  # finished ones stay in it until they reach the front
        self._running: dict[int, Sequence] = {}  # in the order of admission
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._alive) - len(self._running)

    def add(self, seq: Sequence) -> None:
        """Raises InvalidRequest when the Sequence could never finish."""
        if seq.seq_id in self._alive:
            raise InvalidRequest("duplicate_sequence", f"Sequence {seq.seq_id} is already here")
        check_fits(seq, self.max_model_len, self.blocks.capacity)
        self._alive[seq.seq_id] = seq
        self._waiting.append(seq)

    def finish(self, seq_id: int, num_kept: int) -> None:
        """End a Sequence from outside, keeping its first `num_kept` output tokens; an unknown one is ignored."""
        seq = self._alive.get(seq_id)
        if seq is not None:
            del seq.output_ids[num_kept:]
            self._finish(seq)

    def schedule(self) -> StepPlan | None:
        """The next step, counted as launched; None when there is nothing that can run now."""
        plan = StepPlan()
        self._schedule_decode(plan)
        budget = self.max_batch_tokens - plan.num_decode
        for seq in self._running.values():
            if seq.num_computed < seq.num_prefill and budget > 0:
                budget -= self._schedule_prefill(plan, seq, budget)
        self._admit(plan, budget)
        return plan if plan.sequences else None

    def process(self, plan: StepPlan, tokens: npt.NDArray[np.int64]) -> Outcome:
        """Apply a step's sampled tokens, one per entry of `plan.sampled`."""
        return apply_tokens(plan, tokens, self._finish)

    def _schedule_decode(self, plan: StepPlan) -> None:
        block_size = self.blocks.block_size
        for seq in list(self._running.values()):
            if seq.num_computed < seq.num_prefill or seq.is_fully_scheduled or seq.seq_id not in self._running:
                continue
            if seq.num_computed == len(seq.block_table) * block_size:
                if self.blocks.num_free == 0 and self._preempt_last() is seq:
                    break
                self._append_blocks(plan, seq, 1)
            plan.append(seq, 1, is_sampled=True)
        plan.num_decode = len(plan.sequences)

    def _schedule_prefill(self, plan: StepPlan, seq: Sequence, budget: int) -> int:
        num_tokens = min(budget, seq.num_prefill - seq.num_computed)
        plan.append(seq, num_tokens, is_sampled=seq.num_computed + num_tokens == seq.num_prefill)
        return num_tokens

    def _admit(self, plan: StepPlan, budget: int) -> None:
        if not (self._waiting and self._free_rows and budget > 0):
            return
        headroom = sum(map(self._headroom, self._running.values()))
        while self._waiting and budget > 0 and self._free_rows:
            seq = self._waiting[0]
            if seq.state is SequenceState.FINISHED:
                self._waiting.popleft()
                continue
            # One that was preempted with a token in flight has not all of its text here yet. (One that was preempted in
            # this very step needs more blocks than it freed, so it is not taken straight back either.)
            if seq.num_in_flight or headroom + self._headroom(seq) > self.blocks.num_free:
                break
            self._waiting.popleft()
            self._running[seq.seq_id] = seq
            seq.state = SequenceState.RUNNING
            seq.row = self._free_rows.pop()
            seq.num_computed, seq.num_prefill = 0, seq.num_known
            plan.admitted.append(seq)
            self._append_blocks(plan, seq, self.blocks.blocks_for(seq.num_tokens))
            headroom += self._headroom(seq)
            budget -= self._schedule_prefill(plan, seq, budget)

    def _headroom(self, seq: Sequence) -> int:
        """Blocks a Sequence needs beside those it has, now and soon."""
        most = min(seq.num_tokens + self.headroom_tokens, seq.num_prompt_tokens + seq.max_tokens)
        return max(self.blocks.blocks_for(most) - len(seq.block_table), 0)

    def _append_blocks(self, plan: StepPlan, seq: Sequence, num: int) -> None:
        index = len(seq.block_table)
        blocks = self.blocks.allocate(num)
        seq.block_table.extend(blocks)
        plan.new_blocks.extend((seq.row, index + i, block) for i, block in enumerate(blocks))

    def _preempt_last(self) -> Sequence:
        """Recomputed later: its blocks are free at once, since steps run in the order in which they are launched."""
        _, seq = self._running.popitem()
        self.num_preemptions += 1
        self._release(seq)
        seq.state = SequenceState.WAITING
        self._waiting.appendleft(seq)
        return seq

    def _finish(self, seq: Sequence) -> None:
        if seq.state is SequenceState.RUNNING:
            del self._running[seq.seq_id]
            self._release(seq)
        seq.state = SequenceState.FINISHED
        del self._alive[seq.seq_id]

    def _release(self, seq: Sequence) -> None:
        self.blocks.free(seq.block_table)
        seq.block_table = []
        self._free_rows.append(seq.row)
        seq.row = -1


def check_fits(seq: Sequence, max_model_len: int, capacity: int) -> None:
    """Raises InvalidRequest when the Sequence could never finish."""
    if seq.num_prompt_tokens < 1 or seq.max_tokens < (1 if seq.score_from is None else 0):
        raise InvalidRequest(
            "empty_sequence",
            f"Sequence {seq.seq_id} has {seq.num_prompt_tokens} prompt tokens and max_tokens={seq.max_tokens}: "
            "both must be at least 1",
        )
    total = seq.num_prompt_tokens + seq.max_tokens
    for limit, name, setting in (
        (max_model_len, "the model's limit", "max_model_len"),
        (capacity, "the KV cache", "kv_tokens"),
    ):
        if total > limit:
            raise InvalidRequest(
                "context_length_exceeded",
                f"{seq.num_prompt_tokens} prompt tokens and max_tokens={seq.max_tokens} make {total}, over "
                f"{name} of {limit} tokens ({setting}): shorten the prompt or lower max_tokens",
            )


def apply_tokens(plan: StepPlan, tokens: npt.NDArray[np.int64], finish: Callable[[Sequence], None]) -> Outcome:
    """Give a step's sampled tokens to its Sequences, and `finish` those that end with theirs."""
    outcome = Outcome()
    for segment, token in zip(plan.sampled, tokens.tolist(), strict=True):
        seq = plan.sequences[segment]
        seq.num_in_flight -= 1
        if seq.state is SequenceState.FINISHED:
            continue
        seq.output_ids.append(token)
        outcome.seq_ids.append(seq.seq_id)
        outcome.token_ids.append(token)
        num_outputs = len(seq.output_ids)
        if token in seq.stop_token_ids:
            outcome.finished.append((seq.seq_id, "stop", num_outputs))
            finish(seq)
        elif num_outputs == seq.max_tokens:
            outcome.finished.append((seq.seq_id, "length", num_outputs))
            finish(seq)
    for seq in plan.completed:
        if seq.state is not SequenceState.FINISHED:
            outcome.finished.append((seq.seq_id, "length", 0))
            finish(seq)
    return outcome
