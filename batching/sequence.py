"""Sequence: one sample being generated, as the host sees it.

The host may be a step behind: a token that a launched step samples is counted at once and known later.
"""

import enum
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from protocol.frames import LogitTerms

if TYPE_CHECKING:
    from batching.shared_prompt import SharedPrompt


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    __slots__ = (
        "arrival",
        "block_names",
        "block_table",
        "context_name",
        "deadline",
        "fair_start",
        "job",
        "logprobs",
        "max_tokens",
        "min_p",
        "num_computed",
        "num_in_flight",
        "num_named",
        "num_prefill",
        "num_scored",
        "num_top",
        "output_ids",
        "priority",
        "prompt_ids",
        "row",
        "sample",
        "score_from",
        "seed",
        "seq_id",
        "shared_prompt",
        "state",
        "stop_token_ids",
        "temperature",
        "tenant",
        "terms",
        "top_k",
        "top_p",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_ids: npt.NDArray[np.int32],
        *,
        max_tokens: int,
        stop_token_ids: Iterable[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        sample: int = 0,
        score_from: int | None = None,
        num_top: int = 0,
        min_p: float = 0.0,
        terms: LogitTerms | None = None,
        logprobs: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
        job: str = "",
    ) -> None:
        self.seq_id = seq_id
        self.prompt_ids = prompt_ids
        self.max_tokens = max_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.seed = seed
        self.sample = sample
        self.score_from = score_from  # first prompt token whose log-probability is asked for
        self.num_top = num_top
        self.min_p = min_p
        self.terms = terms
        self.logprobs = logprobs
        self.priority = priority  # lower is more urgent
        self.deadline = deadline  # seconds since the epoch; earlier is more urgent, None least
        self.tenant, self.job = tenant, job  # who share what there is
        self.fair_start = 0.0  # see batching.fair_share

        self.state = SequenceState.WAITING
        self.output_ids: list[int] = []
        self.num_in_flight = 0  # sampled by a launched step, not yet known here
        self.num_computed = 0  # tokens whose K and V are written, or will be by a launched step
        self.num_prefill = (
            0  # tokens known at admission: up to here steps read them from the host, then from the device
        )
        # Prompt tokens up to here are scored, or will be by a launched step: never again, also after a preemption.
        self.num_scored = len(prompt_ids) if score_from is None else max(score_from, 1)
        self.block_table: list[int] = []
        self.num_named = 0  # leading blocks of the table whose content the BlockManager knows
        self.block_names: list[bytes] = []  # of the leading full blocks, as far as they were asked for
        self.arrival = 0  # among all Sequences the scheduler was given
        self.shared_prompt: SharedPrompt | None = None
        self.context_name: bytes | None = None  # while running, of what is scored behind
        self.row = -1  # index of the per-row state on the device while running

    @property
    def urgency(self) -> tuple[int, float, float, int]:
        """Smaller is more urgent: priority, then deadline, then whose turn it is, then arrival."""
        return self.priority, math.inf if self.deadline is None else self.deadline, self.fair_start, self.arrival

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_in_flight

    @property
    def num_to_compute(self) -> int:
        """Known tokens, but for the last of a text that goes no further: nobody asks for the logits there."""
        return self.num_known if self.max_tokens else self.num_known - 1

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose K and V may come from elsewhere: nobody asks for the logits at their positions."""
        needs_score = self.num_scored < len(self.prompt_ids)
        return min(self.num_known, self.num_scored if needs_score else self.num_known) - 1

    @property
    def is_fully_scheduled(self) -> bool:
        """Every output token it may have is known or in flight, so only waiting is left."""
        return len(self.output_ids) + self.num_in_flight >= self.max_tokens

    def tokens(self, start: int, end: int) -> npt.NDArray[np.int32]:
        """Known token ids in [start, end), prompt and outputs as one text."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        outputs = np.array(self.output_ids[max(start - num_prompt, 0) : end - num_prompt], dtype=np.int32)
        return np.concatenate((self.prompt_ids[start:num_prompt], outputs))
