"""Where the time of a decode step goes, or of a scoring step, against the least it could take.

    python -m benchmarks.profile_step --shape qwen3-0.6b --rows 256 --tokens 600 [--trace trace.json]
    python -m benchmarks.profile_step --shape qwen3-0.6b --score --tokens 600

Brings so many rows of so many tokens to decode, or scores prompts of so many, and profiles some steps. Prints a table
and the longest kernels, then one JSON object as the last line. Times are of the device; the host's gap is what they
leave of the time on the clock.
"""

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import build_model
from benchmarks.workloads import BYTES_PER_SECOND, FLOPS_PER_SECOND, SHAPES
from protocol.frames import NewSequence
from protocol.settings import EngineSettings
from worker.engine.engine import Engine
from worker.engine.loader import adopt

#: Parts of a step, and what the names of their kernels contain; the first that fits.
PARTS = {
    "sampler": ("race",),
    "scores": ("_score", "topk"),
    # The last two are what a CPU does it with.
    "attention": ("flash", "decode", "attend", "prefix", "merge", "combine", "sampled_addmm", "embedding_bag"),
    "kv write": ("_write", "index_copy"),
    "gemm": ("_multiply", "gemm", "nvjet", "cutlass", "xmma", "splitk", "gemv", "aten::mm", "aten::addmm"),
    "copies": ("memcpy", "memset"),
}
#: The steps profiled.
NUM_STEPS = 8


def part_of(kernel: str) -> str:
    name = kernel.lower()
    if name.startswith("triton_"):  # the compiler's, named after all around them
        return "small kernels"
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "small kernels")


def fill(engine: Engine, num_rows: int, num_tokens: int, num_out: int) -> None:
    """Until all rows decode."""
    rng = np.random.default_rng(0)
    for i in range(num_rows):
        ids = rng.integers(0, engine.loaded.vocab_size, num_tokens).astype("<i4").tobytes()
        engine.add(NewSequence(i, ids, num_out, (), 0.6, 1.0, 0, i, 0))
    while engine.scheduler.num_waiting or not _decodes(engine, num_rows):
        engine.step()


def fill_scoring(engine: Engine, num_tokens: int) -> None:
    """Prompts for all steps there will be, and some more."""
    rng = np.random.default_rng(0)
    for i in range(-(-3 * NUM_STEPS * engine.scheduler.max_batch_tokens // num_tokens)):
        ids = rng.integers(0, engine.loaded.vocab_size, num_tokens).astype("<i4").tobytes()
        engine.add(NewSequence(i, ids, 0, (), 0.0, 1.0, 0, 0, 0, score_from=1))


def _decodes(engine: Engine, num_rows: int) -> bool:
    frame = engine.step()
    return frame is not None and frame.num_scheduled_tokens == num_rows and not frame.num_waiting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--score", action="store_true", help="profile steps that score prompts of --tokens tokens")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--quantization", choices=["none", "float8", "int8"], default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", type=Path, help="write a trace for chrome://tracing here")
    arguments = parser.parse_args()
    settings = EngineSettings(
        device=arguments.device,
        attention=arguments.backend,
        quantization=arguments.quantization,
        max_model_len=4096,
    )
    loaded = adopt(build_model(arguments.shape, settings), settings)
    engine = Engine(loaded, settings)
    num_rows, num_out = (0, 0) if arguments.score else (arguments.rows, 8 * NUM_STEPS)
    if num_rows > engine.scheduler.max_num_seqs or arguments.tokens + num_out > loaded.max_model_len:
        parser.error(
            f"at most {engine.scheduler.max_num_seqs} --rows run at once here, with at most "
            f"{loaded.max_model_len - num_out} --tokens each"
        )
    if arguments.score:
        fill_scoring(engine, arguments.tokens)
    else:
        fill(engine, num_rows, arguments.tokens, num_out)
    figures = profile(engine, arguments.trace) | {"shape": arguments.shape, "backend": engine.attention_name}
    config: Any = loaded.model.config
    num_parameters = sum(p.numel() for p in loaded.model.parameters())
    if arguments.score:
        num_tokens, width = engine.scheduler.max_batch_tokens, config.num_attention_heads * config.head_dim
        # Every weight but a separate embedding's once per token, and half of all pairs of a prompt's tokens.
        num_used = num_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
        per_token = 2 * num_used + 2 * config.num_hidden_layers * arguments.tokens * width
        figures |= {"scored_tokens": num_tokens, "tokens": arguments.tokens}
        figures["floor_ms"] = round(1e3 * num_tokens * per_token / FLOPS_PER_SECOND, 3)
        print(json.dumps(figures))
        return 0
    kv_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    attention_floor = 1e3 * arguments.rows * arguments.tokens * kv_bytes / BYTES_PER_SECOND
    figures |= {
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        "attention_floor_ms": round(attention_floor, 3),
        "floor_ms": round(attention_floor + 2e3 * num_parameters / BYTES_PER_SECOND, 3),
    }
    print(json.dumps(figures))
    return 0


def profile(engine: Engine, trace: Path | None) -> dict[str, Any]:
    is_cuda = engine.loaded.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    for _ in range(4):
        engine.step()
    if is_cuda:
        torch.cuda.synchronize()
    engine.telemetry.reset()
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
    wall = 1e3 * (time.perf_counter() - started) / NUM_STEPS
    telemetry = engine.telemetry.summary()
    with torch.profiler.profile(activities=[activity.CUDA if is_cuda else activity.CPU]) as profiler:
        for _ in range(NUM_STEPS):
            engine.step()
        if is_cuda:
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    times: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if spent:
            times[event.key] += spent / 1e3 / NUM_STEPS
            calls[event.key] += event.count
    parts: dict[str, float] = collections.defaultdict(float)
    for name, spent in times.items():
        parts[part_of(name)] += spent
    for part, spent in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{part:16} {spent:8.3f} ms a step")
    busy = sum(parts.values())
    print(f"{'host gap':16} {wall - busy:8.3f} ms a step of {wall:.3f} on the clock")
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:24]:
        print(f"  {spent:8.3f} ms {calls[name] / NUM_STEPS:6.1f} x {name[:100]}")
    return {
        "step_ms": round(wall, 3),
        "busy_ms": round(busy, 3),
        "parts_ms": {part: round(spent, 3) for part, spent in parts.items()},
        "telemetry": telemetry,
    }


if __name__ == "__main__":
    sys.exit(main())
