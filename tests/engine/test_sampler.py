"""Draws against exact probabilities, and what they may depend on."""

import torch
from torch import Tensor

from worker.engine.sampler import Draws, exponential, limit, sample

VOCAB_SIZE = 40


def draws_for(
    num: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 3,
    first_position: int = 0,
) -> Draws:
    """`num` rows that differ in their position alone."""
    return Draws(
        rows=torch.arange(num),
        limited=torch.arange(num) if top_p < 1 or top_k else None,
        temperature=torch.full((num,), temperature),
        top_p=torch.full((num,), top_p),
        top_k=torch.full((num,), top_k),
        seed=torch.full((num,), seed),
        sample=torch.zeros(num, dtype=torch.int64),
        position=torch.arange(first_position, first_position + num),
        min_p=torch.full((num,), min_p) if min_p else None,
    )


def some_logits() -> Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2


def exact(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The distribution by its definition, token by token."""
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[: top_k or VOCAB_SIZE]
    total = sum(probabilities[i].item() for i in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probabilities[token].item() / total
    result = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    result[nucleus] = probabilities[nucleus]
    return result / result.sum()


def test_draws_follow_the_exact_distribution() -> None:
    logits, num = some_logits(), 60_000
    for temperature, top_p, top_k in [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.7, 0.9, 0), (1.0, 1.0, 7), (1.3, 0.8, 12)]:
        expected = exact(logits, temperature, top_p, top_k)
        draws = draws_for(num, temperature=temperature, top_p=top_p, top_k=top_k)

        counts = torch.bincount(sample(logits.expand(num, -1), draws), minlength=VOCAB_SIZE).double()

        assert (counts[expected == 0] == 0).all()
        common = expected * num >= 5
        chi_square = ((counts - expected * num) ** 2 / (expected * num))[common].sum().item()
        degrees = int(common.sum()) - 1
        # Mean and variance of chi-square are its degrees and twice them: five deviations are one in a million.
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_draws_at_neighbouring_positions_seeds_and_tokens_are_independent() -> None:
    noise = exponential(draws_for(200), 500)
    centred = noise - noise.mean()
    other = exponential(draws_for(200, seed=4), 500)
    other_centred = other - other.mean()

    correlations = [
        (centred[1:] * centred[:-1]).mean(),
        (centred[:, 1:] * centred[:, :-1]).mean(),
        (centred * other_centred).mean(),
    ]

    # Exponential variates have mean and variance 1; 100,000 products deviate by about 0.003.
    assert abs(noise.mean() - 1) < 0.02
    assert abs(noise.var() - 1) < 0.05
    assert all(abs(x) < 0.016 for x in correlations)
    assert torch.unique(noise).numel() > 99_000


def test_draws_depend_on_their_row_alone() -> None:
    logits = torch.randn(50, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    together = sample(logits, draws_for(50, temperature=0.9, top_p=0.95, top_k=30))

    for row in range(50):
        alone = draws_for(1, temperature=0.9, top_p=0.95, top_k=30, first_position=row)
        assert sample(logits[row : row + 1], alone).item() == together[row]


def test_greedy_rows_stay_greedy_beside_draws() -> None:
    logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    some = Draws(torch.tensor([1, 4]), None, *(getattr(draws_for(2), name) for name in Draws.__slots__[2:]))

    tokens = sample(logits, some)

    greedy = logits.argmax(-1)
    assert tokens[[0, 2, 3, 5]].tolist() == greedy[[0, 2, 3, 5]].tolist()
    assert sample(logits, None).tolist() == greedy.tolist()


def test_limits_keep_exactly_their_support() -> None:
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def support(top_k: int, top_p: float) -> list[int]:
        kept = limit(scores, torch.tensor([top_k]), torch.tensor([top_p]))
        return torch.isfinite(kept[0]).nonzero().flatten().tolist()

    assert support(0, 1.0) == [0, 1, 2, 3]
    assert support(1, 1.0) == [0]
    assert support(3, 1.0) == [0, 1, 2]
    assert support(99, 1.0) == [0, 1, 2, 3]
    assert support(0, 0.39) == [0]
    assert support(0, 0.41) == [0, 1]
    assert support(0, 0.71) == [0, 1, 2]
    assert support(0, 1e-9) == [0]
    # After top_k=2 the best has 4/7 = 0.571 of what is left.
    assert support(2, 0.56) == [0]
    assert support(2, 0.58) == [0, 1]


def test_tied_scores_keep_no_more_than_top_k() -> None:
    kept = limit(torch.zeros(1, 5), torch.tensor([2]), torch.tensor([1.0]))

    assert torch.isfinite(kept[0]).tolist() == [True, True, False, False, False]


def test_tiny_temperatures_are_greedy_and_give_no_nan() -> None:
    logits = torch.randn(200, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) * 50

    assert sample(logits, draws_for(200, temperature=1e-30)).tolist() == logits.argmax(-1).tolist()


def test_top_k_of_one_is_greedy() -> None:
    logits = torch.randn(500, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))

    assert sample(logits, draws_for(500, temperature=2.0, top_k=1)).tolist() == logits.argmax(-1).tolist()
