"""Each Triton kernel on a GPU: held to its plain twin in float64, and timed over shapes and variants.

    python3 -m benchmarks.kernels_gpu [--only check,decode,prefix,prefill,write,score,product,quantized] [--seconds 240]

Times are medians of CUDA graph replays. A graph runs through several layers' caches, so that none is found in the
L2 cache, as in a model. Prints one line per measurement, then one JSON object as the last line; a variant that fails
costs its own line alone. Exit code 1 when a kernel is further from its twin than its tolerance.

Letters: D rows, H query heads, G key/value heads, E head size, B block size.
"""

import argparse
import functools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.kernel_report import DEVICE, Report, time_graph
from benchmarks.products_gpu import time_products
from benchmarks.quantized_gpu import time_quantized
from benchmarks.scores_gpu import time_scores
from worker.engine.kernels.decode_plan import plan_decode
from worker.engine.kernels.decode_variant import DECODE, PREFIX, DecodeVariant
from worker.engine.kernels.kv_write import write_kv
from worker.engine.kernels.paged_decode import decode
from worker.engine.kernels.paged_prefill import LARGE, PrefillPlan, PrefillVariant, plan_prefill, prefill
from worker.engine.kernels.plain import plain_decode, plain_prefill
from worker.engine.kernels.prefix_groups import PrefixGroups

Int64s = npt.NDArray[np.int64]

BLOCK_SIZE = 256
HEAD_DIM = 128
#: Query and key/value heads of the Qwen3-0.6B and Llama-3.1-8B shapes.
HEADS = {"16/8": (16, 8), "32/8": (32, 8)}
DECODE_VARIANTS = [
    DECODE,
    replace(DECODE, is_nested=True),
    DecodeVariant(64, 4, 4, 2, is_nested=True),
    DecodeVariant(64, 2, 3, 2),
    DecodeVariant(128, 8, 3, 1),
    DecodeVariant(128, 8, 3, 1, is_nested=True),
]
PREFIX_VARIANTS = [
    PREFIX,
    replace(PREFIX, is_nested=False, programs_per_sm=1),
    replace(PREFIX, programs_per_sm=1),
]
PREFILL_VARIANTS = [
    PrefillVariant(),
    PrefillVariant(is_split=False),
    PrefillVariant(num_stages=2),
    PrefillVariant(keys=64),
    PrefillVariant(queries=128, keys=64, num_warps=8),
]
LARGE_PREFILL_VARIANTS = [
    LARGE,
    replace(LARGE, queries=64),
    replace(LARGE, queries=64, keys=64, num_stages=2),
    replace(LARGE, queries=64, num_warps=4),
]
#: Bytes that the layers of one graph read at least, several times an L2 cache.
MIN_BYTES = 1 << 29
#: Calls in one graph: layers of a model, since what is planned once a step is timed along.
NUM_CALLS = 28
SCALE = HEAD_DIM**-0.5


class Rows:
    """Decode rows of given lengths over scattered blocks, in as many layers as it takes to leave the L2 cache."""

    def __init__(
        self,
        lens: list[int],
        heads: tuple[int, int],
        *,
        groups: Sequence[tuple[list[int], int]] = (),
        is_by_head: bool = False,
    ) -> None:
        num_heads, self.num_kv_heads = num_heads, num_kv_heads = heads
        self.lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        num_per_row = -(-max(lens) // BLOCK_SIZE)
        shared = {row: num for rows, num in groups for row in rows}
        num_own = [-(-(n - shared.get(i, 0)) // BLOCK_SIZE) for i, n in enumerate(lens)]
        num_blocks = sum(num_own) + sum(num // BLOCK_SIZE for _, num in groups)
        order = iter(torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist())
        tables = torch.zeros(len(lens), num_per_row, dtype=torch.int32)
        for rows, num in groups:
            tables[rows, : num // BLOCK_SIZE] = torch.tensor([next(order) for _ in range(num // BLOCK_SIZE)]).int()
        for i, num in enumerate(num_own):
            first = shared.get(i, 0) // BLOCK_SIZE
            tables[i, first : first + num] = torch.tensor([next(order) for _ in range(num)]).int()
        self.tables = tables.cuda()
        per_token = 2 * num_kv_heads * HEAD_DIM * 2
        self.num_bytes = per_token * (sum(lens) - sum((len(rows) - 1) * num for rows, num in groups))
        self.num_layers = max(-(-MIN_BYTES // self.num_bytes), 2)
        shape = (num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
        if is_by_head:
            shape = (num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM)
        torch.manual_seed(0)
        caches = [torch.randn(2, *shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(self.num_layers)]
        self.caches = [cache.transpose(2, 3) if is_by_head else cache for cache in caches]
        self.query = torch.randn(len(lens), num_heads, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        self.groups = groups

    @property
    def calls(self) -> list[Tensor]:
        """The caches of each call."""
        return [self.caches[i % self.num_layers] for i in range(NUM_CALLS)]

    def prefixes(self, num_members: int) -> PrefixGroups:
        tiles, lens, starts = [], [], [0] * len(self.lens)
        for rows, num in self.groups:
            for i in range(0, len(rows), num_members):
                tiles.append((rows[i : i + num_members] + [-1] * num_members)[:num_members])
                lens.append(num)
            for row in rows:
                starts[row] = num
        return PrefixGroups(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (tiles, lens, starts)))

    def run(
        self, variant: DecodeVariant, prefix_variant: DecodeVariant | None = None, num_members: int = 0, **terms: Any
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """All layers once, with what is planned once a step; returns the first layer's results."""
        prefixes = self.prefixes(num_members) if prefix_variant is not None else None
        softcap, window = terms.get("softcap"), terms.get("window")

        def step() -> tuple[Tensor, Tensor]:
            starts = prefix_plan = None
            if prefixes is not None:
                assert prefix_variant is not None
                starts = prefixes.starts
                prefix_plan = plan_decode(
                    self.tables,
                    prefixes.lens,
                    BLOCK_SIZE,
                    self.num_kv_heads,
                    prefix_variant,
                    table_rows=prefixes.members,
                )
            plan = plan_decode(
                self.tables, self.lens, BLOCK_SIZE, self.num_kv_heads, variant, starts=starts, window=window
            )
            results = []
            for k_cache, v_cache in self.calls:
                options: dict[str, Any] = {"scale": SCALE, "softcap": softcap}
                prefix = None
                if prefix_plan is not None:
                    prefix = decode(self.query, k_cache, v_cache, prefix_plan, groups=prefixes, **options)
                results.append(decode(self.query, k_cache, v_cache, plan, prefix=prefix, **options))
            return results[0]

        return step

    def run_flash(self) -> Callable[[], Any]:
        from flash_attn import flash_attn_with_kvcache

        options = {"cache_seqlens": self.lens, "block_table": self.tables, "causal": True, "softmax_scale": SCALE}
        query = self.query.unsqueeze(1)
        return lambda: [flash_attn_with_kvcache(query, k, v, **options) for k, v in self.calls]

    def errors(self, result: tuple[Tensor, Tensor], **terms: Any) -> dict[str, Any]:
        """Against the twin in float64. bfloat16 outputs are off by 2^-9 of themselves by rounding alone."""
        k_cache, v_cache = self.caches[0]
        # Row by row, since whole caches in float64 would be large.
        differences, log_sum_differences, largest = [], [], 0.0
        for i in range(len(self.lens)):
            blocks = self.tables[i].long()
            table = torch.arange(len(blocks), device=DEVICE)[None, :].int()
            query, keys, values = (x.double() for x in (self.query[i : i + 1], k_cache[blocks], v_cache[blocks]))
            output, log_sum = plain_decode(query, keys, values, table, self.lens[i : i + 1], scale=SCALE, **terms)
            differences.append(float((result[0][i].double() - output[0]).abs().max()))
            log_sum_differences.append(float((result[1][i].double() - log_sum[0]).abs().max()))
            largest = max(largest, float(output.abs().max()))
        error, log_sum_error = max(differences), max(log_sum_differences)
        is_wrong = not (error < 0.01 * largest and log_sum_error < 0.005)  # also when it is not a number
        return {"error": error, "of": largest, "lse_error": log_sum_error, "wrong": is_wrong}


def uniform_lens(num: int, low: int, high: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(low, high) for _ in range(num)]


def groups_of(num_groups: int, size: int, num_tokens: int) -> list[tuple[list[int], int]]:
    """Rows dealt out to the groups in turn, as they come when a job is shuffled."""
    return [(list(range(i, num_groups * size, num_groups)), num_tokens) for i in range(num_groups)]


def measure_decode(rows: Rows, *arguments: Any) -> dict[str, Any]:
    return _bandwidth(rows, time_graph(rows.run(*arguments), NUM_CALLS))


def measure_flash(rows: Rows) -> dict[str, Any]:
    return _bandwidth(rows, time_graph(rows.run_flash(), NUM_CALLS))


def _bandwidth(rows: Rows, seconds: float) -> dict[str, Any]:
    return {"us": seconds * 1e6, "TB/s": rows.num_bytes / seconds / 1e12}


def check(report: Report) -> None:
    lens = [1, 255, 256, 257, 700, 33, 64, 2048, 1500, 5]
    for name, heads in [*HEADS.items(), ("28/4", (28, 4)), ("8/8", (8, 8))]:
        rows = Rows(lens, heads)
        for terms in ({}, {"window": 300}, {"softcap": 20.0}):
            report.add(f"check decode {name} {terms or ''}", functools.partial(check_rows, rows, DECODE, **terms))
    for name, heads in HEADS.items():
        rows = Rows([1024 + n for n in uniform_lens(40, 1, 400)], heads, groups=groups_of(3, 11, 1024))
        members = 64 * heads[1] // heads[0]
        report.add(
            f"check prefix {name}",
            functools.partial(check_rows, rows, DECODE, PREFIX, members),
        )


def check_rows(rows: Rows, *arguments: Any, **terms: Any) -> dict[str, Any]:
    return rows.errors(rows.run(*arguments, **terms)(), **terms)


SHAPES = {
    "8x1000": [1000] * 8,
    "8x16000": [16_000] * 8,
    "64x1000": [1000] * 64,
    "256x600": [600] * 256,
    "1024x200": [200] * 1024,
    "256x100..1900": uniform_lens(256, 100, 1900),
}


def time_decode(report: Report) -> None:
    report.add("copy (read + write)", measure_copy)
    report.add("read (maximum of int32)", measure_read)
    for name, heads in HEADS.items():
        best: tuple[float, DecodeVariant] = (0.0, DECODE)
        # One shape to choose among the variants, the others to see that the choice holds.
        for shape in ("256x600", "64x1000"):
            rows = Rows(SHAPES[shape], heads)
            for variant in DECODE_VARIANTS:
                report.add(f"decode {name} {shape} {_short(variant)}", functools.partial(measure_decode, rows, variant))
                found = report.results[-1].get("TB/s", 0.0)
                if shape == "256x600":
                    best = max(best, (found, variant), key=lambda pair: pair[0])
        for shape, lens in SHAPES.items():
            rows = Rows(lens, heads)
            report.add(
                f"decode {name} {shape} best {_short(best[1])}", functools.partial(measure_decode, rows, best[1])
            )
            if shape not in ("256x600", "64x1000"):
                report.add(f"decode {name} {shape} default", functools.partial(measure_decode, rows, DECODE))
            report.add(
                f"decode {name} {shape} flash-attn-2",
                functools.partial(measure_flash, rows),
            )
            by_head = Rows(lens, heads, is_by_head=True)
            report.add(
                f"decode {name} {shape} best, cache by head", functools.partial(measure_decode, by_head, best[1])
            )
            del rows, by_head
            torch.cuda.empty_cache()


def time_prefix(report: Report) -> None:
    for name, heads in HEADS.items():
        most = 64 * heads[1] // heads[0]
        for num_groups, size, is_main in ((64, 16, True), (8, 128, False), (256, 4, False)):
            own = uniform_lens(num_groups * size, 129, 384)
            rows = Rows([2048 + n for n in own], heads, groups=groups_of(num_groups, size, 2048))
            what = f"prefix {name} {num_groups} groups of {size}, 2048 + 256"
            for variant in PREFIX_VARIANTS if is_main else [PREFIX]:
                for members in sorted({most, most // 2}) if is_main else [most]:
                    report.add(
                        f"{what} {_short(variant)} {members} rows",
                        functools.partial(measure_decode, rows, DECODE, variant, members),
                    )
            report.add(f"{what} plain", functools.partial(measure_decode, rows, DECODE))
            del rows
            torch.cuda.empty_cache()


def time_write(report: Report) -> None:
    k_cache, v_cache = torch.zeros(2, 256, BLOCK_SIZE, 8, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    for num_tokens in (256, 1024, 16_384):
        fused = torch.randn(num_tokens, 32, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        slots = torch.randperm(256 * BLOCK_SIZE, device=DEVICE)[:num_tokens]
        arguments = (fused[:, 16:24], fused[:, 24:], k_cache, v_cache, slots)
        for name, write in (("", write_kv), (", index_copy_ twice", index_copy_kv)):
            report.add(f"write {num_tokens} tokens{name}", functools.partial(measure_write, write, arguments))


def measure_write(write: Callable[..., None], arguments: tuple[Tensor, ...]) -> dict[str, Any]:
    return {"us": 1e6 * time_graph(functools.partial(repeat, write, arguments), NUM_CALLS)}


def repeat(run: Callable[..., None], arguments: tuple[Tensor, ...]) -> None:
    for _ in range(NUM_CALLS):
        run(*arguments)


def index_copy_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k_cache.flatten(0, 1).index_copy_(0, slots, key)
    v_cache.flatten(0, 1).index_copy_(0, slots, value)


def time_prefill(report: Report) -> None:
    """Pieces of 16384 tokens in all, as a step of prompts has them, against flash-attn 2 on the same blocks."""
    shapes = {"29 x 100..1024": uniform_lens(29, 100, 1024), "4 x 4096": [4096] * 4, "1 x 16384": [16_384]}
    for name, heads in HEADS.items():
        for shape, lens in shapes.items():
            for block_size in (64, BLOCK_SIZE) if len(lens) > 4 else (BLOCK_SIZE,):
                time_pieces(report, f"prefill {name} {shape}, block {block_size}", lens, heads, HEAD_DIM, block_size)
    time_pieces(report, "prefill 8/4 of 256, 29 x 100..1024", uniform_lens(29, 100, 1024), (8, 4), 256, BLOCK_SIZE)


def time_pieces(
    report: Report, what: str, lens: list[int], heads: tuple[int, int], head_dim: int, block_size: int
) -> None:
    pieces = Pieces(np.array(lens, dtype=np.int64), heads, head_dim, block_size)
    for variant in PREFILL_VARIANTS if head_dim == HEAD_DIM else LARGE_PREFILL_VARIANTS:
        run = functools.partial(pieces.run, variant)
        name = f"q{variant.queries} k{variant.keys} w{variant.num_warps} s{variant.num_stages}"
        name = f"{what} {name}{'' if variant.is_split else ' in one loop'}"
        report.add(f"check {name}", functools.partial(pieces.errors, run))
        report.add(name, functools.partial(pieces.measure, run))
    if block_size == BLOCK_SIZE:
        report.add(f"{what}, flash-attn-2", functools.partial(pieces.measure, pieces.run_flash))


class Pieces:
    """Whole prompts over scattered blocks."""

    def __init__(self, lens: Int64s, heads: tuple[int, int], head_dim: int, block_size: int) -> None:
        self.lens, self._scale, num_per_piece = lens, head_dim**-0.5, -(-int(lens.max()) // block_size)
        num_blocks = len(lens) * num_per_piece
        self.tables = torch.randperm(num_blocks, device=DEVICE).view(len(lens), -1).int()
        shape = (num_blocks, block_size, heads[1], head_dim)
        self.caches = torch.randn(2, *shape, device=DEVICE, dtype=torch.bfloat16)
        self.query = torch.randn(int(lens.sum()), heads[0], head_dim, device=DEVICE, dtype=torch.bfloat16)
        self.cu_lens = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=DEVICE)
        self._plans: dict[PrefillVariant, PrefillPlan] = {}

    def run(self, variant: PrefillVariant) -> Tensor:
        plan = self._plans.get(variant)
        if plan is None:
            lens = self.lens, self.lens
            num_shared = self.query.shape[1] // self.caches.shape[3]
            plan = plan_prefill(*lens, num_shared, self.query.shape[2], self.query.device, variant)
            self._plans[variant] = plan
        return prefill(self.query, self.caches[0], self.caches[1], self.tables, plan, scale=self._scale)

    def run_flash(self) -> Any:
        from flash_attn import flash_attn_varlen_func

        longest = int(self.lens.max())
        lens = {"cu_seqlens_q": self.cu_lens, "cu_seqlens_k": self.cu_lens}
        options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True, "softmax_scale": self._scale}
        return flash_attn_varlen_func(self.query, *self.caches, block_table=self.tables, **lens, **options)

    def measure(self, run: Callable[[], object]) -> dict[str, Any]:
        seconds = time_graph(run, 1)
        num_flops = 2 * int((self.lens * (self.lens + 1)).sum()) * self.query[0].numel()
        return {"us": seconds * 1e6, "TFLOP/s": num_flops / seconds / 1e12}

    def errors(self, run: Callable[[], Tensor]) -> dict[str, Any]:
        """Of some pieces' last tokens, against the twin in float64."""
        output = run()
        differences = []
        for i in (0, len(self.lens) // 2, len(self.lens) - 1):
            blocks, end = self.tables[i].long(), int(self.cu_lens[i + 1])
            table = torch.arange(len(blocks), device=DEVICE)[None, :].int()
            keys, values = (cache[blocks].double() for cache in self.caches)
            query = self.query[end - 40 : end].double()
            expected = plain_prefill(query, keys, values, table, [40], [int(self.lens[i])], scale=self._scale)
            differences.append(float((output[end - 40 : end].double() - expected).abs().max()))
        return {"error": max(differences), "wrong": not max(differences) < 0.02}


def measure_copy() -> dict[str, Any]:
    source = torch.zeros(1 << 29, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = time_graph(lambda: target.copy_(source), 1)
    return {"us": seconds * 1e6, "TB/s": 2 * source.nbytes / seconds / 1e12}


def measure_read() -> dict[str, Any]:
    source = torch.zeros(1 << 29, device=DEVICE, dtype=torch.int32)
    seconds = time_graph(lambda: source.amax(), 1)
    return {"us": seconds * 1e6, "TB/s": source.nbytes / seconds / 1e12}


def _short(variant: DecodeVariant) -> str:
    flags = " nested" if variant.is_nested else ""
    return f"t{variant.tile} w{variant.num_warps} s{variant.num_stages} x{variant.programs_per_sm}{flags}"


PARTS: dict[str, Callable[[Report], None]] = {
    "check": check,
    "decode": time_decode,
    "write": time_write,
    "score": time_scores,
    "product": time_products,
    "quantized": time_quantized,
    "prefill": time_prefill,
    "prefix": time_prefix,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=240.0, help="after which nothing new is begun")
    arguments = parser.parse_args()
    import triton

    report = Report(arguments.seconds)
    started = time.monotonic()
    for part in arguments.only.split(","):
        run = PARTS[part]
        try:
            run(report)
        except Exception as error:  # as above; what was found so far is worth having
            print(f"{part} broke off: {type(error).__name__}: {error}", flush=True)
            report.num_wrong += 1
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "seconds": round(time.monotonic() - started, 1),
                "num_wrong": report.num_wrong,
                "results": report.results,
            }
        )
    )
    return int(report.num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
