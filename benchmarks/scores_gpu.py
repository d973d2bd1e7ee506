"""The score kernels on a GPU, for `benchmarks.kernels_gpu --only score`: log-probabilities, ranks and best tokens.

Held to their plain twin in float64, then timed beside torch's `topk`. Letters: C positions, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_report import DEVICE, Report, time_graph
from worker.engine.kernels.plain import plain_score_tokens
from worker.engine.kernels.token_scores import score_tokens

VOCAB_SIZE = 151_936
NUM_ROWS = 1280
NUM_TOPS = (1, 5, 20)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def time_scores(report: Report) -> None:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for kind, make in KINDS.items():
            for vocab_size in (VOCAB_SIZE, 50_257, 11):
                logits = make(torch.randn(64, vocab_size, device=DEVICE) * 3).to(dtype)
                report.add(f"check scores, {name} {kind} {vocab_size}", functools.partial(check_scores, logits))
    logits = torch.randn(NUM_ROWS, VOCAB_SIZE, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(VOCAB_SIZE, (NUM_ROWS,), device=DEVICE)
    equal = torch.ones_like(logits)  # of which every group has to be read
    size = f"of {NUM_ROWS} x {VOCAB_SIZE}"
    partial = functools.partial
    runs: dict[str, tuple[Tensor, Callable[[], object]]] = {
        **{f"scores, {n} best {size}": (logits, partial(score_tokens, logits, targets, n)) for n in (0, *NUM_TOPS)},
        **{f"topk {n} {size}": (logits, partial(logits.topk, n, dim=-1)) for n in NUM_TOPS},
        f"scores, 20 best of 8 x {VOCAB_SIZE}": (logits[:8], partial(score_tokens, logits[:8], targets[:8], 20)),
        f"scores, 20 best {size}, all equal": (equal, partial(score_tokens, equal, targets, 20)),
        f"scores, plain, 20 best {size}": (logits, lambda: plain_score_tokens(logits.float(), targets, 20)),
    }
    for name, (read, run) in runs.items():
        report.add(name, partial(measure_scores, read, run))


def _masked(logits: Tensor) -> Tensor:
    """Most of them out of the question; of one row all but seven, of one all."""
    logits[torch.rand_like(logits) < 0.9] = -torch.inf
    logits[1, :-7] = -torch.inf
    logits[2] = -torch.inf
    return logits


def _equal(logits: Tensor) -> Tensor:
    """In steps; all of one row, and half of one, with the best among them."""
    logits = logits.round()
    logits[1] = 1.0
    logits[2, logits.shape[1] // 2 :] = 30.0
    return logits


#: Of logits to check.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {"normal": lambda logits: logits, "masked": _masked, "equal": _equal}


def check_scores(logits: Tensor) -> dict[str, Any]:
    """Ids and ranks must be the twin's, and what the ids stand for what `topk` finds."""
    targets = torch.randint(logits.shape[1], (len(logits),), device=DEVICE)
    error, num_ranks, num_ids, num_values = 0.0, 0, 0, 0
    for num_top in NUM_TOPS:
        logprobs, ranks, top_ids, top_logprobs = score_tokens(logits, targets, num_top)
        expected = plain_score_tokens(logits.double(), targets, num_top)
        error = max(error, difference(logprobs, expected[0]), difference(top_logprobs, expected[3]))
        num_ranks += int((ranks != expected[1]).sum())
        num_ids += int((top_ids != expected[2]).sum())
        best = logits.topk(top_ids.shape[1], dim=-1).values
        num_values += int((logits.gather(1, top_ids.long()) != best).sum())
    is_wrong = not error < 1e-4 or num_ranks + num_ids + num_values > 0
    return {
        "error": error,
        "wrong_ranks": num_ranks,
        "wrong_ids": num_ids,
        "wrong_values": num_values,
        "wrong": is_wrong,
    }


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest; infinite where one is finite alone, or a number alone."""
    found = found.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    differences = torch.where(same, 0.0, (found - expected).abs()).nan_to_num(nan=torch.inf)
    return float(differences.max())


def measure_scores(logits: Tensor, run: Callable[[], object]) -> dict[str, Any]:
    """TB/s are of one reading of the logits."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    seconds = time_graph(run, 1)
    return {"us": seconds * 1e6, "TB/s": logits.nbytes / seconds / 1e12, "peak_MiB": peak / 2**20}
