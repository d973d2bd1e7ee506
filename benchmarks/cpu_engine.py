"""Output tokens per second on a CPU: the engine against transformers' `generate` in padded batches.

    python -m benchmarks.cpu_engine [--threads N] [--requests 256]

Same model, threads, dtype and requests: prompt and output lengths uniform in 16..256, greedy, end-of-sequence an
ordinary token. `generate` runs in batches of 32 and of 64, in arrival order and sorted by output length; each batch
runs to its longest output, and only tokens that were asked for count. Every output is compared: a text that differs
must differ at a near-tie of the model's own logits. Prints a table, then one JSON object as the last line.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

# Before torch is imported: see worker/engine_link.py, which does the same for the engine process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from benchmarks.sequential_answers import NEAR_TIE
from protocol.frames import NewSequence
from protocol.settings import EngineSettings
from worker.engine.engine import Engine

BUNDLED = Path(__file__).parents[1] / "models" / "millrace-tiny"
BATCH_SIZES = (32, 64)

Requests = list[tuple[list[int], int]]


def make_requests(num: int, vocab_size: int) -> Requests:
    """Prompts of text as the model knows it are not needed for speed; random ids make every prompt different."""
    rng = random.Random(0)
    lengths = [(rng.randint(16, 256), rng.randint(16, 256)) for _ in range(num)]
    return [([rng.randrange(4, vocab_size) for _ in range(prompt)], output) for prompt, output in lengths]


def run_engine(engine: Engine, requests: Requests) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in requests]
    for i, (prompt, num_output) in enumerate(requests):
        ids = np.array(prompt, dtype="<i4").tobytes()
        engine.add(
            NewSequence(
                seq_id=i,
                token_ids=ids,
                max_tokens=num_output,
                stop_token_ids=(),
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                seed=0,
                sample=0,
            )
        )
    while engine.has_work:
        frame = engine.step()
        assert frame is not None
        assert not frame.refused, frame.refused
        seq_ids, token_ids = np.frombuffer(frame.seq_ids, "<i8"), np.frombuffer(frame.token_ids, "<i4")
        for seq_id, token_id in zip(seq_ids.tolist(), token_ids.tolist(), strict=True):
            outputs[seq_id].append(token_id)
    return outputs


def run_generate(model: Any, requests: Requests, batch_size: int, *, is_sorted: bool) -> list[list[int]]:
    order = list(range(len(requests)))
    if is_sorted:
        order.sort(key=lambda i: requests[i][1])
    outputs: list[list[int]] = [[] for _ in requests]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(requests[i][0]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            prompt = requests[i][0]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        num_new = max(requests[i][1] for i in chosen)
        done = model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, eos_token_id=-1)
        for row, i in enumerate(chosen):
            outputs[i] = done[row, width : width + requests[i][1]].tolist()
    return outputs


def load_reference() -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def unexplained(model: Any, requests: Requests, ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """(texts that differ, texts that differ where the model's two best logits are not a near-tie)."""
    num_differing = num_unexplained = 0
    for (prompt, num_output), mine, other in zip(requests, ours, theirs, strict=True):
        assert len(mine) == len(other) == num_output
        if mine == other:
            continue
        num_differing += 1
        place = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        logits = model(torch.tensor([prompt + other[:place]]), use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        num_unexplained += bool(best[0] - best[1] >= NEAR_TIE)
    return num_differing, num_unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--requests", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    settings = EngineSettings(model=str(BUNDLED), device="cpu", dtype="float32", num_threads=arguments.threads)
    engine = Engine.start(settings)
    model = load_reference()
    requests = make_requests(arguments.requests, engine.loaded.vocab_size)
    num_tokens = sum(output for _, output in requests)

    def timed(run: Any) -> tuple[list[list[int]], float]:
        started = time.perf_counter()
        outputs = run()
        return outputs, num_tokens / (time.perf_counter() - started)

    run_engine(engine, requests[:8])  # warm-up of either side
    run_generate(model, [(prompt, 8) for prompt, _ in requests[:8]], 8, is_sorted=False)
    ours, speed = max((timed(lambda: run_engine(engine, requests)) for _ in range(2)), key=lambda run: run[1])
    speeds: dict[str, float] = {}
    num_differing = num_wrong = 0
    for name, is_sorted in (("arrival", False), ("sorted", True)):
        for size in BATCH_SIZES:
            theirs, tok_s = timed(lambda s=size, o=is_sorted: run_generate(model, requests, s, is_sorted=o))
            print(f"generate, {name} order, batches of {size}: {tok_s:.0f} tok/s", flush=True)
            speeds[name] = max(speeds.get(name, 0.0), tok_s)
            differing, wrong = unexplained(model, requests, ours, theirs)
            num_differing, num_wrong = num_differing + differing, num_wrong + wrong
    print(
        f"millrace: {speed:.0f} tok/s; texts that differ at a near-tie: {num_differing - num_wrong}, else: {num_wrong}"
    )
    summary = {
        "millrace_tok_s": round(speed, 1),
        "arrival_tok_s": round(speeds["arrival"], 1),
        "sorted_tok_s": round(speeds["sorted"], 1),
        "ratio": round(speed / speeds["arrival"], 3),
        "sorted_ratio": round(speed / speeds["sorted"], 3),
        "tokens": num_tokens,
        "near_ties": num_differing - num_wrong,
        "unequal": num_wrong,
        "threads": arguments.threads,
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(summary))
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
