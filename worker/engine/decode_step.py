"""DecodeStep: one token of every running Sequence, from tensors that stay where they are.

Nothing in it depends on the host but the number of rows, so on CUDA it is captured as a graph, lm_head and sampler
included, once for each of a list of sizes; a step of fewer rows is filled up with rows of nobody. Where it is not
captured, or no graph of its size found room, the same code runs as it is, with exactly the rows there are.

Letters: D rows, V vocabulary, M blocks per table, X groups with a common prefix, P members of the largest.
"""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batching.shared_prefixes import MAX_MEMBERS, PrefixTiles
from worker.engine import attention
from worker.engine.attention import AttentionBackend, AttentionStep
from worker.engine.compiling import uncompiled
from worker.engine.graph_pool import Graph, GraphPool
from worker.engine.kernels.prefix_groups import PrefixGroups
from worker.engine.kv_cache import KVCache
from worker.engine.loader import LoadedModel
from worker.engine.row_state import RowState

log = logging.getLogger("millrace.engine")

#: Fewer rows share too little.
_LEAST_SHARING = 32
#: Rows between one captured size and the next, from so many rows on. Padding costs about as much as it adds rows.
_STRIDES = ((0, 2), (8, 8), (128, 16), (256, 32), (512, 64))


@dataclass(frozen=True, slots=True)
class Decoded:
    logits: Tensor  # (D, V)
    positions: Tensor  # (D,) int64
    tokens: Tensor | None  # (D,) int64, None where the caller is to sample
    num_padding: int = 0  # rows that were computed for nobody
    is_captured: bool = False  # replayed from a graph


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    decoded: Decoded  # of all its rows, once it is replayed


def graph_sizes(num_rows: int) -> list[int]:
    """At how many rows graphs are captured, so that up to `num_rows` can run; ascending."""
    sizes, size = [], 0
    while size < num_rows:
        size += next(stride for start, stride in reversed(_STRIDES) if size >= start)
        sizes.append(size)
    return sizes


def sharing_sizes(sizes: list[int]) -> list[int]:
    """Those of `sizes` that are captured with shared prefixes too: fewer, since each costs time at the start."""
    chosen: list[int] = []
    for size in sizes:
        if size >= _LEAST_SHARING and (not chosen or 3 * size >= 4 * chosen[-1]):
            chosen.append(size)
    return sorted({*chosen, sizes[-1]})


class DecodeStep:
    def __init__(
        self,
        loaded: LoadedModel,
        backend: AttentionBackend,
        cache: KVCache,
        state: RowState,
        graphs: GraphPool | None = None,
    ) -> None:
        """`graphs` is where `capture` takes the memory from; without it nothing is captured."""
        self._loaded = loaded
        self._backend = backend
        self._cache = cache
        self._state = state
        self._sizes = graph_sizes(state.nobody)
        self._sharing_sizes = sharing_sizes(self._sizes) if backend.shares_prefixes else []
        most, device = self._sizes[-1], loaded.device
        self._rows = torch.full((most,), state.nobody, dtype=torch.int64, device=device)
        self._host_rows = np.full(most, state.nobody, dtype=np.int64)
        self._prefixes = PrefixGroups(
            torch.full((max(most // 2, 1), MAX_MEMBERS), -1, dtype=torch.int32, device=device),
            torch.zeros(max(most // 2, 1), dtype=torch.int32, device=device),
            torch.zeros(most, dtype=torch.int32, device=device),
        )
        self._is_sharing = False
        self._last_tiles: PrefixTiles | None = None
        self._pool = graphs
        self._captured: dict[bool, dict[int, _Captured]] = {False: {}, True: {}}  # by size, the smallest first
        self._no_prefill = torch.zeros(0, state.max_blocks, dtype=torch.int32, device=loaded.device)

    @property
    def is_captured(self) -> bool:
        """A step needs nothing of the host but what `arrays` gives, and draws its tokens itself."""
        return self._pool is not None

    def arrays(self, rows: npt.NDArray[np.int64], tiles: PrefixTiles | None) -> dict[str, npt.NDArray[np.int64]]:
        """What the device does not know yet of the rows (D,) of the next step, and of what they share."""
        arrays, num = {}, len(rows)
        is_end = num == len(self._host_rows) or self._host_rows[num] == self._state.nobody
        if not is_end or not np.array_equal(self._host_rows[:num], rows):
            self._host_rows[:num] = rows
            self._host_rows[num:] = self._state.nobody
            arrays["decode_rows"] = self._host_rows
        self._is_sharing = tiles is not None
        if tiles is not None and not _are_equal(tiles, self._last_tiles):
            self._last_tiles = tiles
            arrays |= prefix_arrays(tiles, len(self._host_rows))
        return arrays

    def update(self, sent: dict[str, Tensor]) -> None:
        if "decode_rows" in sent:
            self._rows.copy_(sent["decode_rows"])
        if "prefix_lens" in sent:
            self._prefixes.members.view(-1).copy_(sent["prefix_members"])
            self._prefixes.lens.copy_(sent["prefix_lens"])
            self._prefixes.starts.copy_(sent["prefix_starts"])

    def forget(self) -> None:
        """What the device knows of rows is uncertain: a launch has failed."""
        self._host_rows.fill(-1)
        self._last_tiles = None

    def run(self, host_lens: npt.NDArray[np.int64]) -> Decoded:
        """The step of the rows last given to `arrays`; `host_lens` (D,) are tokens to attend to."""
        num_rows, is_sharing = len(host_lens), self._is_sharing
        if not self.is_captured:
            return self._forward(num_rows, host_lens, is_sharing)
        captured = self._captured[is_sharing]
        size = next((size for size in captured if size >= num_rows), None)
        if size is None:
            return self._forward(num_rows, None, is_sharing)
        captured[size].graph.replay()
        whole = captured[size].decoded
        assert whole.tokens is not None
        logits, positions, tokens = (x[:num_rows] for x in (whole.logits, whole.positions, whole.tokens))
        return Decoded(logits, positions, tokens, size - num_rows, is_captured=True)

    @torch.inference_mode()
    def capture(self) -> None:
        """All sizes, the largest first, so that the others find room in its memory; those that find none are left out.

        Leaves no trace in any row.
        """
        assert self._pool is not None
        started = time.perf_counter()
        for is_sharing, sizes in ((False, self._sizes), (True, self._sharing_sizes)):
            found: dict[int, _Captured] = {}
            for size in reversed(sizes):
                captured = self._pool.capture(partial(self._forward, size, None, is_sharing))
                if captured is not None:
                    graph, decoded = captured
                    found[size] = _Captured(graph, replace(decoded, logits=_borrowed(decoded.logits)))
            self._captured[is_sharing] = dict(sorted(found.items()))
        seconds = time.perf_counter() - started
        num_graphs = sum(map(len, self._captured.values()))
        log.info("decode captured in %d graphs up to %d rows in %.1f s", num_graphs, self._largest(False), seconds)
        if num_missing := len(self._sizes) + len(self._sharing_sizes) - num_graphs:
            log.warning(
                "the memory has no room for %d more graphs: decode of more than %d rows, or %d with a common prefix, "
                "runs without one, slower; lower engine.kv_tokens or engine.max_num_seqs",
                num_missing,
                self._largest(False),
                self._largest(True),
            )

    @torch.inference_mode()
    def rehearse(self, num_rows: int | None = None) -> None:
        """Steps of rows of nobody, as many as there may be, with a common prefix and without one, uncaptured: their
        kernels are built, their memory is seen."""
        for is_sharing in sorted({False, bool(self._sharing_sizes)}):
            self._forward(self._sizes[-1] if num_rows is None else num_rows, None, is_sharing)
            # Nothing wrote a token where kernels were only noted, and what lay there may be none of the vocabulary.
            self._state.last_token[self._state.nobody] = 0

    def _largest(self, is_sharing: bool) -> int:
        return max(self._captured[is_sharing], default=0)

    def _forward(self, num_rows: int, host_lens: npt.NDArray[np.int64] | None, is_sharing: bool) -> Decoded:
        """`host_lens` is None for a step that asks the host nothing, and samples by itself."""
        state, block_size = self._state, self._backend.block_size
        rows = self._rows[:num_rows]  # (D,)
        positions = state.length[rows]  # (D,)
        tables = state.block_table[rows]  # (D, M)
        blocks = tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
        none = np.empty(0, dtype=np.int64)
        shared, num_tiles = self._prefixes, max(num_rows // 2, 1)
        prefixes = PrefixGroups(shared.members[:num_tiles], shared.lens[:num_tiles], shared.starts[:num_rows])
        step = AttentionStep(
            cache=self._cache,
            backend=self._backend,
            num_decode=num_rows,
            slots=blocks * block_size + positions % block_size,
            decode_tables=tables,
            decode_lens=(positions + 1).int(),
            prefill_tables=self._no_prefill,
            decode_kv_lens=host_lens,
            query_lens=none,
            kv_lens=none,
            prefixes=prefixes if is_sharing else None,
        )
        with attention.running(step), uncompiled(num_rows == 1):
            logits = self._loaded.model(
                input_ids=state.last_token[rows].unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
            ).logits[0]
        state.length.index_copy_(0, rows, positions + 1)
        state.length[state.nobody :] = 0
        if host_lens is not None:
            return Decoded(logits, positions, None)
        tokens = state.draw(logits, rows, positions)
        state.last_token.index_copy_(0, rows, tokens)
        return Decoded(logits, positions, tokens)


def prefix_arrays(tiles: PrefixTiles, num_rows: int) -> dict[str, npt.NDArray[np.int64]]:
    """For the device, with room for whatever `num_rows` rows may share: a tile has two of them at least."""
    members = np.full((max(num_rows // 2, 1), MAX_MEMBERS), -1, dtype=np.int64)
    lens = np.zeros(len(members), dtype=np.int64)
    starts = np.zeros(num_rows, dtype=np.int64)
    members[: len(tiles.members)] = tiles.members
    lens[: len(tiles.lens)] = tiles.lens
    starts[: len(tiles.starts)] = tiles.starts
    return {"prefix_members": members.reshape(-1), "prefix_lens": lens, "prefix_starts": starts}


def _are_equal(one: PrefixTiles, other: PrefixTiles | None) -> bool:
    return other is not None and all(
        np.array_equal(a, b)
        for a, b in ((one.members, other.members), (one.lens, other.lens), (one.starts, other.starts))
    )


def _borrowed(x: Tensor) -> Tensor:
    """The same memory without a hold on it: graphs that share a pool may write there, and are replayed one by one."""
    storage = x.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), x.device, storage.nbytes())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, x.storage_offset(), x.shape, x.stride())
