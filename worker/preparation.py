"""From Requests to generations: parameters resolved, known answers found, prompts tokenized, misfits refused."""

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from protocol.errors import DatabaseUnavailable, InvalidRequest
from protocol.frames import EngineReady
from protocol.requests import Answer, Failure, Kind, Request, Result, answer_key, deadline_exceeded
from protocol.sampling import TRUNCATE_LEFT, ResolvedParams, SamplingParams
from storage.answers import AnswerCache, find_answers
from storage.flights import Flights
from storage.ledger import Ledger
from worker.defaults import ModelDefaults
from worker.followers import Followers
from worker.generations import Generations, Piece
from worker.owner import Owner
from worker.pooled import check_kind, samples_of
from worker.scoring import ScoredPrompt, encode_scored
from worker.text import Oversize, Tokenizer
from worker.truncation import keep_end, of_token_ids

logger = logging.getLogger("millrace.worker")

UNSET_PARAMS = SamplingParams()
#: Seconds without another look into a database that is away, for those who can do without: each try takes a second.
_LEDGER_REST_S = 5.0


#: What becomes of a Request's text.
Encoded = list[int] | ScoredPrompt | Failure | Oversize

_encode = msgspec.msgpack.Encoder().encode


class Preparation:
    """Thread-safe. `context_tokens` is the longest prompt and output together that the engine can hold; `on_deadline`
    is told of the first deadline (monotonic seconds) among what it starts."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        cache: AnswerCache,
        tokenizer: Tokenizer,
        defaults: ModelDefaults,
        engine: EngineReady,
        context_tokens: int,
        generations: Generations,
        flights: Flights,
        on_deadline: Callable[[float], None],
    ) -> None:
        self._ledger = ledger
        self._cache = cache
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._engine = engine
        self._context_tokens = context_tokens
        self._generations = generations
        self._no_ledger_until = 0.0
        self._on_deadline = on_deadline
        self._flights = flights
        self.followers = Followers(ledger, cache, flights, settle=_settle_known, start=self._start)

    def run(
        self,
        owner: Owner,
        requests: Iterable[Request],
        job_params: SamplingParams = UNSET_PARAMS,
        done: Collection[tuple[int, int]] = (),
        *,
        apart: bool = False,
    ) -> None:
        """Afterwards every Result of the Requests is on its way to the owner, but for those of the (line, sample) that
        are `done`. With `apart` a Request that cannot be prepared for a fault of ours fails alone. Raises
        DatabaseUnavailable."""
        pieces, failures = self._pieces(owner, requests, job_params, done)
        owner.expect(len(pieces) + len(failures))
        for request, failure in failures:
            owner.settle(failed(request, failure, None, 0, owner))
        sound = self._sound(pieces) if apart else pieces
        unknown = self._serve_known(_in_time(sound))
        self._start(unknown)

    def _sound(self, pieces: list[Piece]) -> list[Piece]:
        """Those that can be prepared; the others end here."""
        sound: list[Piece] = []
        for line, of_line in itertools.groupby(pieces, key=lambda piece: piece.request.line):
            group = list(of_line)
            try:
                self._cut(group, self._encode(group))
                sound += group
            except Exception as error:
                logger.exception("the request of line %d cannot be prepared", line)
                reason = f"the worker failed at this twice: {type(error).__name__}; its log says where"
                failure = Failure("internal_error", reason)
                for each in group:
                    each.owner.settle(failed(each.request, failure, each.params, each.sample, each.owner))
        return sound

    def _pieces(
        self,
        owner: Owner,
        requests: Iterable[Request],
        job_params: SamplingParams,
        done: Collection[tuple[int, int]],
    ) -> tuple[list[Piece], list[tuple[Request, Failure]]]:
        pieces: list[Piece] = []
        failures: list[tuple[Request, Failure]] = []
        resolved: dict[tuple[bool, bytes], ResolvedParams] = {}  # most Requests ask for the same
        for request in requests:
            try:
                check_kind(request, self._engine)
                params = self._resolve(request, job_params, resolved)
                check_token_ids(request, params, self._engine.vocab_size)
            except InvalidRequest as error:
                if (request.line, 0) not in done:
                    failures.append((request, Failure(error.code, error.message)))
                continue
            deadline = _deadline(owner, request.timeout_s(job_params))
            for sample, each in enumerate(samples_of(request, params.n)):
                if (request.line, sample) not in done:
                    key = self._key(owner, each, params, sample)
                    pieces.append(Piece(owner, each, params, sample, key, deadline))
        return pieces, failures

    def _resolve(
        self, request: Request, job_params: SamplingParams, resolved: dict[tuple[bool, bytes], ResolvedParams]
    ) -> ResolvedParams:
        """Raises InvalidRequest. `resolved` holds what was found for others of the same Job."""
        if request.kind != "generate":
            return self._defaults.resolve(request, job_params, self._context_tokens)
        key = (request.messages is not None, _encode(request.params))
        if (params := resolved.get(key)) is None:
            params = resolved[key] = self._defaults.resolve(request, job_params, self._context_tokens)
        return params

    def _key(self, owner: Owner, request: Request, params: ResolvedParams, sample: int) -> bytes | None:
        if not params.is_cacheable:
            return None
        return answer_key(owner.tenant, self._engine.fingerprint, request, params, sample)

    def _serve_known(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Settles what is known and joins what is running; the rest comes back.

        Running generations are asked first: one that ends meanwhile stays joinable until its answer can be found in
        the database, so that no moment is left in which an answer is nowhere.
        """
        unknown: list[Piece] = []
        lookups: dict[bytes, list[Piece]] = {}
        for piece in pieces:
            if piece.key is None:
                unknown.append(piece)
            elif (joined := self._generations.join(piece)) is False:
                lookups.setdefault(piece.key, []).append(piece)
            elif isinstance(joined, Answer):
                _settle_known(piece, joined)
        answers = self._cache.get_many(list(lookups))
        missing = [key for key in lookups if key not in answers]
        needs_ledger = any(piece.owner.needs_ledger for piece in pieces)
        # Claimed before the database is asked: what another worker lets go of is there by then. Whoever waits for a
        # reply does not wait for another worker's turn.
        held = self._flights.claim(missing) if needs_ledger else set()
        try:
            found = self._find(missing, needs_ledger)
        except BaseException:
            self._flights.release([key for key in missing if key not in held])
            raise
        self._flights.release([key for key in found if key not in held])
        answers |= found
        for key, twins in lookups.items():
            if (answer := answers.get(key)) is not None:
                for piece in twins:
                    _settle_known(piece, answer)
            elif key in held:
                self.followers.add(key, twins)
            else:
                unknown.extend(twins)
        self._note_deadlines(pieces)
        return unknown

    def _note_deadlines(self, pieces: Iterable[Piece]) -> None:
        """Once they wait where they can be ended."""
        first = min((piece.deadline for piece in pieces if piece.deadline is not None), default=None)
        if first is not None:
            self._on_deadline(first)

    def _find(self, keys: list[bytes], needs_ledger: bool) -> dict[bytes, Answer]:
        if not needs_ledger and time.monotonic() < self._no_ledger_until:
            return {}
        try:
            return find_answers(self._ledger, keys)
        except DatabaseUnavailable as error:
            if needs_ledger:
                raise
            self._no_ledger_until = time.monotonic() + _LEDGER_REST_S
            logger.warning("the database is away, so what it knows is computed again: %s", error)
            return {}

    def _start(self, pieces: Sequence[Piece]) -> None:
        try:
            self._start_each(pieces)
        finally:
            # Whatever has not become a generation is computed by nobody: others must not wait for it.
            keys = {piece.key for piece in pieces if piece.key is not None}
            self._flights.release([key for key in keys if not self._generations.has(key)])

    def _start_each(self, pieces: Sequence[Piece]) -> None:
        encoded = self._encode(pieces)
        ready: list[tuple[Piece, list[int] | ScoredPrompt]] = []
        cut = self._cut(pieces, encoded)
        if cut:
            # What is left of them may be known, and fits.
            self._start(self._serve_known(list(cut.values())))
        for piece in pieces:
            if id(piece) in cut:
                continue
            ids = encoded[id(piece.request)]
            if not isinstance(ids, Failure):
                most = self._most_tokens(piece.request)
                if isinstance(ids, Oversize):
                    size = f"{ids.num_characters} characters, which are {ids.num_tokens} tokens or more"
                    ids = self._too_long(size, most, piece.request.kind)
                elif (num_tokens := len(ids if isinstance(ids, list) else ids.token_ids)) > most:
                    ids = self._too_long(f"{num_tokens} tokens", most, piece.request.kind)
            if not isinstance(ids, Failure):
                ready.append((piece, ids))
            else:
                piece.owner.settle(failed(piece.request, ids, piece.params, piece.sample, piece.owner))
        self._generations.add(ready, self._context_tokens)
        self._note_deadlines(piece for piece, _ in ready)

    def _encode(self, pieces: Sequence[Piece]) -> dict[int, Encoded]:
        """By the Request's identity: each is tokenized once, also when it has several samples."""
        requests = {id(piece.request): piece.request for piece in pieces}
        # Of these the end is kept, whatever their length.
        cut = {id(piece.request) for piece in pieces if piece.params.too_long == TRUNCATE_LEFT}
        generating = {key: request for key, request in requests.items() if request.kind != "score"}
        tokenizer = self._tokenizer

        def most(request: Request) -> int | None:
            return None if id(request) in cut else self._most_tokens(request)

        encoded: dict[int, Encoded] = dict(
            zip(generating, tokenizer.encode(list(generating.values()), most), strict=True)
        )
        for key in requests.keys() - generating.keys():
            request = requests[key]
            whole = request.prompt or f"{request.context or ''}{request.continuation or ''}"
            encoded[key] = tokenizer.oversize(whole, self._most_tokens(request)) or encode_scored(
                request, tokenizer.encode_text, tokenizer.prefix_token_id
            )
        return encoded

    def _most_tokens(self, request: Request) -> int:
        """Of its prompt. What is not generated needs no room for an answer."""
        return self._context_tokens - (request.kind == "generate")

    def _cut(self, pieces: Sequence[Piece], encoded: Mapping[int, Encoded]) -> dict[int, Piece]:
        """By the piece's identity: those that are too long and may lose their beginning, as what is left of them."""
        requests: dict[int, Request] = {}
        cut: dict[int, Piece] = {}
        for piece in pieces:
            ids = encoded[id(piece.request)]
            if piece.params.too_long != TRUNCATE_LEFT or not isinstance(ids, list):
                continue
            kept = keep_end(ids, piece.params.max_tokens, self._context_tokens, self._tokenizer.bos_token_id)
            if kept is ids:
                continue
            request = requests.setdefault(id(piece.request), of_token_ids(piece.request, kept))
            params = msgspec.structs.replace(piece.params, truncated_tokens=len(ids) - len(kept))
            key = self._key(piece.owner, request, params, piece.sample)
            cut[id(piece)] = msgspec.structs.replace(piece, request=request, params=params, key=key)
        return cut

    def _too_long(self, size: str, most: int, kind: Kind) -> Failure:
        limit, room = "of prompt and answer together, so at most {most} of prompt", "KV_TOKENS"
        way_out = f"Shorten the prompt, let its beginning go with too_long {TRUNCATE_LEFT}"
        if kind != "generate":
            limit, way_out = "of prompt", "Shorten the prompt"
        if kind in ("embed", "classify"):
            limit, room = "in one step, which holds the whole text", "MAX_BATCH_TOKENS"
        return Failure(
            "prompt_too_long",
            f"the prompt has {size}; this engine holds {self._context_tokens} {limit.format(most=most)}. "
            f"{way_out}, or serve the model with a larger MILLRACE_ENGINE_MAX_MODEL_LEN or "
            f"MILLRACE_ENGINE_{room} where its configuration allows it and run the same with --retry-errors",
        )


def _in_time(pieces: list[Piece]) -> list[Piece]:
    """Those whose deadline has not passed yet; the others end here."""
    now = time.monotonic()
    late = [piece for piece in pieces if piece.deadline is not None and piece.deadline <= now]
    for piece in late:
        piece.owner.settle(too_late(piece))
    return [piece for piece in pieces if piece.deadline is None or piece.deadline > now] if late else pieces


def check_token_ids(request: Request, params: ResolvedParams, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first token id that the model does not have."""
    for name, ids in (
        ("prompt", request.prompt_token_ids or ()),
        *(("input", each) for each in request.inputs or () if not isinstance(each, str)),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(i for i in ids if not 0 <= i < vocab_size)
            raise InvalidRequest(
                "invalid_token",
                f"{name} has the token id {wrong}: this model's are from 0 to {vocab_size - 1}",
            )


def _settle_known(piece: Piece, answer: Answer) -> None:
    piece.owner.settle(answered(piece, answer, is_cached=True))


def answered(piece: Piece, answer: Answer, *, is_cached: bool) -> Result:
    return Result(
        line=piece.request.line,
        sample=piece.sample,
        custom_id=piece.request.custom_id,
        carried=piece.request.carried,
        endpoint=piece.request.endpoint,
        answer=answer,
        is_cached=is_cached,
        params=piece.params,
        seconds=piece.owner.seconds,
    )


def _deadline(owner: Owner, timeout_s: float | None) -> float | None:
    """The owner's own or its Request's, whichever comes first."""
    deadlines = (owner.deadline, None if timeout_s is None else owner.submitted + timeout_s)
    return min((deadline for deadline in deadlines if deadline is not None), default=None)


def too_late(piece: Piece) -> Result:
    """Of a piece whose deadline has passed."""
    timeout_s = (piece.deadline or 0.0) - piece.owner.submitted
    return failed(piece.request, deadline_exceeded(timeout_s), piece.params, piece.sample, piece.owner)


def failed(request: Request, failure: Failure, params: ResolvedParams | None, sample: int, owner: Owner) -> Result:
    return Result.failed(request, failure, sample, params, owner.seconds)
