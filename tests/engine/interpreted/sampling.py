"""Sampling against the plain sampler. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

import pytest
import torch

from worker.engine.kernels import sampling
from worker.engine.sampler import Draws, sample


@pytest.mark.parametrize("max_candidates", [1, 128])
@pytest.mark.parametrize(("dtype", "vocab_size"), [(torch.bfloat16, 1000), (torch.float32, 512)])
def test_tokens_equal_those_of_the_plain_sampler(
    dtype: torch.dtype, vocab_size: int, max_candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, drawing and limited rows side by side; logits so coarse that many are equal."""
    sizes = {"_PIECE": 256, "_PART": 16, "_LIMITED_PIECE": 512, "_MAX_CANDIDATES": max_candidates, "_BOUND_RANK": 30}
    for name, size in sizes.items():
        monkeypatch.setattr(sampling, name, size)
    torch.manual_seed(0)
    num_rows, num_state = 24, 30
    logits = (torch.randn(num_rows, vocab_size) * 3).to(dtype)
    logits[: num_rows // 2] = (logits[: num_rows // 2] * 4).round() / 4
    rows = torch.randperm(num_state)[:num_rows]
    temperature = torch.rand(num_state) * 1.5
    temperature[::5], temperature[3] = 0, 1e-7
    top_p, top_k, min_p = torch.ones(num_state), torch.zeros(num_state, dtype=torch.int64), torch.zeros(num_state)
    top_p[::3] = torch.rand(10)
    top_k[::4], top_k[7] = torch.randint(1, 60, (8,)), 5000
    min_p[::7] = 0.05
    seed, number = torch.randint(-(2**62), 2**62, (num_state,)), torch.randint(5, (num_state,))
    positions = torch.randint(5000, (num_rows,))

    tokens = sampling.sample_rows(logits, rows, temperature, top_p, top_k, min_p, seed, number, positions)

    drawn = torch.nonzero(temperature[rows] > 0).squeeze(1)
    at = rows[drawn]
    limited = torch.arange(len(drawn))
    draws = Draws(
        drawn, limited, temperature[at], top_p[at], top_k[at], seed[at], number[at], positions[drawn], min_p[at]
    )
    assert tokens.tolist() == sample(logits, draws).tolist()
