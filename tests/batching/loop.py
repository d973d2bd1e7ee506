"""The engine's loop without an engine: a Scheduler drives the fake runner, and every step is checked."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from batching.block_manager import BlockManager
from batching.scheduler import Admission, Scheduler, StepPlan
from batching.sequence import Sequence, SequenceState
from tests.batching.fake_runner import FakeRunner, next_token

MAX_MODEL_LEN = 24


@dataclass(frozen=True)
class Arrival:
    """Samples of one prompt. `cancels` are (sample, step, output tokens to keep)."""

    prompt: list[int]
    max_tokens: int
    stops: frozenset[int] = frozenset()
    step: int = 0
    cancels: tuple[tuple[int, int, int], ...] = ()
    num_samples: int = 1
    priority: int = 0
    urged: tuple[tuple[int, int, int], ...] = ()  # (sample, step, priority from then on)
    deadline: float | None = None
    score_from: int | None = None
    tenant: str = ""
    job: str = ""


@dataclass(frozen=True)
class Limits:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    lookahead: int
    headroom_tokens: int = 0
    admission: Admission = "headroom"
    prefix_reuse: bool = True


def sequential(prompt: list[int], max_tokens: int, stops: Iterable[int] = (), sample: int = 0) -> list[int]:
    """The text by definition: one token after the other, alone."""
    text = list(prompt)
    for _ in range(max_tokens):
        text.append(next_token(np.array(text), sample))
        if text[-1] in stops:
            break
    return text[len(prompt) :]


@dataclass
class Loop:
    limits: Limits
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, tuple[str, int]] = field(default_factory=dict)
    num_steps: int = 0
    num_hit_tokens: int = 0
    num_copies: int = 0
    num_grouped_steps: int = 0
    num_duplicating_steps: int = 0
    admitted: list[int] = field(default_factory=list)
    num_scored: dict[Sequence, int] = field(default_factory=dict)
    failing: frozenset[int] = frozenset()  # launches for which memory is too small, by their number
    num_launches: int = 0
    num_failures: int = 0

    def __post_init__(self) -> None:
        limits = self.limits
        self.scheduler = Scheduler(
            BlockManager(limits.num_blocks, limits.block_size),
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_len=MAX_MODEL_LEN,
            headroom_tokens=limits.headroom_tokens,
            admission=limits.admission,
            prefix_reuse=limits.prefix_reuse,
        )
        self.runner = FakeRunner(limits.max_num_seqs, limits.num_blocks, limits.block_size, MAX_MODEL_LEN)
        self.in_flight: deque[tuple[StepPlan, np.ndarray]] = deque()
        self.alive: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.in_flight or self.scheduler.num_running or self.scheduler.num_waiting)

    def add(self, seq_id: int, arrival: Arrival) -> None:
        """Its samples are seq_id, seq_id + 1 and so on."""
        for sample in range(arrival.num_samples):
            seq = Sequence(
                seq_id + sample,
                np.array(arrival.prompt, dtype=np.int32),
                max_tokens=arrival.max_tokens,
                stop_token_ids=arrival.stops,
                sample=sample,
                priority=arrival.priority,
                deadline=arrival.deadline,
                score_from=arrival.score_from,
                tenant=arrival.tenant,
                job=arrival.job,
            )
            self.scheduler.add(seq, sample_of=self.alive[seq_id] if sample else None)
            self.alive[seq.seq_id] = seq
            self.outputs[seq.seq_id] = []

    def finish(self, seq_id: int, num_kept: int) -> None:
        seq = self.alive[seq_id]
        self.scheduler.finish(seq_id, num_kept)
        assert seq.block_table == []
        self.check_blocks()

    def step(self) -> None:
        self.num_steps += 1
        while len(self.in_flight) <= self.limits.lookahead:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self.check(plan)
            self.num_launches += 1
            if self.num_launches in self.failing:
                self.give_way(plan)
                return
            self.in_flight.append((plan, self.runner.launch(plan)))
        if not self.in_flight:
            assert not self.scheduler.num_waiting, "nothing runs, yet some wait"
            return
        self.process()

    def give_way(self, failed: StepPlan) -> None:
        """Memory was too small for a step: those before it end, and all that runs starts again with smaller ones."""
        self.num_failures += 1
        while self.in_flight:
            self.process()
        for segment, first, _ in failed.scored:
            self.num_scored[failed.sequences[segment]] = first
        self.runner.fail({seq: [*seq.prompt_ids.tolist(), *seq.output_ids] for seq in self.runner.texts})
        self.scheduler.take_back([failed])
        self.scheduler.max_batch_tokens = max(self.scheduler.max_batch_tokens // 2, 1)
        self.check_blocks()

    def process(self) -> None:
        outcome = self.scheduler.process(*self.in_flight.popleft())
        for seq_id, token in zip(outcome.seq_ids, outcome.token_ids, strict=True):
            self.outputs[seq_id].append(token)
        for seq_id, reason, num_tokens in outcome.finished:
            assert seq_id not in self.finished
            self.finished[seq_id] = (reason, num_tokens)

    def run(self) -> None:
        while self.has_work:
            self.step()
            assert self.num_steps < 5000, "no progress"

    def check(self, plan: StepPlan) -> None:
        """What holds of every step, whatever arrived."""
        limits = self.limits
        assert 0 < plan.num_scheduled_tokens <= limits.max_batch_tokens
        assert len({seq.seq_id for seq in plan.sequences}) == len(plan.sequences)
        assert all(num == 1 for num in plan.num_tokens[: plan.num_decode])
        running = self.check_blocks()
        assert len(running) == self.scheduler.num_running <= limits.max_num_seqs
        assert len({seq.row for seq in running}) == len(running)
        assert set(map(id, plan.sequences)) <= set(map(id, running))
        assert all(len(seq.output_ids) + seq.num_in_flight <= seq.max_tokens for seq in running)
        # Every token of the plan has its block, and nothing is written where another one reads, but for one that has
        # been admitted to this step because it is written.
        written: Counter[int] = Counter()
        for seq, start, num_tokens in zip(plan.sequences, plan.starts, plan.num_tokens, strict=True):
            indices = range(start // limits.block_size, (start + num_tokens - 1) // limits.block_size + 1)
            written.update(seq.block_table[i] for i in indices)
        assert set(written.values()) <= {1}
        before = Counter(block for seq in running if seq not in plan.admitted for block in seq.block_table)
        assert all(before[block] <= 1 for block in written)
        targets = [target for _, target in plan.copies]
        assert set(targets) <= set(written)
        assert len(set(targets)) == len(targets)
        assert not set(targets) & {source for source, _ in plan.copies}

        starts = {seq.seq_id: start for seq, start in zip(plan.sequences, plan.starts, strict=True)}
        assert plan.num_prefix_hit_tokens == sum(starts[seq.seq_id] for seq in plan.admitted)
        # Every score that is asked for is given once, from a position that this step computes.
        for segment, first, end in plan.scored:
            seq, start = plan.sequences[segment], plan.starts[segment]
            assert start < first < end <= start + plan.num_tokens[segment] + 1
            assert first == self.num_scored.setdefault(seq, max(seq.score_from or 0, 1))
            self.num_scored[seq] = end
        self.check_prefixes(plan)
        self.num_hit_tokens += plan.num_prefix_hit_tokens
        self.num_copies += len(plan.copies)
        self.num_duplicating_steps += bool(plan.duplicates)
        self.admitted.extend(seq.seq_id for seq in plan.admitted)

    def check_prefixes(self, plan: StepPlan) -> None:
        """Rows that read a prefix together have its blocks, and tokens of their own behind it."""
        if plan.prefixes is None:
            return
        self.num_grouped_steps += 1
        rows = plan.sequences[: plan.num_decode]
        covered = np.zeros(len(rows), dtype=np.int32)
        for members, num_tokens in zip(plan.prefixes.members.tolist(), plan.prefixes.lens.tolist(), strict=True):
            there = [member for member in members if member >= 0]
            assert there == members[: len(there)] != []
            num_blocks, rest = divmod(num_tokens, self.limits.block_size)
            assert rest == 0 < num_blocks
            assert len({tuple(rows[member].block_table[:num_blocks]) for member in there}) == 1
            assert all(plan.starts[member] >= num_tokens for member in there)
            assert not covered[there].any()
            covered[there] = num_tokens
        assert covered.tolist() == plan.prefixes.starts.tolist()

    def check_blocks(self) -> list[Sequence]:
        """Every block is held exactly by the running Sequences that have it in their table; returns those."""
        blocks = self.scheduler.blocks
        running = [seq for seq in self.alive.values() if seq.state is SequenceState.RUNNING]
        assert all(len(set(seq.block_table)) == len(seq.block_table) for seq in running)
        assert all(not seq.block_table for seq in self.alive.values() if seq.state is not SequenceState.RUNNING)
        holders = Counter(block for seq in running for block in seq.block_table)
        assert [blocks.num_holders(block) for block in range(blocks.num_blocks)] == [
            holders[block] for block in range(blocks.num_blocks)
        ]
        assert blocks.num_free == blocks.num_blocks - len(holders)
        return running
