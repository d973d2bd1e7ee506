"""WholeScheduler: each Sequence whole in one step, after which it has ended: for models that give one answer to a text.

Packed, a step is filled in order of urgency, with whatever still fits. Padded, it is a rectangle: the most urgent and
those of like length that fit beside it.
"""

from dataclasses import dataclass, field

from batching.fair_share import FairShare
from batching.sequence import Sequence, SequenceState
from batching.urgency_order import UrgencyOrder
from protocol.errors import InvalidRequest

#: Waiting Sequences from which a step is filled, as a multiple of its most Sequences: enough to find fitting lengths,
#: and a bound on the cost of looking.
_WINDOW_STEPS = 8


@dataclass(slots=True)
class WholePlan:
    sequences: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: int = 0
    num_padding_tokens: int = 0


class WholeScheduler:
    def __init__(self, *, max_num_seqs: int, max_batch_tokens: int, max_model_len: int, is_padded: bool) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_step_tokens = max_batch_tokens  # of several together: less where memory has proven too small
        self.max_model_len = max_model_len
        self.is_padded = is_padded
        self._num_arrivals = 0
        self._fair_share = FairShare()
        self._waiting = UrgencyOrder()
        self._alive: dict[int, Sequence] = {}

    @property
    def num_running(self) -> int:
        return len(self._alive) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, seq: Sequence) -> None:
        """Raises InvalidRequest when the Sequence fits no step."""
        if seq.seq_id in self._alive:
            raise InvalidRequest("duplicate_sequence", f"Sequence {seq.seq_id} is already here")
        if not seq.num_prompt_tokens:
            raise InvalidRequest("empty_sequence", f"Sequence {seq.seq_id} has no tokens: it must have at least 1")
        for limit, setting in ((self.max_model_len, "max_model_len"), (self.max_batch_tokens, "max_batch_tokens")):
            if seq.num_prompt_tokens > limit:
                raise InvalidRequest(
                    "context_length_exceeded",
                    f"the text has {seq.num_prompt_tokens} tokens, over the limit of {limit} ({setting}): shorten it, "
                    "or raise the limit where the model allows it",
                )
        self._num_arrivals += 1
        seq.arrival = self._num_arrivals
        self._fair_share.join(seq)
        self._alive[seq.seq_id] = seq
        self._waiting.add(seq)

    def cancel(self, seq_id: int) -> None:
        """Nobody wants it any more; one that is unknown, or in a launched step, is left as it is."""
        seq = self._alive.get(seq_id)
        if seq is not None and seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)
            self._end(seq)

    def change_priority(self, seq_id: int, priority: int) -> None:
        """Somebody more urgent waits for this one too, or does no longer; one that runs stays as it is."""
        seq = self._alive.get(seq_id)
        if seq is not None and seq.state is SequenceState.WAITING and seq.priority != priority:
            self._waiting.remove(seq)
            self._fair_share.move(seq, priority)
            self._waiting.add(seq)

    def schedule(self) -> WholePlan | None:
        """The next step, counted as launched; None when nothing waits."""
        if not self._waiting:
            return None
        first, *others = self._waiting.first(_WINDOW_STEPS * self.max_num_seqs)
        if self.is_padded:
            others.sort(key=lambda seq: (seq.priority, abs(seq.num_prompt_tokens - first.num_prompt_tokens)))
        plan = WholePlan([first], first.num_prompt_tokens)
        width = first.num_prompt_tokens
        for seq in others:
            if len(plan.sequences) == self.max_num_seqs:
                break
            num_tokens = plan.num_scheduled_tokens + seq.num_prompt_tokens
            wider = max(width, seq.num_prompt_tokens)
            if (wider * (len(plan.sequences) + 1) if self.is_padded else num_tokens) <= self.max_step_tokens:
                plan.sequences.append(seq)
                plan.num_scheduled_tokens, width = num_tokens, wider
        if self.is_padded:
            plan.num_padding_tokens = width * len(plan.sequences) - plan.num_scheduled_tokens
        for seq in plan.sequences:
            self._waiting.remove(seq)
            self._fair_share.admit(seq)
            seq.state = SequenceState.RUNNING
        return plan

    def finish(self, plan: WholePlan) -> None:
        """The step is done."""
        for seq in plan.sequences:
            self._end(seq)

    def take_back(self, plan: WholePlan) -> None:
        """The step has failed: its Sequences wait again."""
        for seq in plan.sequences:
            seq.state = SequenceState.WAITING
            self._waiting.add(seq)

    def _end(self, seq: Sequence) -> None:
        seq.state = SequenceState.FINISHED
        self._fair_share.leave(seq)
        del self._alive[seq.seq_id]
