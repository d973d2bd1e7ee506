"""PaddedForward: a model run over a rectangle of texts, with a mask and transformers' own cache.

Letters: R rows, C columns of the step, L columns so far, V vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor


class PaddedForward:
    """A model with the cache of its current rectangle."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes_positions = takes_any or "position_ids" in parameters
        self.start()

    def start(self) -> None:
        """The next columns are a new rectangle's first."""
        from transformers import DynamicCache

        self.cache: Any = None  # the old one's memory is free before the new one takes its own
        # Made without the model's config, its layers keep all columns; windows are the mask's business.
        self.cache = DynamicCache()

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.cache.batch_select_indices(rows)

    def run(self, token_ids: Tensor, pads: Tensor, first_column: int) -> Tensor:
        """token_ids (R, C), pads (R,): columns of padding before each row's first token -> logits (R, 1, V)."""
        num_columns = first_column + token_ids.shape[1]  # L
        columns = torch.arange(num_columns, device=token_ids.device)
        positions = (columns[first_column:] - pads[:, None]).clamp(min=0)  # (R, C)
        logits: Tensor = self._model(
            input_ids=token_ids,
            attention_mask=(columns >= pads[:, None]).long(),  # (R, L)
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": positions} if self._takes_positions else {}),
        ).logits
        return logits
