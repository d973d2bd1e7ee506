"""Runner: the model, the KV cache and the per-row state on the device; it turns a StepPlan into sampled tokens.

What a step needs of earlier ones (last token, length, block table, sampling parameters) lives on the device, so the
host sends only what changed and `launch` never waits: the next step can be launched before this one's tokens are known.

Letters: R rows, M blocks per table, T tokens, D decode rows, S segments, K sampled rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batching.layout import PackedLayout, pack
from batching.scheduler import StepPlan
from worker.engine import attention
from worker.engine.adjustments import Adjustments
from worker.engine.attention import AttentionBackend, AttentionStep
from worker.engine.kv_cache import KVCache
from worker.engine.loader import LoadedModel
from worker.engine.sampler import Draws, sample
from worker.engine.scorer import Scorer, Scores, score_rows

Array = npt.NDArray[np.int64] | npt.NDArray[np.float32]


def send(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Named arrays to the device, in one copy from pinned memory that nothing waits for."""
    if device.type != "cuda":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sizes = [(array.nbytes + 7) // 8 for array in arrays.values()]
    # torch's allocator of pinned memory hands a buffer out again only when copies from it are done.
    buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    host, start = buffer.numpy(), 0
    for array, size in zip(arrays.values(), sizes, strict=True):
        host[start : start + size].view(array.dtype)[: array.size] = array
        start += size
    parts = torch.split(buffer.to(device, non_blocking=True), sizes)
    return {
        name: part.view(torch.float32 if array.dtype == np.float32 else torch.int64)[: array.size]
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step's tokens, on their way to the host."""

    tokens: Tensor  # (K,) int64, pinned when `done` is there
    done: torch.cuda.Event | None
    scores: Scores | None = None  # to be read after `wait`, as the next
    logprobs: Scores | None = None  # of the sampled tokens whose Sequences asked, in their order

    def wait(self) -> npt.NDArray[np.int64]:
        if self.done is not None:
            self.done.synchronize()
        tokens: npt.NDArray[np.int64] = self.tokens.numpy()
        return tokens


class Runner:
    def __init__(self, loaded: LoadedModel, backend: AttentionBackend, *, max_num_seqs: int, num_blocks: int) -> None:
        self._start(loaded, max_num_seqs)
        self.backend = backend
        self.max_blocks = -(-loaded.max_model_len // backend.block_size)
        self.resize_cache(num_blocks)
        num_rows, device = max_num_seqs, self.device
        self._length = torch.zeros(num_rows, dtype=torch.int64, device=device)  # (R,) tokens written
        self._block_table = torch.zeros(num_rows, self.max_blocks, dtype=torch.int32, device=device)  # (R, M)

    def _start(self, loaded: LoadedModel, num_rows: int) -> None:
        """What sampling and scoring need, whatever the layout."""
        self.loaded = loaded
        self.device = device = loaded.device
        self._scorer = Scorer(loaded.model)
        self._last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)  # (R,)
        # Sampling parameters (R,) each; position and last token complete what a draw depends on.
        self._temperature = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self._top_p = torch.ones(num_rows, dtype=torch.float32, device=device)
        self._top_k = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._seed = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._sample = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._min_p = torch.zeros(num_rows, dtype=torch.float32, device=device)
        # The host's own copy of what decides which sampling code runs.
        self._draws = np.zeros(num_rows, dtype=bool)
        self._is_limited = np.zeros(num_rows, dtype=bool)
        self._has_min_p = np.zeros(num_rows, dtype=bool)
        self._num_logprobs = np.full(num_rows, -1, dtype=np.int64)  # -1: not asked for
        self._adjustments = Adjustments(num_rows, loaded.vocab_size, device)

    def resize_cache(self, num_blocks: int) -> None:
        """A fresh KV cache; what the old one held is gone."""
        self.cache: KVCache | None = None  # the old one's memory is free before the new one takes its own
        loaded = self.loaded
        self.cache = KVCache(loaded.layers, num_blocks, self.backend.block_size, loaded.device, loaded.dtype)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step. On CUDA nothing in here waits for the device."""
        layout = pack(plan)
        draw_slots = np.flatnonzero(self._note_admitted(plan)[layout.sampled_rows])
        logprob_slots = np.flatnonzero(self._num_logprobs[layout.sampled_rows] >= 0)
        arrays = self._arrays(plan, layout, draw_slots) | self._adjustments.arrays(plan, layout.sampled_rows)
        sent = send(arrays | {"logprob_slots": logprob_slots} if len(logprob_slots) else arrays, self.device)
        self._update_rows(sent)
        if plan.copies:
            assert self.cache is not None
            self.cache.copy_blocks(sent["copy_sources"], sent["copy_targets"])
        with self._scorer.watch(bool(plan.scored)):
            logits, positions, places = self._forward(plan, layout, sent)
        # A copy, since adjusting may happen in place.
        raw = logits.index_select(0, sent["logprob_slots"]) if len(logprob_slots) else None  # (A, V)
        sampled_rows = sent["sampled_rows"]
        logits = self._adjustments.apply(logits, sent)
        tokens = sample(logits, self._gather_draws(sent, sampled_rows, positions) if len(draw_slots) else None)
        self._adjustments.count(tokens, sent)
        self._last_token.index_copy_(0, sampled_rows, tokens)
        scores = logprobs = None
        if plan.scored:
            scored = sent["scored"] if places is None else places[sent["scored"]]
            num_top = max(plan.sequences[segment].num_top for segment, _, _ in plan.scored)
            scores = self._scorer.score(scored, sent["score_targets"], num_top)
        if raw is not None:
            num_top = int(self._num_logprobs[layout.sampled_rows].max())
            logprobs = score_rows(raw, tokens[sent["logprob_slots"]], num_top)
        return self._fetch(tokens, scores, logprobs)

    def _forward(
        self, plan: StepPlan, layout: PackedLayout, sent: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (K, V) of the sampled tokens, positions (T,) of all, and where they are in the model's input (T,):
        None when they are in the same order."""
        rows, num_decode = sent["rows"], layout.num_decode
        decode_rows = rows[:num_decode]
        token_ids = torch.cat((self._last_token[decode_rows], sent["prefill_token_ids"]))  # (T,)
        positions = torch.cat((self._length[decode_rows], sent["prefill_positions"]))  # (T,)
        step = self._attention_step(layout, sent, positions)
        self._length.index_copy_(0, rows, sent["kv_lens"])
        logits = self.loaded.model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=sent["sampled"],
            **{attention.STEP: step},
        ).logits[0]
        return logits, positions, None

    def _note_admitted(self, plan: StepPlan) -> npt.NDArray[np.bool_]:
        for seq in plan.admitted:
            self._draws[seq.row] = seq.temperature > 0
            self._is_limited[seq.row] = seq.temperature > 0 and (seq.top_k > 0 or seq.top_p < 1)
            self._has_min_p[seq.row] = seq.temperature > 0 and seq.min_p > 0
            self._num_logprobs[seq.row] = -1 if seq.logprobs is None else seq.logprobs
        return self._draws

    def _arrays(self, plan: StepPlan, layout: PackedLayout, draw_slots: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Everything the step needs from the host."""
        num_decode, admitted = layout.num_decode, plan.admitted
        arrays: dict[str, Array] = {
            "rows": layout.rows,
            "kv_lens": layout.kv_lens,
            "prefill_token_ids": layout.prefill_token_ids,
            "prefill_rows": layout.prefill_rows,
            "prefill_positions": layout.positions[num_decode:],
            "cu_query_lens": (layout.cu_query_lens[num_decode:] - num_decode).astype(np.int64),
            "cu_kv_lens": (layout.cu_kv_lens[num_decode:] - layout.cu_kv_lens[num_decode]).astype(np.int64),
            "sampled": layout.sampled,
            "sampled_rows": layout.sampled_rows,
        }
        if len(layout.scored):
            arrays["scored"], arrays["score_targets"] = layout.scored, layout.score_targets
        if plan.new_blocks:
            blocks = np.array(plan.new_blocks, dtype=np.int64)  # (blocks, 3)
            arrays["block_places"] = blocks[:, 0] * self.max_blocks + blocks[:, 1]
            arrays["blocks"] = blocks[:, 2].copy()
        if plan.copies:
            arrays["copy_sources"], arrays["copy_targets"] = np.array(plan.copies, dtype=np.int64).T.copy()
        if admitted:
            arrays["new_rows"] = np.array([seq.row for seq in admitted], dtype=np.int64)
            arrays["temperature"] = np.array([seq.temperature for seq in admitted], dtype=np.float32)
            arrays["top_p"] = np.array([seq.top_p for seq in admitted], dtype=np.float32)
            arrays["top_k"] = np.array([seq.top_k for seq in admitted], dtype=np.int64)
            arrays["min_p"] = np.array([seq.min_p for seq in admitted], dtype=np.float32)
            arrays["seed"] = np.array([_as_int64(seq.seed) for seq in admitted], dtype=np.int64)
            arrays["sample"] = np.array([seq.sample for seq in admitted], dtype=np.int64)
        if len(draw_slots):
            arrays["draw_slots"] = draw_slots
            arrays["limited"] = np.flatnonzero(self._is_limited[layout.sampled_rows[draw_slots]])
            if self._has_min_p[layout.sampled_rows[draw_slots]].any():
                arrays["min_p_rows"] = layout.sampled_rows[draw_slots]
        return arrays

    def _update_rows(self, sent: dict[str, Tensor]) -> None:
        if "blocks" in sent:
            self._block_table.view(-1).index_copy_(0, sent["block_places"], sent["blocks"].int())
        if "new_rows" in sent:
            rows = sent["new_rows"]
            self._temperature.index_copy_(0, rows, sent["temperature"])
            self._top_p.index_copy_(0, rows, sent["top_p"])
            self._top_k.index_copy_(0, rows, sent["top_k"])
            self._min_p.index_copy_(0, rows, sent["min_p"])
            self._seed.index_copy_(0, rows, sent["seed"])
            self._sample.index_copy_(0, rows, sent["sample"])

    def _attention_step(self, layout: PackedLayout, sent: dict[str, Tensor], positions: Tensor) -> AttentionStep:
        num_decode, block_size = layout.num_decode, self.backend.block_size
        rows = sent["rows"]
        token_rows = torch.cat((rows[:num_decode], sent["prefill_rows"]))  # (T,)
        places = token_rows * self.max_blocks + positions // block_size
        slots = self._block_table.view(-1)[places].long() * block_size + positions % block_size
        tables = self._block_table[rows]  # (S, M)
        assert self.cache is not None
        return AttentionStep(
            cache=self.cache,
            backend=self.backend,
            num_decode=num_decode,
            slots=slots,
            decode_tables=tables[:num_decode],
            decode_lens=(positions[:num_decode] + 1).int(),
            prefill_tables=tables[num_decode:],
            cu_query_lens=sent["cu_query_lens"].int(),
            cu_kv_lens=sent["cu_kv_lens"].int(),
            decode_kv_lens=layout.kv_lens[:num_decode],
            query_lens=layout.query_lens[num_decode:],
            kv_lens=layout.kv_lens[num_decode:],
        )

    def _gather_draws(self, sent: dict[str, Tensor], sampled_rows: Tensor, positions: Tensor) -> Draws:
        slots = sent["draw_slots"]
        rows = sampled_rows[slots]
        return Draws(
            rows=slots,
            limited=sent["limited"] if len(sent["limited"]) else None,
            temperature=self._temperature[rows],
            top_p=self._top_p[rows],
            top_k=self._top_k[rows],
            seed=self._seed[rows],
            sample=self._sample[rows],
            position=positions[sent["sampled"][slots]] + 1,
            min_p=self._min_p[sent["min_p_rows"]] if "min_p_rows" in sent else None,
        )

    def _fetch(self, tokens: Tensor, scores: Scores | None, logprobs: Scores | None) -> StepHandle:
        if self.device.type != "cuda":
            return StepHandle(tokens, None, scores, logprobs)
        host = torch.empty(len(tokens), dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        scores = None if scores is None else scores.to_host()
        logprobs = None if logprobs is None else logprobs.to_host()
        return StepHandle(host, torch.cuda.current_stream(self.device).record_event(), scores, logprobs)


def _as_int64(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
