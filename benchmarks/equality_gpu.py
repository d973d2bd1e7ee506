"""Is the engine's greedy text on this device what the model itself says?

    python3 -m benchmarks.equality_gpu [--device cuda] [--attention flash-attn-2] [--models qwen3 bundled]

Each family's random-weight model runs through the engine in 16 bits; then prompt and output are put through
transformers' own model in float32 (the reference) and, plainly, in 16 bits (which gives the logit error of that
arithmetic). A token other than the reference's best must be within twice that error of it, else it is unexplained; so
must the scores of prompt tokens, which every second prompt asks for. Prints a line per model as it is done, then one
JSON object as the last line; exit code 1 when anything is unexplained, has failed, or nothing could be compared.
"""

import argparse
import copy
import functools
import json
import logging
import platform
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from protocol.frames import NewSequence
from protocol.settings import EngineSettings
from worker.engine import gating, wide_linears
from worker.engine.engine import Engine
from worker.engine.loader import LoadedModel, adopt, load_model
from worker.engine.quantizing import quantize_linears
from worker.engine.sampler import Draws, exponential

BUNDLED = Path(__file__).parents[1] / "models" / "millrace-tiny"
#: A class of transformers each, and what it has beside the common shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "mistral": ("MistralConfig", {"sliding_window": 64}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 64,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {}),
    "bloom": ("BloomConfig", {"tie_word_embeddings": False, "seq_length": 2048}),
}
#: Those that run packed run padded as well.
MODELS = [*FAMILIES, "llama padded", "gemma3 padded", "bundled"]
#: Output tokens per prompt.
NUM_OUTPUT_TOKENS = 64


def build(family: str, is_small: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """A random-weight model with weights wide enough that its texts vary."""
    import transformers

    name, fields = FAMILIES[family]
    heads, hidden, layers, vocab_size = (2, 128, 2, 512) if is_small else (16, 1024, 8, 8192)
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    if family not in ("gpt2", "bloom"):
        shape |= {"intermediate_size": 3 * hidden, "num_key_value_heads": heads // 2}
    if family != "bloom":
        shape |= {"max_position_embeddings": 2048}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "vocab_size": vocab_size}
    return random_model(getattr(transformers, name)(**tokens, **shape, **fields), device, dtype)


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.2 * config.hidden_size**-0.5)
    return model.to(device, dtype).eval()


def generate(
    engine: Engine, prompts: list[list[int]], num_tokens: int, wave: int, scores: list[list[float]] | None = None
) -> tuple[list[list[int]], int]:
    """Greedy outputs, and the number of tokens that were found computed; `wave` prompts arrive every second step, so
    that every kind of step occurs.

    With `scores`, every second prompt's tokens are scored too. A prompt that is the one two before it is its sample.
    """
    num_hit_tokens = 0
    outputs: list[list[int]] = [[] for _ in prompts]
    pending = list(enumerate(prompts))
    while pending or engine.has_work:
        for i, prompt in pending[:wave]:
            ids = np.array(prompt, dtype="<i4").tobytes()
            score_from = 1 if scores is not None and i % 2 else -1
            sample_of = i - 2 if i % 4 == 2 and prompts[i - 2] is prompt else None
            engine.add(
                NewSequence(i, ids, num_tokens, (), 0.0, 1.0, 0, 0, 0, score_from=score_from, sample_of=sample_of)
            )
        del pending[:wave]
        for _ in range(2):
            frame = engine.step()
            if frame is not None:
                assert not frame.refused, frame.refused
                num_hit_tokens += frame.num_prefix_hit_tokens
                seq_ids, token_ids = np.frombuffer(frame.seq_ids, "<i8"), np.frombuffer(frame.token_ids, "<i4")
                for seq_id, token_id in zip(seq_ids.tolist(), token_ids.tolist(), strict=True):
                    outputs[seq_id].append(token_id)
                for part in frame.scores:
                    assert scores is not None
                    scores[part.seq_id].extend(np.frombuffer(part.logprobs, "<f4").tolist())
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return outputs, num_hit_tokens


@torch.inference_mode()
def compare(
    model: Any, prompts: list[list[int]], outputs: list[list[int]], scores: list[list[float]], quantization: str
) -> dict[str, float]:
    """The engine's tokens and scores against a float32 forward of the whole text, one text at a time. `model` is not
    the engine's, which has been changed, but transformers' own."""
    device = model.get_input_embeddings().weight.device
    if model._can_set_attn_implementation():
        model.set_attn_implementation("sdpa")
    exact = copy.deepcopy(model).float()
    if quantization != "none":
        for reference in (model, exact):
            quantize_linears(reference, model.config.get_text_config(), quantization, device)
    score_errors, plain_score_errors = [torch.zeros(1)], [torch.zeros(1)]
    deficits, plain_differing, worst, total_error, distinct = [], 0, 0.0, 0.0, set()
    for prompt, output, scored in zip(prompts, outputs, scores, strict=True):
        text = torch.tensor([prompt + output], device=device)
        all_expected = exact(text, use_cache=False).logits[0].float()  # (tokens, vocab)
        all_plain = model(text, use_cache=False).logits[0].float()
        if scored:
            theirs, plain = (
                logprobs_of(x[: len(prompt) - 1], text[0, 1 : len(prompt)]) for x in (all_expected, all_plain)
            )
            score_errors.append((torch.tensor(scored) - theirs).abs())
            plain_score_errors.append((plain - theirs).abs())
        expected, plain = (x[len(prompt) - 1 : -1] for x in (all_expected, all_plain))
        best = expected.max(dim=-1)
        chosen = expected.gather(1, torch.tensor(output, device=device)[:, None]).squeeze(1)
        deficits.append((best.values - chosen).cpu())
        plain_differing += int((plain.argmax(dim=-1) != best.indices).sum())
        error = (plain - expected).abs()
        worst, total_error = max(worst, float(error.max())), total_error + float(error.mean(dim=-1).sum())
        distinct.update(output)
    deficit = torch.cat(deficits)
    score_error, plain_score_error = torch.cat(score_errors), torch.cat(plain_score_errors)
    return {
        "scored": len(score_error) - 1,
        "score_error": float(score_error.max()),
        "mean_score_error": float(score_error.mean()),
        "plain_score_error": float(plain_score_error.max()),
        "plain_mean_score_error": float(plain_score_error.mean()),
        # A log-probability moves by at most twice what the logits do.
        "unexplained_scores": int((score_error > 2 * worst).sum()),
        "tokens": len(deficit),
        "distinct": len(distinct),
        "differing": int((deficit > 0).sum()),
        "plain_differing": plain_differing,
        "unexplained": int((deficit > 2 * worst).sum()),
        "largest_deficit": float(deficit.max()),
        "logit_error": worst,
        "mean_logit_error": total_error / len(deficit),
        "logit_spread": float(expected.std()),
    }


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1).cpu()


def check_family(
    loaded: LoadedModel,
    settings: EngineSettings,
    make_model: Callable[[], Any],
    num_prompts: int,
    max_prompt: int,
    quantization: str,
) -> dict[str, Any]:
    rng = random.Random(0)
    vocab_size = loaded.vocab_size
    max_prompt = min(max_prompt, loaded.max_model_len - NUM_OUTPUT_TOKENS)
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, max_prompt))] for _ in range(num_prompts)]
    # Of every four prompts the first begins as they all do, and the third is the first once more.
    common = [rng.randrange(vocab_size) for _ in range(2 * max_prompt // 3)]
    for i in range(0, num_prompts - 2, 4):
        prompts[i] = prompts[i + 2] = (common + prompts[i])[:max_prompt]
    engine = Engine(loaded, settings)
    scores: list[list[float]] = [[] for _ in prompts]
    outputs, num_hit_tokens = generate(engine, prompts, NUM_OUTPUT_TOKENS, wave=4, scores=scores)
    assert [len(s) for s in scores] == [len(p) - 1 if i % 2 else 0 for i, p in enumerate(prompts)]
    counts: dict[str, Any] = {"layout": loaded.layout, "backend": engine.attention_name}
    counts |= {"preemptions": engine.scheduler.num_preemptions, "prefix_hit_tokens": num_hit_tokens}
    if loaded.device.type == "cuda" and loaded.layout == "packed":
        check_sync(engine)
        generate(engine, prompts[:16], 8, wave=4)
        counts["launch_waits"] = False
    return counts | compare(make_model(), prompts, outputs, scores, quantization)


def check_sync(engine: Engine) -> None:
    """A launch that waits for the device raises from here on."""
    launch = engine.runner.launch

    def watched(plan: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.launch = watched  # type: ignore[method-assign]


def check_noise(device: torch.device) -> dict[str, float]:
    """Draws must not depend on the device: its variates against the CPU's."""

    def variates(where: torch.device) -> torch.Tensor:
        rows = torch.arange(16, device=where)
        floats = torch.ones(16, device=where)
        draws = Draws(rows, None, floats, floats, rows, rows * 7 - 50, rows % 3, rows * 11)
        return exponential(draws, 50_000).cpu()

    here, there = variates(torch.device("cpu")), variates(device)
    return {"largest_relative_difference": float(((here - there).abs() / here).max())}


def attempt(name: str, failures: dict[str, str], action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """A part that fails is reported and the others still run."""
    print(f"-- {name}", flush=True)
    try:
        return action()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        failures[name] = f"{type(error).__name__}: {error}"
        return None
    finally:
        torch.compiler.reset()  # the layers of all families together are of more kinds than it compiles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="auto", help="auto, sdpa or flash-attn-2")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "float8"], help="float8: see how far it is off")
    parser.add_argument(
        "--quantization", default="none", choices=["none", "float8", "int8"], help="of weights, and the reference's"
    )
    parser.add_argument("--exact-reference", action="store_true", help="that is not quantized: see how far it is off")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    is_small = device.type == "cpu"
    common = {"device": arguments.device, "attention": arguments.attention, "dtype": arguments.dtype}
    common |= {"kv_dtype": arguments.kv_dtype, "quantization": arguments.quantization}
    # A small budget and a cache of a few dozen blocks: chunked prefill beside decode, and preemption, all occur.
    settings = EngineSettings(
        **common,
        max_batch_tokens=512,
        max_num_seqs=64,  # fewer graphs to capture
        kv_tokens=512 if is_small else 12_288,
        lookahead=1,
        admission="headroom",
    )
    size: dict[str, Any] = {"num_prompts": 12 if is_small else 96, "max_prompt": 100 if is_small else 700}
    size["quantization"] = "none" if arguments.exact_reference else arguments.quantization
    # Both ways to compute a gated layer, and wide products, occur as well.
    gating.LEAST_TOKENS = wide_linears.LEAST_TOKENS = 256
    wide_linears.LEAST_INPUTS, wide_linears.LEAST_WEIGHTS, wide_linears.LEAST_TILES = 1024, 1 << 21, 8
    failures: dict[str, str] = {}
    families: dict[str, dict[str, Any]] = {}

    def random_family(family: str, layout: str) -> dict[str, Any]:
        chosen = msgspec.structs.replace(settings, layout=layout)
        make_model = functools.partial(build, family, is_small, device, dtype)
        return check_family(adopt(make_model(), chosen), chosen, make_model, **size)

    def bundled() -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        def make_model() -> Any:
            return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=dtype).to(device).eval()

        return check_family(load_model(BUNDLED, settings), settings, make_model, **size)

    for name in arguments.models:
        family, _, layout = name.partition(" ")
        check = bundled if name == "bundled" else functools.partial(random_family, family, layout or "auto")
        if counts := attempt(name, failures, check):
            families[name] = counts
            print(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in counts.items()), flush=True)
    noise = attempt("noise", failures, lambda: check_noise(device))

    print(f"noise: {noise}\nfailures: {failures or 'none'}")
    unexplained = sum(counts["unexplained"] + counts["unexplained_scores"] for counts in families.values())
    summary = {
        "families": families,
        "tokens": sum(counts["tokens"] for counts in families.values()),
        "differing": sum(counts["differing"] for counts in families.values()),
        "unexplained": unexplained,
        "noise": noise,
        "failures": failures,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": str(torch.__version__),
    }
    print(json.dumps(summary))
    return 1 if unexplained or failures or not families else 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
