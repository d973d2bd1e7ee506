"""Sampling in a few launches that ask the host nothing, for the inside of a CUDA graph; the sampler's twin on Triton.

`sampler.sample` is what it is held to: the same race with the same noise. A row that is greedy or draws from all tokens
is cut into pieces of the vocabulary. Of one with top_k, top_p or min_p, the largest logits of small parts give a bound
that few logits reach, and those few are sorted; where they are too many, or not all there is to draw from, one program
searches the row for the threshold, some of its bits at a time. Kernels leave rows that are not theirs at once, so
limits cost nothing where nobody sets them.

Letters: D rows, V vocabulary, S pieces of it, U parts, C candidates, R rows of the engine's state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens per piece: one piece is held in registers, to find its largest logit before it is compared.
_PIECE = 4096
_LIMITED_PIECE = 8192
#: Tokens per part, of which the largest logit is known; and candidates of a row at most.
_PART = 512
_MAX_CANDIDATES = 1024
#: Of the largest logits of parts, the one that bounds the candidates where top_p alone limits.
_BOUND_RANK = 200


def sample_rows(
    logits: Tensor,  # (D, V), the last dimension dense
    rows: Tensor,  # (D,) int64, places in the next six
    temperature: Tensor,  # (R,) float32, 0: greedy
    top_p: Tensor,  # (R,) float32
    top_k: Tensor,  # (R,) int64, 0: no limit
    min_p: Tensor,  # (R,) float32
    seed: Tensor,  # (R,) int64
    sample: Tensor,  # (R,) int64
    positions: Tensor,  # (D,) int64, of the tokens drawn
) -> Tensor:
    """Token ids (D,) int64."""
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    num_pieces = triton.cdiv(vocab_size, _PIECE)
    best_logits = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    best_noises = torch.empty_like(best_logits)
    best_ids = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_fast = torch.version.cuda is not None and not triton.knobs.runtime.interpret
    state = (rows, temperature, top_p, top_k, min_p, seed, sample, positions)
    num_parts = num_pieces * (_PIECE // _PART)
    part_tops = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)  # (D, U)
    bounds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    weights = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    counts = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    candidates = torch.empty(num_rows, _MAX_CANDIDATES, dtype=torch.int64, device=logits.device)  # (D, C)
    sizes = {"PIECE": _PIECE, "PART": _PART}
    limits = state[:5]
    _race_pieces[(num_rows, num_pieces)](
        logits,
        *state,
        best_logits,
        best_noises,
        best_ids,
        part_tops,
        logits.stride(0),
        vocab_size,
        num_pieces,
        **sizes,
        FAST=is_fast,
    )
    _finish_race[(num_rows,)](
        *limits,
        best_logits,
        best_noises,
        best_ids,
        part_tops,
        bounds,
        weights,
        counts,
        tokens,
        num_pieces,
        num_parts,
        PIECES=triton.next_power_of_2(num_pieces),
        PARTS=triton.next_power_of_2(num_parts),
        RANK=_BOUND_RANK,
    )
    _collect[(num_rows, num_pieces)](
        logits, *limits, best_logits, bounds, counts, candidates, logits.stride(0), vocab_size, num_pieces,
        PIECE=_PIECE, CANDIDATES=_MAX_CANDIDATES,
    )  # fmt: skip
    _race_candidates[(num_rows,)](
        *state, best_logits, weights, counts, candidates, tokens, num_pieces,
        PIECES=triton.next_power_of_2(num_pieces), CANDIDATES=_MAX_CANDIDATES, FAST=is_fast,
    )  # fmt: skip
    _race_limited[(num_rows,)](
        logits,
        *state,
        counts,
        tokens,
        logits.stride(0),
        vocab_size,
        PIECE=_LIMITED_PIECE,
        BITS=16 if logits.dtype == torch.bfloat16 else 32,
        FAST=is_fast,
        num_warps=16,
    )
    return tokens


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def _mix32(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _log(x, FAST: tl.constexpr):
    """FAST is within 2e-7 in 2 instructions, not in 16; an interpreter does not know it."""
    if FAST:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return log2 * 0.6931471805599453
    return tl.log(x)


@triton.jit
def _key(seed, sample, position):
    return _mix64(seed + _mix64(sample * -7046029254386353131 + _mix64(position)))


@triton.jit
def _noise(key, ids, FAST: tl.constexpr):
    """-log of the exponential variates of `ids`; see sampler.exponential."""
    low = key.to(tl.int32)
    high = (key >> 32).to(tl.int32)
    bits = _mix32(_mix32(ids * -1640531527 + low) ^ high)
    uniform = bits.to(tl.float32) + tl.where(bits < 0, 4294967296.0, 0.0)
    uniform = tl.minimum((uniform + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log1p(-u) by its series where 1 - u would lose what makes it small: there the winners are.
    u = tl.minimum(uniform, 0.125)
    series = 1.0 / 8 + u * (1.0 / 9)
    series = 1.0 / 6 + u * (1.0 / 7 + u * series)
    series = 1.0 / 4 + u * (1.0 / 5 + u * series)
    series = 1.0 / 2 + u * (1.0 / 3 + u * series)
    series = u * (1.0 + u * series)
    variate = tl.where(uniform < 0.125, series, -_log(1.0 - uniform, FAST))
    return -_log(variate, FAST)


@triton.jit
def _is_limited(row, temperature, top_p, top_k, min_p):
    limits = (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0) | (tl.load(min_p + row) > 0.0)
    return limits & (tl.load(temperature + row) > 0.0)


@triton.jit
def _race_pieces(
    logits,
    rows,
    temperature,
    top_p,
    top_k,
    min_p,
    seed,
    sample,
    positions,
    best_logits,
    best_noises,
    best_ids,
    part_tops,
    stride,
    vocab_size,
    num_pieces,
    PIECE: tl.constexpr,
    PART: tl.constexpr,
    FAST: tl.constexpr,
):
    i, piece = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + i)
    ids = piece * PIECE + tl.arange(0, PIECE)
    values = tl.load(logits + i.to(tl.int64) * stride + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    at = i * num_pieces + piece
    if _is_limited(row, temperature, top_p, top_k, min_p):
        # The piece's largest logit, what its tokens weigh beside it, and the largest of its parts.
        num: tl.constexpr = PIECE // PART
        highest = tl.max(values, axis=0)
        weight = tl.where(ids < vocab_size, tl.exp((values - highest) / tl.maximum(heat, 1e-5)), 0.0)
        tl.store(best_logits + at, highest)
        tl.store(best_noises + at, tl.sum(weight, axis=0))
        tops = tl.max(tl.reshape(values, (num, PART)), axis=1)
        tl.store(part_tops + at * num + tl.arange(0, num), tops)
        return
    noise = tl.zeros((PIECE,), tl.float32)
    scores = values
    if heat > 0.0:
        coolness = 1.0 / tl.maximum(heat, 1e-5)
        key = _key(tl.load(seed + row), tl.load(sample + row), tl.load(positions + i))
        noise = _noise(key, ids, FAST)
        scores = (values - tl.max(values, axis=0)) * coolness + noise
        scores = tl.where(ids < vocab_size, scores, -float("inf"))
    best = tl.argmax(scores, axis=0)
    is_best = tl.arange(0, PIECE) == best
    tl.store(best_logits + at, tl.sum(tl.where(is_best, values, 0.0), axis=0))
    tl.store(best_noises + at, tl.sum(tl.where(is_best, noise, 0.0), axis=0))
    tl.store(best_ids + at, piece * PIECE + best)


@triton.jit
def _finish_race(
    rows,
    temperature,
    top_p,
    top_k,
    min_p,
    best_logits,
    best_noises,
    best_ids,
    part_tops,
    bounds,
    weights,
    counts,
    tokens,
    num_pieces,
    num_parts,
    PIECES: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
):
    """The pieces' best, of a row without limits; of one with them, the bound of its candidates."""
    i = tl.program_id(0)
    row = tl.load(rows + i)
    pieces = tl.arange(0, PIECES)
    at = i * num_pieces + pieces
    values = tl.load(best_logits + at, mask=pieces < num_pieces, other=-float("inf"))
    heat = tl.maximum(tl.load(temperature + row), 1e-5)
    top = tl.max(values, axis=0)
    if _is_limited(row, temperature, top_p, top_k, min_p):
        # The rank-th largest of parts is no larger than the rank-th largest of all.
        parts = tl.arange(0, PARTS)
        tops = tl.load(part_tops + i * num_parts + parts, mask=parts < num_parts, other=-float("inf"))
        k = tl.load(top_k + row).to(tl.int32)
        rank = tl.where(k > 0, k, tl.minimum(RANK, num_parts))
        ordered = tl.sort(tops, descending=True)
        bound = tl.max(tl.where(parts == rank - 1, ordered, -float("inf")), axis=0)
        least_share = tl.load(min_p + row)
        if least_share > 0.0:
            # A little lower, for it is judged again with the plain sampler's arithmetic.
            by_share = top + heat * tl.log(least_share) - 1e-3 * (1.0 + tl.abs(top))
            bound = tl.maximum(tl.where(k > 0, bound, -float("inf")), by_share)
        sums = tl.load(best_noises + at, mask=pieces < num_pieces, other=0.0)
        tl.store(weights + i, tl.sum(tl.where(pieces < num_pieces, tl.exp((values - top) / heat) * sums, 0.0), axis=0))
        tl.store(bounds + i, bound)
        tl.store(counts + i, 0)
        return
    tl.store(counts + i, 0)
    scores = values
    if tl.load(temperature + row) > 0.0:
        noise = tl.load(best_noises + at, mask=pieces < num_pieces, other=0.0)
        scores = (values - top) / heat + noise
    best = tl.argmax(scores, axis=0)
    tl.store(tokens + i, tl.load(best_ids + i * num_pieces + best).to(tl.int64))


@triton.jit
def _collect(
    logits,
    rows,
    temperature,
    top_p,
    top_k,
    min_p,
    best_logits,
    bounds,
    counts,
    candidates,
    stride,
    vocab_size,
    num_pieces,
    PIECE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Logits that reach the bound, with their ids, in no order."""
    i, piece = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + i)
    if not _is_limited(row, temperature, top_p, top_k, min_p):
        return
    bound = tl.load(bounds + i)
    if tl.load(best_logits + i * num_pieces + piece) < bound:
        return
    ids = piece * PIECE + tl.arange(0, PIECE)
    values, order = _load_ordered(logits + i.to(tl.int64) * stride, ids, vocab_size, 32)
    is_there = ((ids < vocab_size) & (values >= bound)).to(tl.int32)
    first = tl.atomic_add(counts + i, tl.sum(is_there, axis=0))
    place = first + tl.cumsum(is_there, axis=0) - is_there
    packed = (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    tl.store(candidates + i * CANDIDATES + place, packed, mask=(is_there > 0) & (place < CANDIDATES))


@triton.jit
def _race_candidates(
    rows,
    temperature,
    top_p,
    top_k,
    min_p,
    seed,
    sample,
    positions,
    best_logits,
    weights,
    counts,
    candidates,
    tokens,
    num_pieces,
    PIECES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FAST: tl.constexpr,
):
    """Limits and race among the candidates, sorted; a row whose candidates are not enough has its count set to -1."""
    i = tl.program_id(0)
    row = tl.load(rows + i)
    if not _is_limited(row, temperature, top_p, top_k, min_p):
        return
    count = tl.load(counts + i)
    if count > CANDIDATES:
        tl.store(counts + i, -1)
        return
    places = tl.arange(0, CANDIDATES)
    lowest: tl.constexpr = -(1 << 63)
    packed = tl.load(candidates + i * CANDIDATES + places, mask=places < count, other=lowest)
    packed = tl.sort(packed, descending=True)
    order = (packed >> 32).to(tl.int32)
    ids = 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
    values = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    pieces = tl.arange(0, PIECES)
    tops = tl.load(best_logits + i * num_pieces + pieces, mask=pieces < num_pieces, other=-float("inf"))
    heat = tl.maximum(tl.load(temperature + row), 1e-5)
    score = tl.where(places < count, (values - tl.max(tops, axis=0)) / heat, -float("inf"))
    k, least_share = tl.load(top_k + row).to(tl.int32), tl.load(min_p + row)
    kept = places < count
    if least_share > 0.0:
        kept &= score >= tl.log(least_share)
    if k > 0:
        kept &= places < k
    share = tl.load(top_p + row)
    if share < 1.0:
        weight = tl.where(kept, tl.exp(score), 0.0)
        total = tl.sum(weight, axis=0)
        whole = total
        if (k == 0) & (least_share <= 0.0):
            whole = tl.load(weights + i)
            if total < share * whole:
                tl.store(counts + i, -1)
                return
        kept &= (tl.cumsum(weight, axis=0) - weight < share * whole) | (places == 0)
    key = _key(tl.load(seed + row), tl.load(sample + row), tl.load(positions + i))
    race = tl.where(kept, score + _noise(key, ids, FAST), -float("inf"))
    best = tl.argmax(race, axis=0)
    tl.store(tokens + i, tl.sum(tl.where(places == best, ids, 0), axis=0).to(tl.int64))


@triton.jit
def _load_ordered(logits, ids, vocab_size, BITS: tl.constexpr):
    """Values, and whole numbers in the same order: of 16 bits where that is all a logit has."""
    values = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    values += 0.0  # no negative zero, which would come before zero
    bits = values.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return values, order >> (32 - BITS)


@triton.jit
def _race_limited(
    logits,
    rows,
    temperature,
    top_p,
    top_k,
    min_p,
    seed,
    sample,
    positions,
    counts,
    tokens,
    stride,
    vocab_size: tl.constexpr,
    PIECE: tl.constexpr,
    BITS: tl.constexpr,
    FAST: tl.constexpr,
):
    """By threshold, for any limits."""
    i = tl.program_id(0)
    if tl.load(counts + i) >= 0:
        return
    row = tl.load(rows + i)
    logits += i.to(tl.int64) * stride
    heat = tl.maximum(tl.load(temperature + row), 1e-5)
    span = tl.arange(0, PIECE)

    highest = tl.full((PIECE,), -float("inf"), tl.float32)
    for start in range(0, vocab_size, PIECE):
        values, _ = _load_ordered(logits, start + span, vocab_size, BITS)
        highest = tl.maximum(highest, values)
    top = tl.max(highest, axis=0)
    # A score below it has less than min_p of the best one's probability; -inf without min_p.
    least_share = tl.load(min_p + row)
    lowest_score = tl.where(least_share > 0.0, tl.log(tl.maximum(least_share, 1e-38)), -float("inf"))

    # The k-th largest, two bits at a time, and how many of those equal to it belong to the k.
    least = tl.full((), -(1 << (BITS - 1)), tl.int32)
    num_equal = tl.full((), 2147483647, tl.int32)
    k = tl.load(top_k + row).to(tl.int32)
    if k > 0:
        for step in range(BITS // 2):
            unit = tl.full((), 1, tl.int32) << (BITS - 2 - 2 * step)
            one, two, three = least + unit, least + 2 * unit, least + 3 * unit
            n1, n2, n3 = tl.zeros((PIECE,), tl.int32), tl.zeros((PIECE,), tl.int32), tl.zeros((PIECE,), tl.int32)
            for start in range(0, vocab_size, PIECE):
                values, order = _load_ordered(logits, start + span, vocab_size, BITS)
                here = (start + span < vocab_size) & ((values - top) / heat >= lowest_score)
                n1 += (here & (order >= one)).to(tl.int32)
                n2 += (here & (order >= two)).to(tl.int32)
                n3 += (here & (order >= three)).to(tl.int32)
            if tl.sum(n3, axis=0) >= k:
                least = three
            elif tl.sum(n2, axis=0) >= k:
                least = two
            elif tl.sum(n1, axis=0) >= k:
                least = one
        above = tl.zeros((PIECE,), tl.int32)
        for start in range(0, vocab_size, PIECE):
            values, order = _load_ordered(logits, start + span, vocab_size, BITS)
            here = (start + span < vocab_size) & ((values - top) / heat >= lowest_score)
            above += (here & (order > least)).to(tl.int32)
        num_equal = k - tl.sum(above, axis=0)

    # The same for the probability mass that top_p asks for, among those left.
    share = tl.load(top_p + row)
    if share < 1.0:
        mass = tl.zeros((PIECE,), tl.float32)
        equal_mass = tl.zeros((PIECE,), tl.float32)
        equals = tl.zeros((PIECE,), tl.int32)
        for start in range(0, vocab_size, PIECE):
            values, order = _load_ordered(logits, start + span, vocab_size, BITS)
            score = (values - top) / heat
            here = (start + span < vocab_size) & (score >= lowest_score)
            weight = tl.where(here, tl.exp(score), 0.0)
            mass += tl.where(order > least, weight, 0.0)
            equal_mass += tl.where(order == least, weight, 0.0)
            equals += (here & (order == least)).to(tl.int32)
        num_there = tl.maximum(tl.sum(equals, axis=0), 1)
        num_equal = tl.minimum(num_equal, num_there)
        # All equals weigh the same; those beyond the k weigh nothing.
        kept_part = num_equal.to(tl.float32) / num_there.to(tl.float32)
        wanted = share * (tl.sum(mass, axis=0) + kept_part * tl.sum(equal_mass, axis=0))
        found = tl.full((), -(1 << (BITS - 1)), tl.int32)
        for step in range(BITS // 2):
            unit = tl.full((), 1, tl.int32) << (BITS - 2 - 2 * step)
            one, two, three = found + unit, found + 2 * unit, found + 3 * unit
            m1, m2, m3 = tl.zeros((PIECE,), tl.float32), tl.zeros((PIECE,), tl.float32), tl.zeros((PIECE,), tl.float32)
            for start in range(0, vocab_size, PIECE):
                values, order = _load_ordered(logits, start + span, vocab_size, BITS)
                score = (values - top) / heat
                here = (start + span < vocab_size) & (score >= lowest_score) & (order >= least)
                weight = tl.where(here, tl.exp(score), 0.0) * tl.where(order == least, kept_part, 1.0)
                m1 += tl.where(order >= one, weight, 0.0)
                m2 += tl.where(order >= two, weight, 0.0)
                m3 += tl.where(order >= three, weight, 0.0)
            if tl.sum(m3, axis=0) >= wanted:
                found = three
            elif tl.sum(m2, axis=0) >= wanted:
                found = two
            elif tl.sum(m1, axis=0) >= wanted:
                found = one
        before = tl.zeros((PIECE,), tl.float32)
        each = tl.zeros((PIECE,), tl.float32)
        for start in range(0, vocab_size, PIECE):
            values, order = _load_ordered(logits, start + span, vocab_size, BITS)
            score = (values - top) / heat
            here = (start + span < vocab_size) & (score >= lowest_score) & (order >= least)
            weight = tl.where(here, tl.exp(score), 0.0)
            before += tl.where(order > found, weight, 0.0)
            each = tl.maximum(each, tl.where(order == found, weight, 0.0))
        if found > least:
            num_equal = tl.full((), 2147483647, tl.int32)
        weight_each = tl.maximum(tl.max(each, axis=0), 1e-38)
        num_wanted = tl.ceil((wanted - tl.sum(before, axis=0)) / weight_each)
        num_equal = tl.minimum(num_equal, tl.maximum(tl.minimum(num_wanted, 1e9).to(tl.int32), 1))
        least = tl.maximum(least, found)

    key = _key(tl.load(seed + row), tl.load(sample + row), tl.load(positions + i))
    best_score = tl.full((), -float("inf"), tl.float32)
    best_id = tl.full((), 0, tl.int32)
    num_seen = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, PIECE):
        ids = start + span
        values, order = _load_ordered(logits, ids, vocab_size, BITS)
        score = (values - top) / heat
        here = (ids < vocab_size) & (score >= lowest_score)
        is_equal = (here & (order == least)).to(tl.int32)
        place = num_seen + tl.cumsum(is_equal, axis=0) - is_equal
        kept = here & ((order > least) | ((is_equal > 0) & (place < num_equal)))
        num_seen += tl.sum(is_equal, axis=0)
        race = tl.where(kept, score + _noise(key, ids, FAST), -float("inf"))
        piece_best = tl.max(race, axis=0)
        if piece_best > best_score:
            best_score = piece_best
            best_id = start + tl.argmax(race, axis=0).to(tl.int32)
    tl.store(tokens + i, best_id.to(tl.int64))
