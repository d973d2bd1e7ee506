"""The engine's loop over rectangles without a model: caches are lists of tokens, and every step is checked."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from batching.layout import pack
from batching.padded import PaddedPlan, PaddedScheduler
from batching.sequence import Sequence, SequenceState
from tests.batching.fake_runner import next_token

_PAD = -1


@dataclass
class PaddedLoop:
    """`is_too_large` says of a step whether memory has no room for it."""

    scheduler: PaddedScheduler
    is_too_large: Callable[[PaddedPlan], bool] = lambda _: False
    caches: dict[int, list[list[int]]] = field(default_factory=dict)  # by number: of each row, by column
    texts: dict[Sequence, list[int]] = field(default_factory=dict)  # prompts and all that was sampled
    scored: dict[Sequence, list[int]] = field(default_factory=dict)
    finished: dict[int, tuple[str, int]] = field(default_factory=dict)
    plans: list[PaddedPlan] = field(default_factory=list)
    num_failures: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.num_running or self.scheduler.num_waiting)

    def add(self, seq: Sequence) -> None:
        self.scheduler.add(seq)
        self.texts[seq] = seq.prompt_ids.tolist()

    def run(self) -> None:
        while self.has_work:
            self.step()
            assert len(self.plans) < 5000, "no progress"

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan is not None
        if self.is_too_large(plan):
            self.num_failures += 1
            self.caches.clear()
            self.scheduler.take_back([plan])
            return
        self.plans.append(plan)
        self.check(plan)
        outcome = self.scheduler.process(plan, self.launch(plan))
        self.finished |= {seq_id: (reason, num) for seq_id, reason, num in outcome.finished}

    def launch(self, plan: PaddedPlan) -> np.ndarray:
        caches = self.caches
        self.caches = caches = {number: caches[number] for number in caches.keys() & plan.caches}
        for number, rows in plan.kept.items():
            cache = caches[number]
            caches[number] = [cache[row] for row in rows]
        for join in plan.joins:
            ours = [[_PAD] * join.num_pads + row for row in caches[join.number]]
            caches[join.number] = ours + [[_PAD] * join.num_other_pads + row for row in caches.pop(join.other)]
        if plan.is_new:
            assert plan.number not in caches
            caches[plan.number] = [[] for _ in plan.rectangle]
        columns = np.full((len(plan.rectangle), plan.num_columns), _PAD)
        layout = pack(plan)
        places = np.repeat(plan.rows, layout.query_lens)
        columns[places, layout.positions + np.array(plan.pads)[places] - plan.first_column] = layout.prefill_token_ids
        for row, cached in enumerate(caches[plan.number]):
            assert len(cached) == plan.first_column
            cached += columns[row].tolist()
        for segment, first, end in plan.scored:
            self.scored.setdefault(plan.sequences[segment], []).extend(range(first, end))
        return np.array([self._sample(plan, segment) for segment in plan.sampled], dtype=np.int64)

    def _sample(self, plan: PaddedPlan, segment: int) -> int:
        seq, row = plan.sequences[segment], plan.rows[segment]
        text = self.texts[seq]
        assert self.caches[plan.number][row][plan.pads[row] :] == text
        text.append(next_token(np.array(text), seq.sample))
        return text[-1]

    def check(self, plan: PaddedPlan) -> None:
        """What holds of every step, whatever arrived."""
        scheduler, sizes = self.scheduler, Counter[str]()
        assert plan.sequences, "a step for nobody"
        assert plan.num_scheduled_tokens <= scheduler.max_batch_tokens
        assert plan.num_padding_tokens >= 0
        running = [seq for seq in self.texts if seq.state is SequenceState.RUNNING]
        assert len({seq.row for seq in running}) == len(running) <= scheduler.max_num_seqs
        assert all(0 <= seq.row < scheduler.max_num_seqs for seq in running)
        held = [seq for rectangle in scheduler._rectangles for seq in rectangle.rows]
        assert {seq.seq_id for seq in held if seq.state is SequenceState.RUNNING} == {seq.seq_id for seq in running}
        assert len(set(held)) == len(held) == plan.num_rows <= scheduler.max_num_seqs
        for rectangle in scheduler._rectangles:
            sizes["cells"] += rectangle.num_cells
            assert rectangle.column <= rectangle.num_columns <= scheduler.max_model_len
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks - sizes["cells"] >= 0
