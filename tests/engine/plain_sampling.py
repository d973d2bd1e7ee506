"""What sampling parameters mean, token by token in float64 and without torch: the reference of the sampling tests."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocol.frames import LogitTerms

Floats = npt.NDArray[np.float64]


def adjusted(
    logits: npt.ArrayLike,
    terms: LogitTerms,
    prompt: Sequence[int],
    outputs: Sequence[int],
    stop: Sequence[int] = (),
) -> Floats:
    """The logits of the token after `prompt` and `outputs`."""
    result = np.array(logits, dtype=np.float64)
    if len(outputs) < terms.min_tokens:
        result[list(stop)] = -np.inf
    for token, bias in terms.logit_bias.items():
        result[token] += bias
    for token in {*prompt, *outputs}:
        value = result[token]
        result[token] = value / terms.repetition_penalty if value > 0 else value * terms.repetition_penalty
    for token, count in Counter(outputs).items():
        result[token] -= terms.frequency_penalty * count
        result[token] -= terms.presence_penalty
    return result


def distribution(
    logits: npt.ArrayLike, *, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Floats:
    """Probabilities after all limits, in vLLM's order."""
    scores = np.array(logits, dtype=np.float64) / temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    probabilities[probabilities < min_p * probabilities.max()] = 0
    order = [int(i) for i in np.argsort(-probabilities, kind="stable") if probabilities[i] > 0]
    kept = order[: top_k or len(order)]
    total, mass, nucleus = sum(probabilities[i] for i in kept), 0.0, []
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probabilities[token] / total
    result: Floats = np.zeros(len(probabilities))
    result[nucleus] = probabilities[nucleus]
    result /= result.sum()
    return result


def assert_follows(tokens: Sequence[int], expected: Floats) -> None:
    """Draws against exact probabilities: nothing outside their support, and chi-square within it."""
    counts = np.bincount(tokens, minlength=len(expected)).astype(np.float64)
    assert (counts[expected == 0] == 0).all()
    wanted = expected * len(tokens)
    common = wanted >= 5
    # The rare ones together are one more bin.
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(wanted[common], wanted[~common].sum())
    used = wanted > 0
    chi_square = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    degrees = used.sum() - 1
    # Mean and variance of chi-square are its degrees and twice them: five deviations are one in a million.
    assert chi_square <= degrees + 5 * (2 * degrees) ** 0.5
