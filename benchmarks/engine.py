"""How fast one engine gets a bulk job through one GPU; no queue, no database, no weights to download.

    python -m benchmarks.engine --shape qwen3-0.6b --workload random256 [--backend triton]

Builds a model of that shape with random weights, warms up, and runs the workload some times, from the first submission
to the last token on the host, at temperature 0.6 with no end of sequence. Prints a line per run, then one JSON object
as the last line; its figures are those of the best run. Of several workloads one after the other, each has its own.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.workloads import SHAPES, WORKLOADS, Workload, floor_seconds, make_workload  # noqa: E402
from protocol.settings import EngineSettings  # noqa: E402
from worker.engine.dtypes import choose_dtype  # noqa: E402
from worker.engine.engine import Engine  # noqa: E402
from worker.engine.loader import adopt, take_device  # noqa: E402


@dataclass
class Measured:
    """One run."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    scheduled_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    telemetry: dict[str, Any] = field(default_factory=dict)


def build_model(shape: str, settings: EngineSettings) -> Any:
    import transformers

    name, fields = SHAPES[shape]
    config = getattr(transformers, name)(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    device = take_device(settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=choose_dtype(settings, device))
    return model.eval()


def run_workload(engine: Engine, workload: Workload, first_id: int, sampling: dict[str, Any]) -> Measured:
    sequences = workload.sequences(first_id, engine.loaded.vocab_size, **sampling)
    wanted = {first_id + i: r.num_tokens for i, r in enumerate(workload.requests)}
    got = np.zeros(len(sequences), dtype=np.int64)
    measured, scored = Measured(), 0
    engine.telemetry.reset()
    started = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        frame = engine.step()
        if frame is None:
            continue
        assert not frame.refused, frame.refused
        measured.steps += 1
        measured.scheduled_tokens += frame.num_scheduled_tokens
        measured.prefix_hit_tokens += frame.num_prefix_hit_tokens
        measured.preemptions += frame.num_preemptions
        places = np.frombuffer(frame.seq_ids, "<i8") - first_id
        got[places] += 1
        scored += sum(len(part.logprobs) // 4 for part in frame.scores)
        if workload.max_tokens is not None:
            # Its true end, which the scheduler learns only now, as of a stop string.
            for place in places[got[places] == [wanted[first_id + i] for i in places.tolist()]].tolist():
                engine.finish(first_id + place, int(got[place]))
    measured.seconds = time.perf_counter() - started
    measured.telemetry = engine.telemetry.summary()
    if workload.requests[0].num_tokens:
        assert got.tolist() == list(wanted.values()), "not every request got its tokens"
    measured.tokens = int(got.sum()) if workload.requests[0].num_tokens else scored
    assert measured.tokens == workload.num_tokens, (measured.tokens, workload.num_tokens)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["random256"])
    parser.add_argument("--backend", default="auto", help="engine.attention: auto, triton, flash-attn-2 or sdpa")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--memory-fraction", type=float, default=0.9)
    parser.add_argument("--kv-dtype", choices=["auto", "float8"], default="auto")
    parser.add_argument("--quantization", choices=["none", "float8", "int8"], default="none")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the requests, to try it on a small machine")
    arguments = parser.parse_args()
    if arguments.runs < 1 or arguments.scale <= 0:
        parser.error("--runs must be at least 1, and --scale above 0")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(relativeCreated)d ms %(name)s: %(message)s")
    settings = EngineSettings(
        device=arguments.device,
        attention=arguments.backend,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_batch_tokens=arguments.max_batch_tokens,
        memory_fraction=arguments.memory_fraction,
        kv_dtype=arguments.kv_dtype,
        quantization=arguments.quantization,
        graphs=not arguments.no_graphs,
        compile=False if arguments.no_compile else None,
        fuse_weights=not arguments.no_fuse,
    )
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}

    loaded = adopt(build_model(arguments.shape, settings), settings)
    built = time.perf_counter() - STARTED
    engine = Engine(loaded, settings)
    warm = make_workload("random256", loaded.vocab_size, -1, 0.02)
    run_workload(engine, warm, 0, sampling)
    startup = time.perf_counter() - STARTED
    print(f"start-up {startup:.1f} s, of which {built:.1f} until the model was ready", flush=True)

    for name in arguments.workload:
        figures = measure(engine, name, arguments.runs, arguments.scale, sampling)
        options = [option for option in ("no_graphs", "no_compile", "no_fuse") if getattr(arguments, option)]
        print(json.dumps({"shape": arguments.shape, **figures, "startup_s": round(startup, 1), "options": options}))
    return 0


def measure(engine: Engine, name: str, num_runs: int, scale: float, sampling: dict[str, Any]) -> dict[str, Any]:
    """The best of some runs of a workload."""
    if name == "random256-limited":
        sampling = {**sampling, "top_p": 0.95, "top_k": 20}
    config: Any = engine.loaded.model.config
    num_parameters = sum(parameter.numel() for parameter in engine.loaded.model.parameters())
    runs, floor = [], 0.0
    for number in range(num_runs):
        workload = make_workload(name, engine.loaded.vocab_size, number, scale)
        floor = floor_seconds(workload, config, num_parameters)
        run = run_workload(engine, workload, 1_000_000 * (number + 1), sampling)
        runs.append(run)
        print(f"{name} {number}: {run.tokens / run.seconds:.0f} tok/s, {run}", flush=True)
    best = min(runs, key=lambda run: run.seconds)
    is_cuda = engine.loaded.device.type == "cuda"
    return {
        "workload": name,
        "sampling": sampling,
        "tokens": best.tokens,
        "seconds": round(best.seconds, 3),
        "tok_s": round(best.tokens / best.seconds, 1),
        # An H200's: it says nothing of a CPU.
        "floor_tok_s": round(best.tokens / floor, 1) if is_cuda else None,
        "share_of_floor": round(floor / best.seconds, 3) if is_cuda else None,
        "runs_tok_s": [round(run.tokens / run.seconds, 1) for run in runs],
        "steps": best.steps,
        "scheduled_tokens": best.scheduled_tokens,
        "prefix_hit_tokens": best.prefix_hit_tokens,
        "preemptions": best.preemptions,
        "telemetry": best.telemetry,
        "peak_memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if is_cuda else None,
        "backend": engine.attention_name,
        "max_num_seqs": engine.scheduler.max_num_seqs,
        "max_batch_tokens": engine.scheduler.max_batch_tokens,
        "kv_tokens": engine.scheduler.blocks.capacity,
        "quantization": engine.loaded.quantization,
        "kv_dtype": str(engine.loaded.kv_dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "cpu",
        "versions": engine.ready().versions,
    }


if __name__ == "__main__":
    sys.exit(main())
