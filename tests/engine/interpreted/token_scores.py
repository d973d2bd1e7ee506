"""Token scores against their twin in float64. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

import pytest
import torch

from worker.engine import scorer
from worker.engine.kernels.plain import plain_score_tokens
from worker.engine.kernels.token_scores import score_tokens


@pytest.mark.parametrize("vocab_size", [50, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_equal_their_twin(vocab_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # In steps, so that many logits are equal; some are out of the question, and one row is far from zero.
    logits = (torch.randn(6, vocab_size + 3) * 8).round().div(4).to(dtype)[:, :vocab_size]
    logits[torch.rand_like(logits, dtype=torch.float32) < 0.1] = -torch.inf
    logits[2] += 1000
    targets = torch.randint(vocab_size, (6,))
    targets[0] = logits[0].argmax()
    logits[1, targets[1]] = -torch.inf

    logprobs, log_sums, ranks = score_tokens(logits, targets)

    expected = plain_score_tokens(logits.double(), targets)
    assert ranks.tolist() == expected[2].tolist()
    assert ranks[0] == 1
    assert torch.allclose(log_sums.double(), expected[1], rtol=1e-6, atol=1e-5)
    assert torch.isneginf(logprobs[1])
    finite = logits.gather(1, targets[:, None]).squeeze(1).isfinite()
    assert torch.allclose(logprobs[finite].double(), expected[0][finite], rtol=1e-6, atol=2e-4)


def test_the_scorer_gives_the_same_with_the_kernel_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 3000) * 4, torch.randint(3000, (7,))
    plain = scorer.score_rows(logits, targets, 5)

    monkeypatch.setattr(scorer, "_has_kernel", lambda device: True)
    fast = scorer.score_rows(logits, targets, 5)

    assert torch.equal(fast.ranks, plain.ranks)
    assert torch.equal(fast.top_ids, plain.top_ids)
    assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-5)
    assert torch.allclose(fast.top_logprobs, plain.top_logprobs, atol=1e-5)
