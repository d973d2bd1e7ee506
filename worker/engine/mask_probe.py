"""The mask probe: whether what a model's masks let its tokens see is what its layers ask of their attention.

For our attention transformers builds no masks, so a model that says in them alone how far its layers look would look
further. Here it builds them once more, for some places of the longest Sequence, while the model runs over a few tokens.

Letters: Q places of queries, L places of keys.
"""

from typing import Any

import torch
from torch import Tensor, nn

from protocol.errors import ConfigurationError
from worker.engine import attention
from worker.engine.attention import AttentionTerms
from worker.engine.backends.sdpa import attend_causally
from worker.engine.probe import probe_tokens

#: The implementation's name.
_NAME = "millrace_masks"
#: Places that are looked at, at most: a window that is larger than so many tokens is none.
_MOST_PLACES = 1 << 20


@torch.inference_mode()
def check_masks(model: Any, config: Any, max_model_len: int) -> None:
    """Raises ConfigurationError for a layer whose mask is not the one that its window and causality make."""
    ids = probe_tokens(model, config)
    last = min(max_model_len, _MOST_PLACES) - 1
    queries = torch.tensor([[0], [last // 2], [last]], device=ids.device)  # (Q, 1)
    keys = torch.arange(last + 1, device=ids.device)[None]  # (1, L)
    causal = keys <= queries

    def mask(*_: Any, mask_function: Any, **others: Any) -> Tensor:
        seen: Tensor = mask_function(0, 0, queries, keys)
        return seen.expand(len(queries), keys.shape[1])[None, None]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, carried: Tensor | None
    ) -> Tensor:
        expected = causal if terms.window is None else causal & (keys > queries - terms.window)
        if carried is not None and not torch.equal(carried[0, 0], expected):
            layer = getattr(module, "layer_idx", "?")
            raise ConfigurationError(f"layer {layer} looks less far, or elsewhere, than it asks its attention to")
        return attend_causally(query, key, value, terms)

    attention.register_as(_NAME, attend, make_mask=mask)
    model.set_attn_implementation(_NAME)
    try:
        model(input_ids=ids.unsqueeze(0), use_cache=False)
    except torch.OutOfMemoryError:
        raise  # it says nothing of masks
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ConfigurationError(f"it does more with its masks than hand them on: {error}") from error
    finally:
        model.set_attn_implementation(attention.NAME)
