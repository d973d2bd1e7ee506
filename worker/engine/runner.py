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
from batching.shared_prefixes import MAX_MEMBERS, PrefixTiles
from worker.engine import attention
from worker.engine.adjustments import Adjustments
from worker.engine.attention import AttentionBackend, AttentionStep
from worker.engine.compiling import uncompiled
from worker.engine.decode_step import DecodeStep, prefix_arrays
from worker.engine.graph_pool import GraphPool
from worker.engine.kernels.prefix_groups import PrefixGroups
from worker.engine.kv_cache import KVCache
from worker.engine.loader import LoadedModel
from worker.engine.row_state import Array, RowState
from worker.engine.sampler import Draws, sample
from worker.engine.scorer import Scorer, Scores, score_rows


def send(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Named arrays to the device, in one copy from pinned memory that nothing waits for."""
    if device.type != "cuda":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    # Each begins at a multiple of 16 bytes: Triton compiles kernels anew for pointers of another alignment.
    sizes = [(array.nbytes + 15) // 16 * 2 for array in arrays.values()]
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
class Forward:
    """A forward pass on its way."""

    logits: Tensor  # (K, V) of the sampled tokens
    positions: Tensor  # (T,) of all tokens
    places: Tensor | None = None  # (T,) of the tokens in the model's input; None: in the same order
    tokens: Tensor | None = None  # (K,) where the pass has drawn them, as rows without further wishes have them drawn
    num_padding: int = 0  # rows that were nobody's
    is_captured: bool = False  # replayed from a graph


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step's tokens, on their way to the host."""

    tokens: Tensor  # (K,) int64, pinned when `done` is there
    done: torch.cuda.Event | None
    scores: Scores | None = None  # to be read after `wait`, as the next
    logprobs: Scores | None = None  # of the sampled tokens whose Sequences asked, in their order
    is_captured: bool = False  # replayed from a graph
    num_padding: int = 0  # rows of the graph that were nobody's

    def wait(self) -> npt.NDArray[np.int64]:
        if self.done is not None:
            self.done.synchronize()
        tokens: npt.NDArray[np.int64] = self.tokens.numpy()
        return tokens


class Runner:
    def __init__(
        self,
        loaded: LoadedModel,
        backend: AttentionBackend,
        *,
        max_num_seqs: int,
        num_blocks: int,
        graphs: GraphPool | None = None,
    ) -> None:
        self._start(loaded, max_num_seqs, -(-loaded.max_model_len // backend.block_size))
        self.backend = backend
        # A block more, for what rows of nobody write.
        self.cache = KVCache(loaded.layers, num_blocks + 1, backend.block_size, loaded.device, loaded.kv_dtype)
        self.state.block_table[self.state.nobody] = num_blocks
        self.decode = DecodeStep(loaded, backend, self.cache, self.state, graphs)

    def _start(self, loaded: LoadedModel, num_rows: int, max_blocks: int) -> None:
        """What sampling and scoring need, whatever the layout."""
        self.loaded = loaded
        self.device = loaded.device
        self.state = RowState(num_rows, max_blocks, loaded.device)
        self._scorer = Scorer(loaded.model)
        self._adjustments = Adjustments(num_rows, loaded.vocab_size, loaded.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step. On CUDA nothing in here waits for the device."""
        layout = pack(plan)
        wishes = self._adjustments.arrays(plan, layout.sampled_rows)
        arrays = self.state.arrays(plan)
        logprob_slots = np.flatnonzero(self.state.num_logprobs[layout.sampled_rows] >= 0)
        if len(logprob_slots):
            wishes["logprob_slots"] = logprob_slots
        if plan.is_decode_only and self.decode.is_captured and not wishes:
            arrays |= self.decode.arrays(layout.rows, self._shared(plan))  # the graph knows the rest
        else:
            arrays |= wishes | self._arrays(plan, layout)
            if wishes or not self.state.has_kernels:
                arrays |= self._draw_arrays(layout)
        sent = send(arrays, self.device) if arrays else {}
        self.state.update(sent)
        if plan.copies:
            self.cache.copy_blocks(sent["copy_sources"], sent["copy_targets"])
        with self._scorer.watch(bool(plan.scored)):
            forward = self._forward(plan, layout, sent)
        tokens, logprobs = self._sample(layout, sent, forward, has_wishes=bool(wishes))
        scores = None
        if plan.scored:
            scored = sent["scored"] if forward.places is None else forward.places[sent["scored"]]
            num_top = max(plan.sequences[segment].num_top for segment, _, _ in plan.scored)
            scores = self._scorer.score(scored, sent["score_targets"], num_top)
        return self._fetch(forward, tokens, scores, logprobs)

    def forget(self) -> None:
        """A launch has failed: what the device knows of the running rows is uncertain."""
        self._scorer.forget()
        self.decode.forget()

    def _forward(self, plan: StepPlan, layout: PackedLayout, sent: dict[str, Tensor]) -> Forward:
        if plan.is_decode_only:
            self.decode.update(sent)
            decoded = self.decode.run(layout.kv_lens)
            return Forward(
                decoded.logits,
                decoded.positions,
                tokens=decoded.tokens,
                num_padding=decoded.num_padding,
                is_captured=decoded.is_captured,
            )
        rows, num_decode = sent["rows"], layout.num_decode
        decode_rows = rows[:num_decode]
        token_ids = torch.cat((self.state.last_token[decode_rows], sent["prefill_token_ids"]))  # (T,)
        positions = torch.cat((self.state.length[decode_rows], sent["prefill_positions"]))  # (T,)
        step = self._attention_step(layout, sent, positions)
        self.state.length.index_copy_(0, rows, sent["kv_lens"])
        with attention.running(step), uncompiled(len(token_ids) == 1):
            logits = self.loaded.model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=sent["sampled"],
            ).logits[0]
        return Forward(logits, positions)

    def _sample(
        self, layout: PackedLayout, sent: dict[str, Tensor], forward: Forward, *, has_wishes: bool
    ) -> tuple[Tensor, Scores | None]:
        """Tokens (K,), and their log-probabilities where they are asked for."""
        if forward.tokens is not None and not has_wishes:
            return forward.tokens, None
        sampled_rows = sent["sampled_rows"]
        logits, raw = forward.logits, None
        if self.state.has_kernels and not has_wishes:
            tokens = self.state.draw(logits, sampled_rows, forward.positions[sent["sampled"]])
            self.state.last_token.index_copy_(0, sampled_rows, tokens)
            return tokens, None
        if "logprob_slots" in sent:
            # A copy, since adjusting may happen in place.
            raw = logits.index_select(0, sent["logprob_slots"])  # (A, V)
        logits = self._adjustments.apply(logits, sent)
        draws = self._gather_draws(sent, sampled_rows, forward.positions) if "draw_slots" in sent else None
        tokens = sample(logits, draws)
        self._adjustments.count(tokens, sent)
        self.state.last_token.index_copy_(0, sampled_rows, tokens)
        if raw is None:
            return tokens, None
        num_top = int(self.state.num_logprobs[layout.sampled_rows].max())
        return tokens, score_rows(raw, tokens[sent["logprob_slots"]], num_top)

    def _arrays(self, plan: StepPlan, layout: PackedLayout) -> dict[str, Array]:
        """Everything the step needs from the host beside what has changed of its rows."""
        num_decode = layout.num_decode
        arrays: dict[str, Array] = {
            "rows": layout.rows,
            "kv_lens": layout.kv_lens,
            "prefill_token_ids": layout.prefill_token_ids,
            "prefill_rows": layout.prefill_rows,
            "prefill_positions": layout.positions[num_decode:],
            "sampled": layout.sampled,
            "sampled_rows": layout.sampled_rows,
        }
        if len(layout.scored):
            arrays["scored"], arrays["score_targets"] = layout.scored, layout.score_targets
        if plan.duplicates:
            arrays["duplicated"], arrays["duplicate_blocks"] = layout.duplicated, layout.duplicate_blocks
        if plan.copies:
            arrays["copy_sources"], arrays["copy_targets"] = np.array(plan.copies, dtype=np.int64).T.copy()
        if plan.is_decode_only:
            arrays |= self.decode.arrays(layout.rows, self._shared(plan))
        elif (tiles := self._shared(plan)) is not None:
            arrays |= prefix_arrays(tiles, num_decode)
        return arrays

    def _shared(self, plan: StepPlan) -> PrefixTiles | None:
        return plan.prefixes if plan.prefixes is not None and self.backend.shares_prefixes else None

    def _draw_arrays(self, layout: PackedLayout) -> dict[str, Array]:
        """For tokens that are drawn outside a graph."""
        state = self.state
        draw_slots = np.flatnonzero(state.draws[layout.sampled_rows])
        if not len(draw_slots):
            return {}
        rows = layout.sampled_rows[draw_slots]
        arrays: dict[str, Array] = {"draw_slots": draw_slots, "limited": np.flatnonzero(state.is_limited[rows])}
        if state.has_min_p[rows].any():
            arrays["min_p_rows"] = rows
        return arrays

    def _attention_step(self, layout: PackedLayout, sent: dict[str, Tensor], positions: Tensor) -> AttentionStep:
        num_decode, block_size, state = layout.num_decode, self.backend.block_size, self.state
        rows = sent["rows"]
        token_rows = torch.cat((rows[:num_decode], sent["prefill_rows"]))  # (T,)
        places = token_rows * state.max_blocks + positions // block_size
        slots = state.block_table.view(-1)[places].long() * block_size + positions % block_size
        tables = state.block_table[rows]  # (S, M)
        prefixes = None
        if "prefix_lens" in sent:
            members = sent["prefix_members"].int().view(-1, MAX_MEMBERS)
            prefixes = PrefixGroups(members, sent["prefix_lens"].int(), sent["prefix_starts"].int())
        duplicates = None
        if "duplicated" in sent:
            duplicated = sent["duplicated"]
            duplicates = duplicated, sent["duplicate_blocks"] * block_size + positions[duplicated] % block_size
        return AttentionStep(
            cache=self.cache,
            backend=self.backend,
            num_decode=num_decode,
            slots=slots,
            decode_tables=tables[:num_decode],
            decode_lens=(positions[:num_decode] + 1).int(),
            prefill_tables=tables[num_decode:],
            decode_kv_lens=layout.kv_lens[:num_decode],
            query_lens=layout.query_lens[num_decode:],
            kv_lens=layout.kv_lens[num_decode:],
            prefixes=prefixes,
            duplicates=duplicates,
        )

    def _gather_draws(self, sent: dict[str, Tensor], sampled_rows: Tensor, positions: Tensor) -> Draws:
        slots, state = sent["draw_slots"], self.state
        rows = sampled_rows[slots]
        return Draws(
            rows=slots,
            limited=sent["limited"] if len(sent["limited"]) else None,
            temperature=state.temperature[rows],
            top_p=state.top_p[rows],
            top_k=state.top_k[rows],
            seed=state.seed[rows],
            sample=state.sample[rows],
            position=positions[sent["sampled"][slots]] + 1,
            min_p=state.min_p[sent["min_p_rows"]] if "min_p_rows" in sent else None,
        )

    def _fetch(self, forward: Forward, tokens: Tensor, scores: Scores | None, logprobs: Scores | None) -> StepHandle:
        done = None
        if self.device.type == "cuda":
            host = torch.empty(len(tokens), dtype=torch.int64, pin_memory=True)
            tokens = host.copy_(tokens, non_blocking=True)
            scores = None if scores is None else scores.to_host()
            logprobs = None if logprobs is None else logprobs.to_host()
            done = torch.cuda.current_stream(self.device).record_event()
        return StepHandle(tokens, done, scores, logprobs, forward.is_captured, forward.num_padding)
