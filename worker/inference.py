"""Inference: from Requests to their Results, for whoever owns them; knows neither queue nor leases.

It owns the tokenizer, the engines, the registry of what they owe, and the way to what is known already.
"""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from protocol.frames import EngineReady
from protocol.requests import Failure
from protocol.settings import Settings
from storage.answers import AnswerCache
from storage.flights import Flights
from storage.ledger import Ledger
from worker.deadline_watch import DeadlineWatch
from worker.defaults import read_model_defaults
from worker.engine_group import EngineGroup
from worker.generations import Done, Generations
from worker.owner import Owner
from worker.preparation import Preparation, answered, failed, too_late
from worker.text import Tokenizer

logger = logging.getLogger("millrace.worker")

#: What runs in an engine's process.
ENGINE_MODULE = "worker.engine.process"
#: Without a setting the intake holds what fills the KV cache this many times, and always this many full batches.
_INTAKE_KV_CACHES = 2
_INTAKE_BATCHES = 2
#: Answers that other workers compute and this one waits for at most: they cost it no engine that would slow it.
_MAX_FOLLOWERS = 4096


class Inference:
    """Once it has started, `preparation` takes work in. `on_room` is called from any thread when `has_room` may have
    changed; `on_fatal` when work cannot go on."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        cache: AnswerCache,
        flights: Flights,
        model_folder: Path,
        *,
        on_room: Callable[[], None],
        on_fatal: Callable[[str], None],
        engine_module: str = ENGINE_MODULE,
    ) -> None:
        self._settings = settings
        self._ledger, self._cache, self._flights = ledger, cache, flights
        self._model_folder = model_folder
        self._on_room, self._on_fatal = on_room, on_fatal
        self._deadlines = DeadlineWatch(self._expire)
        self._engines = EngineGroup(
            settings.engine,
            engine_module,
            settings.num_engines,
            settings.engine_start_seconds,
            settings.engine_hang_seconds,
            has_work=lambda engine: self._generations.owes(engine),
            on_ready=lambda engine, connect: self._generations.resend(connect, engine),
            on_step=lambda frame: self._generations.on_step(frame),
            on_death=lambda engine: self._generations.on_engine_death(engine),
            on_fatal=on_fatal,
        )

    def start(self) -> None:
        """Blocks until the engines are ready. Raises ConfigurationError or EngineDied."""
        self._engines.spawn()
        try:
            # Loading the tokenizer takes seconds too, and the engine does not need it.
            tokenizer = Tokenizer(self._model_folder)
            defaults = read_model_defaults(self._model_folder, tokenizer.eos_token_id)
            self._generations = Generations(tokenizer, defaults.stop_token_ids, self._engines.send, self._settle)
            self._generations.on_given_up = self._flights.release
            ready = self._engines.start()
            self.engine, self.num_engines = ready[0], len(ready)
            self._generations.num_engines = len(ready)
            self._generations.max_aboard = self.engine.max_num_seqs
            self._generations.labels = self.engine.labels
        except BaseException:
            self._engines.stop()
            raise
        self.preparation = Preparation(
            ledger=self._ledger,
            cache=self._cache,
            tokenizer=tokenizer,
            defaults=defaults,
            engine=self.engine,
            context_tokens=min(min(engine.max_model_len, engine.kv_tokens) for engine in ready),
            generations=self._generations,
            flights=self._flights,
            on_deadline=self._deadlines.note,
        )
        self._deadlines.start()
        self._intake_tokens = self._settings.intake_tokens or _INTAKE_KV_CACHES * sum(
            engine.kv_tokens for engine in ready
        )

    def stop(self) -> None:
        """Ends the engines; what they still owe is never settled."""
        self._deadlines.stop()
        self._engines.stop()

    def has_room(self, rank: int) -> bool:
        """Whether more work of this class could start soon: counted in tokens, and never less than some full batches.

        What is less urgent does not count: it gives way.
        """
        full_batches = _INTAKE_BATCHES * self.engine.max_num_seqs * self.num_engines
        if self.preparation.followers.num_waiting > _MAX_FOLLOWERS:
            return False
        num_live, num_tokens = self._generations.promised(rank)
        return num_live < full_batches or num_tokens < self._intake_tokens

    def abandon(self, *owners: Owner) -> None:
        """The owners wait no longer: what nobody else waits for is cancelled."""
        self._generations.abandon(*owners)
        self.preparation.followers.forget_abandoned()
        self._on_room()

    def committed(self, keys: Iterable[bytes]) -> None:
        """These answers can be found in the database from now on."""
        keys = list(keys)
        self._generations.committed(keys)
        self._flights.release(keys)

    def look_after_followers(self) -> None:
        """See to what other workers compute for this one too; to be called now and then. Raises DatabaseUnavailable."""
        self.preparation.followers.look()

    def info(self) -> dict[str, object]:
        """Facts for `inspect stats`."""
        ready: EngineReady = self.engine
        return {
            "model": self._settings.served_model,
            "also_serves": ", ".join(self._settings.served_models[1:]),
            "task": ready.task,
            "engines": self.num_engines,
            "device": ready.device,
            "dtype": ready.dtype,
            "quantization": ready.quantization,
            "layout": ready.layout,
            "attention": ready.attention_backend,
            "max_model_len": ready.max_model_len,
            "kv_tokens": ready.kv_tokens,
            "max_num_seqs": ready.max_num_seqs,
            "versions": ", ".join(f"{name} {version}" for name, version in ready.versions.items()),
            "running": self._generations.num_live,
            "followers": self.preparation.followers.num_waiting,
            "computed_tokens": self._generations.num_computed_tokens,
            "prefix_hit_tokens": self._generations.num_prefix_hit_tokens,
            "preemptions": self._generations.num_preemptions,
            **self._step_facts(),
        }

    def _step_facts(self) -> dict[str, object]:
        """What the engines' steps have done so far, and how full the KV cache was after the last."""
        counts, ready = self._generations, self.engine
        num_blocks = ready.kv_tokens // ready.block_size
        num_used = 0 if counts.num_free_blocks is None else num_blocks - counts.num_free_blocks
        return {
            "steps": counts.num_steps,
            "captured_steps": counts.num_captured_steps,
            "rows_per_step": round(counts.num_step_rows / max(counts.num_steps, 1), 1),
            "padding_tokens": counts.num_padding_tokens,
            "kv_tokens_used": num_used * ready.block_size if ready.task == "generate" else 0,
            "host_gap_seconds": round(counts.host_gap_s, 3),
        }

    def _expire(self) -> float:
        """End what waits for longer than it may; the engine frees its blocks before its next step."""
        generations, followers, now = self._generations, self.preparation.followers, time.monotonic()
        try:
            late = [*generations.expire(now), *followers.expire(now)]
            for piece in late:
                piece.owner.settle(too_late(piece))
            if late:
                self._on_room()
        except Exception:
            logger.exception("what is late could not be ended")
            self._on_fatal("what is late could not be ended; see the traceback above")
        return min(generations.first_deadline, followers.first_deadline)

    def _settle(self, done: list[Done]) -> None:
        """What a step has finished: a Result for everyone who waits for it."""
        # Of these there will be no answer for others.
        self._flights.release(
            [
                g.key
                for g, outcome in done
                if g.key is not None and (isinstance(outcome, Failure) or not g.is_kept(outcome))
            ]
        )
        for generation, outcome in done:
            for i, piece in enumerate(generation.waiters):
                if isinstance(outcome, Failure):
                    piece.owner.settle(failed(piece.request, outcome, piece.params, piece.sample, piece.owner))
                else:
                    # The first to ask is the one it was computed for; only its Result brings the new answer along.
                    is_new = i == 0 and generation.is_kept(outcome)
                    result = answered(piece, outcome, is_cached=i > 0)
                    piece.owner.settle(result, generation.key if is_new else None)
        self._on_room()
