"""Scheduler: which Sequences run in the next step. Policy alone: it never sees a tensor, and its cost per step does not
grow with the number waiting.

The most urgent waiting Sequence is admitted next, and nothing is admitted past it; the least urgent running one is
preempted when blocks run out, or when one of a more urgent class has no room, and keeps its place. So the most urgent
Sequence of all always gets on, and each waits for the more urgent ones alone: for earlier ones among equals, but
without end while more urgent ones keep arriving.

It may be asked for step t+1 before the tokens of step t are known. Lengths are known in advance, so nothing is
scheduled past max_tokens; a stop token is seen one step late and what was sampled behind it is dropped.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from batching.block_manager import BlockManager, content_name
from batching.fair_share import FairShare
from batching.peak_demand import PeakDemand
from batching.sequence import Sequence, SequenceState
from batching.shared_contexts import SharedContexts
from batching.shared_prefixes import PrefixTiles, SharedPrefixes
from batching.shared_prompt import SharedPrompt
from batching.urgency_queue import UrgencyQueue
from protocol.errors import InvalidRequest
from protocol.frames import FinishReason

#: Tokens. Admission leaves room for this many more of every running Sequence, or for all it may still have, so that a
#: newcomer is not preempted by the next steps of those already running.
HEADROOM_TOKENS = 16
#: How admission judges that there is room. "headroom": see HEADROOM_TOKENS. "peak": the blocks suffice until all have
#: had all tokens they may have, so nothing is ever preempted. "auto": by the peak while no Sequence concerned has stop
#: tokens, which make lengths mere limits, by headroom otherwise.
Admission = Literal["auto", "headroom", "peak"]


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
    #: Blocks to copy before anything of this step is written, as (from, to). No block is in both places.
    copies: list[tuple[int, int]] = field(default_factory=list)
    #: Tokens of this step whose K and V are written to another block as well, as (segment, first position, position
    #: after the last, block).
    duplicates: list[tuple[int, int, int, int]] = field(default_factory=list)
    prefixes: PrefixTiles | None = None  # of the decode rows, where reading them once for several rows pays
    num_prefix_hit_tokens: int = 0  # of those admitted: not computed, since their K and V are there already

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(self.num_tokens)

    @property
    def is_decode_only(self) -> bool:
        """One token of each Sequence, all of them sampled, and all but the last known to the device alone."""
        return self.num_decode == len(self.sequences)

    @property
    def num_padding_tokens(self) -> int:
        """Computed beside them for nobody: none in a flat row."""
        return 0

    def segment_of(self, seq: Sequence) -> int | None:
        return next((i for i in range(self.num_decode, len(self.sequences)) if self.sequences[i] is seq), None)

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


@dataclass(frozen=True, slots=True)
class Prefix:
    """What is there already of a Sequence's known tokens: full blocks to share, and where the rest is to be had: from
    a block to copy, or from what a segment of this very step writes."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    copied: int | None = None
    segment: int | None = None


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
        admission: Admission = "auto",
        headroom_tokens: int = HEADROOM_TOKENS,
        prefix_reuse: bool = True,
    ) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        # Every running Sequence must get its one token per step, so more rows than tokens make no sense.
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self.max_model_len = max_model_len
        self.admission = admission
        self.headroom_tokens = headroom_tokens
        self.prefix_reuse = prefix_reuse
        self._contexts = SharedContexts()
        self.prefixes = SharedPrefixes(self.max_num_seqs, blocks.block_size, blocks.num_holders)
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._fair_share = FairShare()
        self._alive: dict[int, Sequence] = {}
        self._waiting = UrgencyQueue(SequenceState.WAITING)  # but for those who wait for a shared prompt
        self._running: dict[int, Sequence] = {}  # in the order of admission
        self._preemptible = UrgencyQueue(SequenceState.RUNNING, is_reversed=True)
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))
        self._demand: PeakDemand | None = None  # of those running, while Sequences are admitted
        self._no_room: tuple[Sequence | None, int] = (None, 0)  # who had none, after how many changes of the blocks

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._alive) - len(self._running)

    def get(self, seq_id: int) -> Sequence | None:
        return self._alive.get(seq_id)

    def add(self, seq: Sequence, *, sample_of: Sequence | None = None) -> None:
        """Raises InvalidRequest when the Sequence could never finish.

        `sample_of` is one alive with the same prompt. It is computed once for all of them, and each goes on in blocks
        of its own.
        """
        if seq.seq_id in self._alive:
            raise InvalidRequest("duplicate_sequence", f"Sequence {seq.seq_id} is already here")
        check_fits(seq, self.max_model_len, self.blocks.capacity)
        self._num_arrivals += 1
        seq.arrival = self._num_arrivals
        self._fair_share.join(seq)
        self._alive[seq.seq_id] = seq
        if sample_of is not None and seq.num_reusable > 0:
            shared = sample_of.shared_prompt
            if shared is None:
                shared = sample_of.shared_prompt = SharedPrompt(sample_of)
                if self._has_prompt(sample_of):
                    shared.hold(sample_of)
            seq.shared_prompt = shared
            if shared.leader is not None:
                shared.park(seq)
                return
        self._waiting.push(seq)

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
        leader = seq.shared_prompt.leader if seq.shared_prompt is not None else None
        self._fair_share.move(seq, priority)
        if seq.state is SequenceState.RUNNING:
            self._preemptible.push(seq)
        elif leader is None or leader is seq:
            self._waiting.push(seq)
        elif leader.priority > priority:
            self.change_priority(leader.seq_id, priority)  # it waits for that one's prompt

    def schedule(self) -> StepPlan | None:
        """The next step, counted as launched; None when there is nothing that can run now."""
        plan = StepPlan()
        self._yield_to_urgent(plan)
        self._demand = None
        self._schedule_decode(plan)
        budget = self.max_batch_tokens - plan.num_decode
        # Sorting is stable: equally urgent ones stay in the order of their admission.
        for seq in sorted(filter(_is_in_prefill, self._running.values()), key=_priority):
            if budget > 0:
                budget -= self._schedule_prefill(plan, seq, budget)
        self._admit(plan, budget)
        self._note_prompts(plan)
        return plan if plan.sequences else None

    def take_back(self, plans: Iterable[StepPlan]) -> None:
        """These steps, the last ones launched, have failed, and all before them are processed: everything is preempted.

        What they were to write is not there, and may have been named already.
        """
        for plan in plans:
            for segment in plan.sampled:
                plan.sequences[segment].num_in_flight -= 1
            for segment, start, _ in plan.scored:
                plan.sequences[segment].num_scored = min(plan.sequences[segment].num_scored, start)
        self.blocks.forget()
        for seq in self._running.values():
            seq.num_computed = 0
        while self._running:
            self._preempt()

    def process(self, plan: StepPlan, tokens: npt.NDArray[np.int64]) -> Outcome:
        """Apply a step's sampled tokens, one per entry of `plan.sampled`."""
        return apply_tokens(plan, tokens, self._finish)

    def _yield_to_urgent(self, plan: StepPlan) -> None:
        """Admit those of a more urgent class than some that run; these give way where there is no room beside them."""
        while (seq := self._waiting.first()) is not None and not seq.num_in_flight:
            least = self._preemptible.first()
            if least is None or least.priority <= seq.priority:
                return
            num_before, num_beside = self._num_taken(seq.priority)
            if num_before >= self.max_batch_tokens:
                return
            prefix, self._demand = self._find_prefix(seq, plan), None
            has_token = num_before + num_beside < self.max_batch_tokens
            if has_token and self._free_rows and self._has_room(seq, prefix):
                self._waiting.pop()
                self._start(plan, seq, prefix)
            else:
                self._preempt()

    def _num_taken(self, priority: int) -> tuple[int, int]:
        """Tokens of this step for those at least as urgent, and for the less urgent ones that decode."""
        num_before = num_beside = 0
        for seq in self._running.values():
            if seq.priority > priority:
                num_beside += not _is_in_prefill(seq)
            else:
                num_before += max(seq.num_prefill - seq.num_computed, 1)
        return num_before, num_beside

    def _schedule_decode(self, plan: StepPlan) -> None:
        ready = [s for s in self._running.values() if s.num_computed >= s.num_prefill and not s.is_fully_scheduled]
        num_needed = sum(map(self._needs_block, ready))
        while num_needed > self.blocks.num_free:
            num_needed -= self._preempt()
        for seq in ready:
            if seq.state is SequenceState.RUNNING:
                if self._needs_block(seq):
                    self._append_blocks(plan, seq, self.blocks.allocate(1))
                plan.append(seq, 1, is_sampled=True)
        plan.num_decode = len(plan.sequences)
        plan.prefixes = self.prefixes.tiles(plan.sequences, plan.starts)

    def _needs_block(self, seq: Sequence) -> bool:
        """Whether the next token of a decoding Sequence has no place in its blocks."""
        return seq.num_computed == len(seq.block_table) * self.blocks.block_size

    def _schedule_prefill(self, plan: StepPlan, seq: Sequence, budget: int) -> int:
        num_tokens = min(budget, seq.num_prefill - seq.num_computed)
        plan.append(seq, num_tokens, is_sampled=seq.num_computed + num_tokens == seq.num_prefill)
        # Those admitted to this very step can share it: every layer writes all of a step's K and V before it reads any.
        self._publish(seq, seq.num_prompt_tokens)
        return num_tokens

    def _admit(self, plan: StepPlan, budget: int) -> None:
        seq = self._waiting.first()
        while seq is not None and self._free_rows and budget > 0:
            # One that was preempted with a token in flight has not all of its text here yet.
            if seq.num_in_flight or self._no_room == (seq, self.blocks.num_changes):
                return
            prefix = self._find_prefix(seq, plan)
            if not self._has_room(seq, prefix):
                self._no_room = (seq, self.blocks.num_changes)
                return
            self._waiting.pop()
            self._start(plan, seq, prefix)
            budget -= self._schedule_prefill(plan, seq, budget)
            if self._demand is not None:
                self._demand.add(seq)
            seq = self._waiting.first()

    def _has_room(self, seq: Sequence, prefix: Prefix) -> bool:
        """The answer can turn from no to yes only when blocks become free or known, or another one leaves."""
        blocks = self.blocks
        num_unheld = sum(blocks.num_holders(block) == 0 for block in prefix.blocks)
        is_known = not (seq.stop_token_ids or any(other.stop_token_ids for other in self._running.values()))
        if self.admission == "headroom" or (self.admission == "auto" and not is_known):
            needed = sum(map(self._headroom, self._running.values()), self._headroom(seq))
            return needed - len(prefix.blocks) + num_unheld <= blocks.num_free
        if self._demand is None:
            # Where memory has proven too small, a step may have fewer tokens than there are rows.
            least_budget = max(self.max_batch_tokens - (self.max_num_seqs - 1), 1)
            self._demand = PeakDemand(self._running.values(), blocks.block_size, least_budget)
        num_used = blocks.num_blocks - blocks.num_free + num_unheld
        return self._demand.fits(seq, len(prefix.blocks), prefix.num_tokens, num_used, blocks.num_blocks)

    def _start(self, plan: StepPlan, seq: Sequence, prefix: Prefix) -> None:
        seq.state = SequenceState.RUNNING
        self._fair_share.admit(seq)
        self._running[seq.seq_id] = seq
        self._preemptible.push(seq)
        seq.row = self._free_rows.pop()
        # At least one: whatever is to be known ends with a step.
        seq.num_computed, seq.num_prefill = prefix.num_tokens, max(seq.num_to_compute, prefix.num_tokens + 1)
        seq.num_named = num_shared = len(prefix.blocks)
        plan.admitted.append(seq)
        plan.num_prefix_hit_tokens += prefix.num_tokens
        self.blocks.share(prefix.blocks)
        self._append_blocks(plan, seq, prefix.blocks)
        self._append_blocks(plan, seq, self.blocks.allocate(self.blocks.blocks_for(seq.num_tokens) - num_shared))
        if prefix.copied is not None:
            plan.copies.append((prefix.copied, seq.block_table[num_shared]))
        if prefix.segment is not None:
            first = num_shared * self.blocks.block_size
            plan.duplicates.append((prefix.segment, first, prefix.num_tokens, seq.block_table[num_shared]))
        self._contexts.admit(seq)
        self.prefixes.join(seq, num_shared)

    def _find_prefix(self, seq: Sequence, plan: StepPlan) -> Prefix:
        block_size, num_tokens = self.blocks.block_size, seq.num_reusable
        holder = seq.shared_prompt.holder if seq.shared_prompt is not None else None
        if holder is not None and not seq.output_ids:
            num_full, rest = divmod(num_tokens, block_size)
            copied = holder.block_table[num_full] if rest else None
            return Prefix(holder.block_table[:num_full], num_tokens, copied)
        if not self.prefix_reuse:
            return Prefix()
        num_full, rest = divmod(num_tokens, block_size)
        if rest and (holder := self._contexts.holder(seq)) is not None:
            full = holder.block_table[:num_full]
            segment = plan.segment_of(holder)
            if segment is None or plan.starts[segment] >= num_tokens:
                return Prefix(full, num_tokens, copied=holder.block_table[num_full])
            if plan.starts[segment] <= num_full * block_size:
                return Prefix(full, num_tokens, segment=segment)
        self._name_blocks(seq, num_full)
        blocks = self.blocks.find(seq.block_names[:num_full])
        return Prefix(blocks, len(blocks) * block_size)

    def _note_prompts(self, plan: StepPlan) -> None:
        """Whole prompts that this step writes can be copied from by the steps launched after it."""
        for seq in plan.sequences[plan.num_decode :]:
            if seq.shared_prompt is not None and self._has_prompt(seq):
                for waiting in seq.shared_prompt.hold(seq):
                    self._waiting.push(waiting)
        self._contexts.renew(plan.admitted)

    def _has_prompt(self, seq: Sequence) -> bool:
        """But for its last token, which everybody computes, or nobody."""
        return seq.state is SequenceState.RUNNING and seq.num_computed >= seq.num_prompt_tokens - 1

    def _publish(self, seq: Sequence, num_tokens: int) -> None:
        """Name the full blocks among the first `num_tokens`, as far as they are written and known."""
        num_full = min(num_tokens, seq.num_computed, seq.num_known) // self.blocks.block_size
        if self.prefix_reuse and num_full > seq.num_named:
            self._name_blocks(seq, num_full)
            for i in range(seq.num_named, num_full):
                self.blocks.name(seq.block_table[i], seq.block_names[i])
            seq.num_named = num_full

    def _name_blocks(self, seq: Sequence, num: int) -> None:
        names, num_bytes = seq.block_names, 4 * self.blocks.block_size
        first = len(names)
        if first < num:
            tokens = seq.tokens(first * self.blocks.block_size, num * self.blocks.block_size)
            data = memoryview(tokens.astype("<i4").tobytes())
            name = names[-1] if names else b""
            for start in range(0, len(data), num_bytes):
                name = content_name(name, data[start : start + num_bytes])
                names.append(name)

    def _headroom(self, seq: Sequence) -> int:
        """Blocks a Sequence needs beside those it has, now and soon."""
        most = min(seq.num_tokens + self.headroom_tokens, seq.num_prompt_tokens + seq.max_tokens)
        return max(self.blocks.blocks_for(most) - len(seq.block_table), 0)

    def _append_blocks(self, plan: StepPlan, seq: Sequence, blocks: list[int]) -> None:
        index = len(seq.block_table)
        seq.block_table.extend(blocks)
        plan.new_blocks.extend((seq.row, index + i, block) for i, block in enumerate(blocks))

    def _preempt(self) -> bool:
        """Send the least urgent back; whether it was a decoding one that needed a block.

        Its blocks are free at once, since steps run in the order in which they are launched; what is known of its text
        can be found again in them until they are needed.
        """
        seq = self._preemptible.first()
        assert seq is not None
        self._preemptible.pop()
        needed_block = seq.num_computed >= seq.num_prefill and not seq.is_fully_scheduled and self._needs_block(seq)
        self.num_preemptions += 1
        self._publish(seq, seq.num_known)
        del self._running[seq.seq_id]
        self._release(seq)
        seq.state = SequenceState.WAITING
        self._waiting.push(seq)
        return needed_block

    def _finish(self, seq: Sequence) -> None:
        if seq.state is SequenceState.RUNNING:
            del self._running[seq.seq_id]
            self._release(seq)
        seq.state = SequenceState.FINISHED
        self._fair_share.leave(seq)
        del self._alive[seq.seq_id]
        if seq.shared_prompt is not None and (leader := seq.shared_prompt.leave(seq)) is not None:
            self._waiting.push(leader)

    def _release(self, seq: Sequence) -> None:
        self.prefixes.leave(seq)
        self._contexts.release(seq)
        self.blocks.free(seq.block_table)
        seq.block_table = []
        self._no_room = (None, 0)  # what was kept for it is free, though others may hold all of its blocks
        self._free_rows.append(seq.row)
        seq.row = -1
        if seq.shared_prompt is not None:
            seq.shared_prompt.release(seq)


def _is_in_prefill(seq: Sequence) -> bool:
    return seq.num_computed < seq.num_prefill


def _priority(seq: Sequence) -> int:
    return seq.priority


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
