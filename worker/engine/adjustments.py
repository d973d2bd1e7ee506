"""Adjustments: what changes logits before tokens are drawn, applied to the rows that ask for it and to no others.

Penalties count tokens on the device, so a step need not know the one before it; their table has a line only for rows
with penalties, and nothing is allocated before the first of them. Biases and the stop tokens that min_tokens holds off
are few and known to the host, which sends them with each step.

Letters: K sampled rows, V vocabulary, P sampled rows with penalties, L lines of the table, E edited logits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batching.scheduler import StepPlan
from batching.sequence import Sequence

Array = npt.NDArray[np.int64] | npt.NDArray[np.float32]

#: Added to a count when the token is in the prompt; no output is so long that its counts reach this.
_IN_PROMPT = 1 << 30
#: Lines of the first table; it doubles when more rows have penalties at once.
_FIRST_LINES = 16


@dataclass(frozen=True, slots=True)
class _Edits:
    """A Sequence's share of the edited logits."""

    num_prompt: int
    min_tokens: int
    stops: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


class Adjustments:
    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._edits: dict[int, _Edits] = {}  # by row
        self._penalties = np.zeros((num_rows, 3), dtype=np.float32)  # repetition, presence, frequency
        self._lines = np.full(num_rows, -1, dtype=np.int64)  # by row, -1: no penalties
        self._is_edited = np.zeros(num_rows, dtype=bool)
        self._free_lines: list[int] = []
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # (L, V)

    def arrays(self, plan: StepPlan, sampled_rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Take note of the rows that start afresh; what this step needs on the device, empty when that is nothing."""
        arrays: dict[str, Array] = {}
        if plan.admitted:
            self._note(plan.admitted, arrays)
        if self._is_edited[sampled_rows].any():
            self._edit(plan, sampled_rows, arrays)
        lines = self._lines[sampled_rows]
        penalized = np.flatnonzero(lines >= 0)
        if len(penalized):
            arrays["penalized"] = penalized  # (P,)
            arrays["penalized_lines"] = lines[penalized]  # (P,)
            penalties = self._penalties[sampled_rows[penalized]]
            for i, name in enumerate(("repetition", "presence", "frequency")):
                arrays[name] = penalties[:, i].copy()  # (P,)
        return arrays

    def apply(self, logits: Tensor, sent: dict[str, Tensor]) -> Tensor:
        """logits (K, V) -> the same in float32 with this step's changes, perhaps in place."""
        self._start_counts(sent)
        if "edit_slots" not in sent and "penalized" not in sent:
            return logits
        logits = logits.float()
        if "edit_slots" in sent:
            logits.index_put_((sent["edit_slots"], sent["edit_tokens"]), sent["edit_values"], accumulate=True)
        if "penalized" in sent:
            counts = self._counts.index_select(0, sent["penalized_lines"])  # (P, V)
            terms = (sent[name][:, None] for name in ("repetition", "presence", "frequency"))
            penalized = penalize(logits.index_select(0, sent["penalized"]), counts, *terms)
            logits.index_copy_(0, sent["penalized"], penalized)
        return logits

    def count(self, tokens: Tensor, sent: dict[str, Tensor]) -> None:
        """tokens (K,) int64 have been sampled."""
        if "penalized" in sent:
            places = sent["penalized_lines"] * self._vocab_size + tokens[sent["penalized"]]
            self._counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _note(self, admitted: list[Sequence], arrays: dict[str, Array]) -> None:
        fresh: list[tuple[int, Sequence]] = []
        for seq in admitted:
            row, terms = seq.row, seq.terms
            self._edits.pop(row, None)
            if self._lines[row] >= 0:
                self._free_lines.append(int(self._lines[row]))
                self._lines[row] = -1
            self._is_edited[row] = terms is not None and bool(terms.logit_bias or terms.min_tokens)
            if terms is None:
                continue
            if self._is_edited[row]:
                self._edits[row] = _Edits(
                    seq.num_prompt_tokens,
                    terms.min_tokens,
                    np.array([i for i in seq.stop_token_ids if i < self._vocab_size], dtype=np.int64),
                    np.array(list(terms.logit_bias), dtype=np.int64),
                    np.array(list(terms.logit_bias.values()), dtype=np.float32),
                )
            if terms.has_penalties:
                self._penalties[row] = (terms.repetition_penalty, terms.presence_penalty, terms.frequency_penalty)
                self._lines[row] = self._take_line()
                fresh.append((int(self._lines[row]), seq))
        if fresh:
            arrays.update(self._known_counts(fresh))

    def _take_line(self) -> int:
        if not self._free_lines:
            num = len(self._counts)
            num_more = min(max(num, _FIRST_LINES), len(self._lines) - num)
            more = torch.zeros(num_more, self._vocab_size, dtype=torch.int32, device=self._device)
            self._counts = torch.cat((self._counts, more))
            self._free_lines.extend(range(num + num_more - 1, num - 1, -1))
        return self._free_lines.pop()

    def _known_counts(self, fresh: list[tuple[int, Sequence]]) -> dict[str, Array]:
        """The counts that Sequences bring along: of their prompts, and of their outputs when they were preempted."""
        places, counts = [], []
        for line, seq in fresh:
            in_prompt = np.unique(seq.prompt_ids)
            outputs, nums = np.unique(np.array(seq.output_ids, dtype=np.int64), return_counts=True)
            places.append(line * self._vocab_size + np.concatenate((in_prompt, outputs), dtype=np.int64))
            counts.append(np.concatenate((np.full(len(in_prompt), _IN_PROMPT), nums), dtype=np.int64))
        return {
            "new_lines": np.array([line for line, _ in fresh], dtype=np.int64),
            "known_places": np.concatenate(places),
            "known_counts": np.concatenate(counts),
        }

    def _start_counts(self, sent: dict[str, Tensor]) -> None:
        if "new_lines" in sent:
            self._counts.index_fill_(0, sent["new_lines"], 0)
            self._counts.view(-1).index_add_(0, sent["known_places"], sent["known_counts"].int())

    def _edit(self, plan: StepPlan, sampled_rows: npt.NDArray[np.int64], arrays: dict[str, Array]) -> None:
        slots, tokens, values = [], [], []
        for slot in np.flatnonzero(self._is_edited[sampled_rows]).tolist():
            edits, segment = self._edits[int(sampled_rows[slot])], plan.sampled[slot]
            num_outputs = plan.starts[segment] + plan.num_tokens[segment] - edits.num_prompt
            held_off = edits.stops if num_outputs < edits.min_tokens else edits.stops[:0]
            slots.append(np.full(len(edits.tokens) + len(held_off), slot, dtype=np.int64))
            tokens += [edits.tokens, held_off]
            values += [edits.values, np.full(len(held_off), -np.inf, dtype=np.float32)]
        if sum(map(len, slots)):
            arrays["edit_slots"] = np.concatenate(slots)  # (E,)
            arrays["edit_tokens"] = np.concatenate(tokens)  # (E,)
            arrays["edit_values"] = np.concatenate(values)  # (E,)


def penalize(logits: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """logits (P, V), counts (P, V) and terms (P, 1) -> (P, V). Repetition comes first, as in vLLM."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(counts > 0, repeated, logits)
    num_outputs = counts & (_IN_PROMPT - 1)
    return logits - frequency * num_outputs - presence * (num_outputs > 0)
