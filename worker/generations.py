"""The registry of running generations: what the engine owes, and who waits for each of them.

It is the worker's only memory of the engines' work, so one that dies is simply told everything again. New work goes to
the engine that owes the fewest tokens. The registry also makes equal Requests share one computation: whoever asks for a
key that is running, or that is finished but not yet committed, joins it.
"""

import logging
import math
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from protocol.faults import fault_point
from protocol.frames import Intake, LogitTerms, NewSequence, StepFrame
from protocol.logprobs import pack_logprobs
from protocol.packing import pack_ints
from protocol.requests import Answer, Failure, Request
from protocol.sampling import ResolvedParams
from worker.owner import Owner
from worker.pooled import pooled_answer
from worker.quarantine import MAX_DEATHS, Quarantine
from worker.scoring import ScoredPrompt, ScoreParts
from worker.text import StopWatch, Tokenizer

logger = logging.getLogger("millrace.worker")

_NO_TERMS = LogitTerms()
_seeds = random.Random()


class Piece(msgspec.Struct, frozen=True):
    """One sample that its owner waits for, until `deadline` (monotonic seconds) at most.

    `key` names its answer; None for a draw that cannot be repeated.
    """

    owner: Owner
    request: Request
    params: ResolvedParams
    sample: int
    key: bytes | None
    deadline: float | None = None


class Generation(msgspec.Struct, eq=False):
    """One Sequence in the engine with everything known about it here."""

    seq_id: int
    prompt_ids: list[int]
    params: ResolvedParams
    max_tokens: int  # what the context leaves of params.max_tokens
    stop_token_ids: tuple[int, ...]
    sample: int
    seed: int
    key: bytes | None
    waiters: list[Piece]  # all with this key
    output_ids: list[int] = []
    logprobs: list[bytes] = []  # as in StepFrame, one per output token when asked for
    watch: StopWatch | None = None
    score: ScoreParts | None = None  # of the prompt, when asked for
    pooled: bytes | None = None  # as in StepFrame, from an engine that embeds or classifies
    engine: int = 0  # its number
    priority: int = 0  # as in NewSequence, of the most urgent who waits

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + self.max_tokens

    def is_kept(self, answer: Answer) -> bool:
        """Whether the answer is one for everybody: not if this engine's context cut it short of what was asked for."""
        return answer.finish_reason == "stop" or self.max_tokens == self.params.max_tokens

    def start_over(self, tokenizer: Tokenizer) -> None:
        """Before the first token, also of a new engine."""
        self.output_ids.clear()
        self.logprobs.clear()
        if self.score is not None:
            self.score.clear()
        stop = self.params.stop
        self.watch = StopWatch(tokenizer, self.prompt_ids, stop, self.params.min_tokens) if stop else None

    def to_wire(self, sample_of: int | None = None) -> NewSequence:
        params, deadlines = self.params, [piece.deadline for piece in self.waiters if piece.deadline is not None]
        terms = LogitTerms(
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            min_tokens=params.min_tokens,
        )
        return NewSequence(
            seq_id=self.seq_id,
            token_ids=b"" if sample_of is not None else pack_ints(self.prompt_ids),
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=self.seed,
            sample=self.sample,
            min_p=params.min_p,
            terms=None if terms == _NO_TERMS else terms,
            logprobs=params.logprobs,
            sample_of=sample_of,
            score_from=-1 if self.score is None else self.score.start,
            num_top=params.prompt_logprobs or 0,
            deadline=time.time() - time.monotonic() + min(deadlines) if deadlines else None,
            priority=self.priority,
            tenant=self.waiters[0].owner.tenant,
            job=self.waiters[0].owner.job_id,
        )


#: A generation that is finished, with what it came to.
Done = tuple[Generation, Answer | Failure]


def intake_of(generations: Iterable[Generation]) -> Intake:
    """All of them, a prompt that several have in common sent with the first alone."""
    firsts: dict[int, int] = {}  # seq_id by the prompt's list: samples of one Request share it
    added: list[NewSequence] = []
    for generation in generations:
        first = firsts.setdefault(id(generation.prompt_ids), generation.seq_id)
        added.append(generation.to_wire(None if first == generation.seq_id else first))
    return Intake(add=added)


class Generations:
    """Thread-safe. `send` reaches an engine by its number; `on_done` gets what is finished, outside the lock."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        send: Callable[[int, Intake], None],
        on_done: Callable[[list[Done]], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._send = send
        self._on_done = on_done
        #: Told of keys that are not computed any more.
        self.on_given_up: Callable[[list[bytes]], None] = lambda keys: None
        self._lock = threading.RLock()
        self._live: dict[int, Generation] = {}
        self._by_key: dict[bytes, Generation] = {}
        self._uncommitted: dict[bytes, Answer] = {}
        self._next_seq_id = 1
        self._first_deadline = math.inf  # of all who wait, or earlier
        self._loads: Counter[int] = Counter()  # tokens, as in num_tokens, by engine
        self._down: set[int] = set()  # engines that have died and are not back
        self.max_aboard = 1  # Sequences that an engine runs at once
        self._quarantines: defaultdict[int, Quarantine] = defaultdict(lambda: Quarantine(self.max_aboard))
        self.num_engines = 1
        self.labels: tuple[str, ...] = ()  # of the classes that engines tell apart
        # Promised to the engines and not finished, by priority; tokens are prompts and the outputs they may have.
        self._num_live: Counter[int] = Counter()
        self._num_tokens: Counter[int] = Counter()
        # What engines have reported in all.
        self.num_computed_tokens = 0
        self.num_prefix_hit_tokens = 0
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_captured_steps = 0
        self.num_step_rows = 0
        self.num_padding_tokens = 0
        self.host_gap_s = 0.0
        self.num_free_blocks: int | None = None  # of the engine that reported last

    @property
    def num_live(self) -> int:
        return len(self._live)

    def owes(self, engine: int) -> bool:
        """Whether the engine has work."""
        return self._loads[engine] > 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens.total()

    def promised(self, priority: int) -> tuple[int, int]:
        """Sequences that are owed of this and more urgent priorities, and their tokens."""
        num_live, num_tokens = self._num_live, self._num_tokens
        ranks = [rank for rank in list(num_live) if rank <= priority]
        return sum(num_live[rank] for rank in ranks), sum(num_tokens[rank] for rank in ranks)

    def has(self, key: bytes) -> bool:
        """Whether this answer is being computed, or is there and not yet committed."""
        with self._lock:
            return key in self._by_key or key in self._uncommitted

    def join(self, piece: Piece) -> Answer | bool:
        """The Answer if it is finished but not yet committed; else whether an equal generation is running."""
        with self._lock:
            assert piece.key is not None
            if (answer := self._uncommitted.get(piece.key)) is not None:
                return answer
            if (running := self._by_key.get(piece.key)) is None:
                return False
            self._wait_for(running, piece)
            return True

    def add(self, pieces: Iterable[tuple[Piece, list[int] | ScoredPrompt]], context_tokens: int) -> None:
        """Start a generation for each (piece, prompt token ids); pieces with equal keys share one.

        Where a prompt's scores are asked for, they begin with its second token or where a ScoredPrompt says.
        """
        added: defaultdict[int, list[Generation]] = defaultdict(list)
        engines: dict[int, int] = {}  # by prompt: the samples of a Request share their prompt's blocks
        with self._lock:
            for piece, prompt in pieces:
                if piece.owner.is_abandoned:
                    continue
                if piece.key is not None and (twin := self._by_key.get(piece.key)) is not None:
                    self._wait_for(twin, piece)
                    continue
                generation = self._make(piece, prompt, context_tokens)
                self._wait_for(generation, piece)
                generation.engine = engines.setdefault(id(prompt), self._least_loaded())
                added[generation.engine].append(generation)
                self._loads[generation.engine] += generation.num_tokens
                self._live[generation.seq_id] = generation
                self._count_live(generation, 1)
                if piece.key is not None:
                    self._by_key[piece.key] = generation
            for engine, theirs in added.items():
                self._tell(engine, self._quarantines[engine].add(generation.seq_id for generation in theirs))

    def _wait_for(self, generation: Generation, piece: Piece) -> None:
        generation.waiters.append(piece)
        if piece.deadline is not None:
            self._first_deadline = min(self._first_deadline, piece.deadline)
        if piece.owner.priority < generation.priority:
            self._rank([generation])

    def _rank(self, generations: Iterable[Generation]) -> None:
        """Each is as urgent as the most urgent who waits for it."""
        by_engine: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for generation in generations:
            priority = min(piece.owner.priority for piece in generation.waiters)
            if priority != generation.priority:
                self._count_live(generation, -1)
                generation.priority = priority
                self._count_live(generation, 1)
                by_engine[generation.engine].append((generation.seq_id, priority))
        for engine, urge in by_engine.items():
            # Ignored where the engine has not been told of it yet.
            self._send(engine, Intake(urge=urge))

    def _count_live(self, generation: Generation, sign: int) -> None:
        self._num_live[generation.priority] += sign
        self._num_tokens[generation.priority] += sign * generation.num_tokens

    def _tell(self, engine: int, seq_ids: list[int]) -> None:
        if seq_ids:
            self._send(engine, intake_of(self._live[seq_id] for seq_id in seq_ids))

    def _least_loaded(self) -> int:
        """The engine with the fewest outstanding tokens; one that is down only when all are."""
        if self.num_engines == 1:
            return 0
        return min(range(self.num_engines), key=lambda engine: (engine in self._down, self._loads[engine]))

    def _make(self, piece: Piece, prompt: list[int] | ScoredPrompt, context_tokens: int) -> Generation:
        params = piece.params
        prompt_ids, start = (prompt.token_ids, prompt.start) if isinstance(prompt, ScoredPrompt) else (prompt, 1)
        self._next_seq_id += 1
        generation = Generation(
            seq_id=self._next_seq_id,
            prompt_ids=prompt_ids,
            params=params,
            max_tokens=min(params.max_tokens, context_tokens - len(prompt_ids)),
            stop_token_ids=params.stop_token_ids + (() if params.ignore_eos else self._stop_token_ids),
            sample=piece.sample,
            seed=_seeds.getrandbits(63) if params.seed is None else params.seed,
            key=piece.key,
            waiters=[],
            score=None if params.prompt_logprobs is None else ScoreParts(start),
            priority=piece.owner.priority,
        )
        generation.start_over(self._tokenizer)
        return generation

    def _count(self, frame: StepFrame) -> None:
        self.num_steps += frame.num_rows > 0
        self.num_captured_steps += frame.is_captured
        self.num_step_rows += frame.num_rows
        self.num_padding_tokens += frame.num_padding_tokens
        self.host_gap_s += frame.host_gap_s
        self.num_free_blocks = frame.num_free_blocks

    def on_step(self, frame: StepFrame) -> None:
        """Apply one step's tokens; finished generations leave the registry."""
        done: list[Done] = []
        cut: list[tuple[Generation, int]] = []
        logprobs = dict(frame.logprobs)
        fault_point("tokens")
        with self._lock:
            for part in frame.scores:
                scored = self._live.get(part.seq_id)
                if scored is not None and scored.score is not None:
                    scored.score.parts.append(part)
            for seq_id, values in frame.pooled:
                if (generation := self._live.get(seq_id)) is not None:
                    generation.pooled = values
            seq_ids = np.frombuffer(frame.seq_ids, dtype="<i8").tolist()
            for seq_id, token in zip(seq_ids, np.frombuffer(frame.token_ids, dtype="<i4").tolist(), strict=True):
                generation = self._live.get(seq_id)
                if generation is None:
                    continue
                generation.output_ids.append(token)
                if generation.params.logprobs is not None:
                    generation.logprobs.append(logprobs[seq_id])
                watch = generation.watch
                if watch is not None and token not in generation.stop_token_ids and watch.push(token):
                    cut.append((generation, len(generation.output_ids)))
                    done.append((generation, self._answer(generation, "stop", watch.text, watch.num_kept)))
                    self._remove(generation)
            self.num_computed_tokens += frame.num_scheduled_tokens
            self.num_prefix_hit_tokens += frame.num_prefix_hit_tokens
            self.num_preemptions += frame.num_preemptions
            self._count(frame)
            for seq_id, reason, num_tokens in frame.finished:
                if (generation := self._live.get(seq_id)) is None:
                    continue
                if generation.pooled is not None:
                    done.append((generation, self._pooled_answer(generation, generation.pooled)))
                    self._remove(generation)
                    continue
                del generation.output_ids[num_tokens:]
                has_stop_token = reason == "stop" and generation.output_ids[-1] in generation.stop_token_ids
                shown = generation.output_ids[:-1] if has_stop_token else generation.output_ids
                text = self._tokenizer.decode(generation.prompt_ids, shown)
                done.append((generation, self._answer(generation, reason, text, len(shown))))
                self._remove(generation)
            for seq_id, message in frame.refused:
                if (generation := self._live.get(seq_id)) is not None:
                    done.append((generation, Failure("engine_refused", message)))
                    self._remove(generation)
            for generation, outcome in done:
                if generation.key is not None and isinstance(outcome, Answer) and generation.is_kept(outcome):
                    self._uncommitted[generation.key] = outcome
        self._end_in_engines(cut)
        if done:
            self._on_done(done)

    def committed(self, keys: Iterable[bytes]) -> None:
        """These answers can be found in the database from now on."""
        with self._lock:
            for key in keys:
                self._uncommitted.pop(key, None)

    def resend(self, connect: Callable[[], None], engine: int = 0) -> None:
        """Tell a new engine all that its predecessor owed; outputs start again, the same where they are repeatable.

        `connect` opens the way to it under the lock, so that no Sequence is sent twice.
        """
        with self._lock:
            connect()
            self._down.discard(engine)
            for generation in self._live.values():
                if generation.engine == engine:
                    generation.start_over(self._tokenizer)
            self._tell(engine, self._quarantines[engine].restart())

    def on_engine_death(self, engine: int = 0) -> None:
        """Find out who may be to blame; one that is ends as a failure. New work goes to other engines meanwhile."""
        guilty: Generation | None = None
        with self._lock:
            self._down.add(engine)
            started = {g.seq_id for g in self._live.values() if g.engine == engine and g.output_ids}
            seq_id = self._quarantines[engine].on_death(started)
            if seq_id is not None:
                guilty = self._live[seq_id]
                self._forget(guilty)
                self._quarantines[engine].remove([seq_id])
        if guilty is not None:
            message = (
                f"the engine died {MAX_DEATHS} times or more with this Request in it, the last time with nothing else"
            )
            self._on_done([(guilty, Failure("engine_died", message))])

    def abandon(self, *owners: Owner) -> None:
        """They wait no longer: nothing is started for them, and what nobody else waits for is cancelled."""
        with self._lock:
            for owner in owners:
                owner.abandon()
            for generation in self._live.values():
                generation.waiters = [waiter for waiter in generation.waiters if not waiter.owner.is_abandoned]
            self._let_go()

    @property
    def first_deadline(self) -> float:
        """Of all who wait, in monotonic seconds, or an earlier time; infinity: there is none."""
        return self._first_deadline

    def expire(self, now: float) -> list[Piece]:
        """The pieces whose deadline has passed, which wait no longer; what nobody else waits for is cancelled."""
        expired: list[Piece] = []
        with self._lock:
            if now < self._first_deadline:
                return expired
            self._first_deadline = math.inf
            for generation in self._live.values():
                deadlines = [math.inf if piece.deadline is None else piece.deadline for piece in generation.waiters]
                waiters = list(zip(generation.waiters, deadlines, strict=True))
                expired += [piece for piece, deadline in waiters if deadline <= now]
                generation.waiters = [piece for piece, deadline in waiters if deadline > now]
                self._first_deadline = min([self._first_deadline, *(at for at in deadlines if at > now)])
            self._let_go()
        return expired

    def _let_go(self) -> None:
        """Some wait no longer: what nobody waits for is cancelled, what others wait for is as urgent as they are."""
        self._cancel([generation for generation in self._live.values() if not generation.waiters])
        self._rank(self._live.values())

    def _cancel(self, generations: list[Generation]) -> None:
        """The engine frees their blocks before its next step."""
        by_engine: defaultdict[int, list[int]] = defaultdict(list)
        for generation in generations:
            self._forget(generation)
            by_engine[generation.engine].append(generation.seq_id)
        self._end_in_engines([(generation, 0) for generation in generations])
        # Only then the next ones, of which none is among these.
        for engine, seq_ids in by_engine.items():
            self._tell(engine, self._quarantines[engine].remove(seq_ids))
        if keys := [generation.key for generation in generations if generation.key is not None]:
            self.on_given_up(keys)

    def _end_in_engines(self, ended: list[tuple[Generation, int]]) -> None:
        """Each with the number of output tokens to keep."""
        by_engine: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for generation, num_kept in ended:
            by_engine[generation.engine].append((generation.seq_id, num_kept))
        for engine, finish in by_engine.items():
            self._send(engine, Intake(finish=finish))

    def _answer(self, generation: Generation, reason: str, text: str, num_shown: int) -> Answer:
        """`num_shown` output tokens are those of the text."""
        logprobs = None
        if generation.params.logprobs is not None:
            shown = generation.output_ids[:num_shown]
            logprobs = pack_logprobs(shown, generation.logprobs[:num_shown], self._tokenizer.token_bytes)
        return Answer(
            text=text,
            finish_reason="stop" if reason == "stop" else "length",
            prompt_tokens=len(generation.prompt_ids),
            completion_tokens=len(generation.output_ids),
            logprobs=logprobs,
            score=None
            if generation.score is None
            else generation.score.pack(generation.prompt_ids, self._tokenizer.token_bytes),
        )

    def _pooled_answer(self, generation: Generation, values: bytes) -> Answer:
        return pooled_answer(values, self.labels, generation.params, len(generation.prompt_ids))

    def _remove(self, generation: Generation) -> None:
        """Ended while its engine lives, which may now have the next ones."""
        self._forget(generation)
        self._tell(generation.engine, self._quarantines[generation.engine].remove([generation.seq_id]))

    def _forget(self, generation: Generation) -> None:
        del self._live[generation.seq_id]
        self._count_live(generation, -1)
        self._loads[generation.engine] -= generation.num_tokens
        if generation.key is not None:
            del self._by_key[generation.key]
