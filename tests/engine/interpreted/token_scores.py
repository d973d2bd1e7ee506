"""Token scores against their twin in float64. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

import pytest
import torch
from torch import Tensor

from worker.engine import scorer
from worker.engine.kernels import token_scores
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

    logprobs, ranks, top_ids, top_logprobs = score_tokens(logits, targets, 3)

    expected = plain_score_tokens(logits.double(), targets, 3)
    assert ranks.tolist() == expected[1].tolist()
    assert ranks[0] == 1
    assert torch.isneginf(logprobs[1])
    finite = logits.gather(1, targets[:, None]).squeeze(1).isfinite()
    assert torch.allclose(logprobs[finite].double(), expected[0][finite], rtol=1e-6, atol=2e-4)
    assert top_ids.tolist() == expected[2].tolist()
    assert torch.allclose(top_logprobs.double(), expected[3], rtol=1e-6, atol=2e-4)
    without = score_tokens(logits, targets, 0)
    assert torch.equal(without[0], logprobs)
    assert torch.equal(without[1], ranks)
    assert without[2].shape == without[3].shape == (6, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_is_before_what_is_no_number() -> None:
    logits = torch.randn(4, 300)
    # As GPUs and CPUs write it, and those whose neighbours are -0 and -inf.
    logits[:, 7] = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000, -0x7FFFFF], dtype=torch.int32).view(torch.float32)

    logprobs, ranks, _, _ = score_tokens(logits, torch.full((4,), 7), 0)

    assert torch.isnan(logprobs).all()
    assert ranks.tolist() == [1] * 4


def hard_rows(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """(10, V), whose best tokens are hard to tell apart or lie together."""
    logits = torch.randn(10, vocab_size) * 3
    logits[1] = (logits[1] * 2).round() / 2  # many are equal
    logits[2] = -1.5  # all are
    logits[3, 7:] = -torch.inf
    logits[4] = -torch.inf
    logits[5, torch.rand(vocab_size) < 0.9] = -torch.inf
    logits[6, vocab_size // 2 :] = logits[6].max()  # the best ones come late
    logits[7] = torch.linspace(30, -30, vocab_size)
    # Neighbours in float32, so near each other that they are one in units of log2.
    logits[8] = (torch.tensor(1.5).view(torch.int32) + torch.randint(40, (vocab_size,)).int()).view(torch.float32)
    logits[9, 2:] = torch.finfo(dtype).min
    logits[0, ::3], logits[0, 1::3] = 0.0, -0.0
    return logits.to(dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities, which a GPU is silent about
@pytest.mark.parametrize("vocab_size", [1, 13, 769])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_best_tokens_are_the_first_of_a_stable_sort(
    vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "_BLOCK", 256)
    torch.manual_seed(1)
    logits = hard_rows(vocab_size, dtype)
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    place = min(5, vocab_size - 1)
    targets = order[:, place].contiguous()

    fast, plain = score_tokens(logits, targets, 20), plain_score_tokens(logits.float(), targets, 20)

    best = order[:, :20]
    assert fast[2].tolist() == plain[2].tolist() == best.tolist()
    expected = logits.float().gather(1, best) - logits.float().logsumexp(dim=-1, keepdim=True)
    for logprobs, ranks, _, top_logprobs in (fast, plain):
        assert torch.allclose(top_logprobs, expected, atol=1e-5, equal_nan=True)
        # The same token says the same.
        assert ranks.tolist() == [place + 1] * len(logits)
        assert torch.allclose(top_logprobs[:, place], logprobs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is not a number, which a GPU is silent about
def test_the_search_for_the_best_tokens_ends_where_logits_are_not_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes out is of no use, but an engine must not hang on it."""
    monkeypatch.setattr(token_scores, "_BLOCK", 256)
    logits = torch.full((3, 500), torch.nan)
    logits[1, 8:20], logits[2, 499] = 1.0, -1.0

    _, _, top_ids, _ = score_tokens(logits, torch.zeros(3, dtype=torch.int64), 20)

    assert top_ids[0].tolist() == list(range(20))
    assert top_ids[1].tolist() == [*range(8, 20), *range(8)]
    assert top_ids[2].tolist() == [499, *range(19)]


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
