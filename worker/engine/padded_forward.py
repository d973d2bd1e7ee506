"""PaddedForward: a model run over rectangles of texts, with a mask and transformers' own caches.

Letters: R rows, C columns of the step, L columns so far, V vocabulary.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PaddedForward:
    """A model with the caches of its rectangles, by their numbers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes_positions = takes_any or "position_ids" in parameters
        self.caches: dict[int, Any] = {}

    def start(self, number: int) -> None:
        """The next columns are a new rectangle's first."""
        from transformers import DynamicCache

        # Made without the model's config, its layers keep all columns; windows are the mask's business.
        self.caches[number] = DynamicCache()

    def keep(self, number: int, rows: Tensor) -> None:
        """Drop all other rows."""
        self.caches[number].batch_select_indices(rows)

    def join(self, number: int, other: int, num_pads: int, num_other_pads: int) -> None:
        """The rows of `other` come below the first's, each with so many columns of padding to its left."""
        for one, two in zip(self.caches[number].layers, self.caches.pop(other).layers, strict=True):
            for name in ("keys", "values"):
                parts = ((getattr(one, name), num_pads), (getattr(two, name), num_other_pads))
                setattr(one, name, torch.cat([F.pad(part, (0, 0, num, 0)) for part, num in parts]))

    def run(self, number: int, token_ids: Tensor, pads: Tensor, first_column: int) -> Tensor:
        """token_ids (R, C), pads (R,): columns of padding before each row's first token -> logits (R, 1, V)."""
        num_columns = first_column + token_ids.shape[1]  # L
        columns = torch.arange(num_columns, device=token_ids.device)
        positions = (columns[first_column:] - pads[:, None]).clamp(min=0)  # (R, C)
        logits: Tensor = self._model(
            input_ids=token_ids,
            attention_mask=(columns >= pads[:, None]).long(),  # (R, L)
            past_key_values=self.caches[number],
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": positions} if self._takes_positions else {}),
        ).logits
        return logits
