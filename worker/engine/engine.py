"""Engine: Scheduler and Runner together, and the loop that may run one step ahead. It knows token ids, and no pipe."""

import logging
import time
from collections import deque

import numpy as np
import torch

from batching.padded import PaddedPlan, PaddedScheduler
from batching.scheduler import Outcome, Scheduler, StepPlan
from batching.sequence import Sequence
from batching.token_budget import TokenBudget
from protocol.errors import InvalidRequest
from protocol.frames import EngineReady, NewSequence, StepFrame, TokenScores
from protocol.settings import EngineSettings
from worker.engine.attention import choose_backend
from worker.engine.cache_size import new_padded_scheduler, new_scheduler, num_cache_blocks, num_padded_tokens
from worker.engine.compiling import compile_layers
from worker.engine.graph_pool import GraphPool
from worker.engine.kernels.building import building
from worker.engine.kernels.obstacle import triton_obstacle
from worker.engine.limits import check_limits, step_limits
from worker.engine.loader import LoadedModel, load_model
from worker.engine.memory import bound_memory
from worker.engine.model_files import files_digest, fingerprint, resolve_folder
from worker.engine.padded_runner import PaddedRunner
from worker.engine.ready import environment
from worker.engine.rehearsal import rehearse
from worker.engine.runner import Runner, StepHandle
from worker.engine.scorer import Scores
from worker.engine.telemetry import Telemetry
from worker.engine.waste import Waste

log = logging.getLogger("millrace.engine")

#: What a warm-up runs: few and short, but of odd and even numbers.
_WARM_UP_SEQUENCES = 4
_WARM_UP_TOKENS = 48
#: Tokens of a padded step below which a lack of memory is not theirs.
_LEAST_COLUMNS = 256


class Engine:
    """Raises ConfigurationError when the model, the settings and the machine do not fit together."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, model_fingerprint: str = "") -> None:
        check_limits(settings)
        self.loaded = loaded
        self._spreads = settings.device == "auto"
        self.fingerprint = model_fingerprint
        self.lookahead = settings.lookahead
        if self.lookahead is None:
            self.lookahead = 1 if loaded.device.type == "cuda" else 0
        limits = step_limits(settings, loaded.device)
        if loaded.device.type == "cuda":
            bound_memory(loaded.device, settings)
        max_num_seqs = limits.max_num_seqs
        self.scheduler: Scheduler | PaddedScheduler
        if loaded.layout == "padded":
            self.lookahead = 0  # a rectangle's next tokens come from the host
            self.attention_name = f"transformers' {loaded.attention}"
            self.runner: Runner = PaddedRunner(loaded, max_num_seqs=max_num_seqs)
            num_tokens = num_padded_tokens(loaded, settings, limits, self.runner)
            self.scheduler = new_padded_scheduler(loaded, limits, num_tokens)
        else:
            backend = choose_backend(settings.attention, loaded.device, loaded.dtype, loaded.kv_dtype)
            self.attention_name = backend.name
            with building(rehearse(loaded, backend, limits)):
                if settings.compile or (settings.compile is None and loaded.device.type == "cuda"):
                    compile_layers(loaded)
            has_kernels = triton_obstacle(loaded.device) is None
            is_captured = settings.graphs and has_kernels and backend.is_capturable
            num_blocks = num_cache_blocks(loaded, settings, limits, backend, is_captured=is_captured)
            graphs = GraphPool(loaded.device) if is_captured else None
            self.runner = Runner(loaded, backend, max_num_seqs=max_num_seqs, num_blocks=num_blocks, graphs=graphs)
            if is_captured:
                self.runner.decode.capture()
            self.scheduler = new_scheduler(loaded, settings, limits, num_blocks, backend.block_size)
        self.telemetry = Telemetry()
        self._waste = Waste(loaded.layout)
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._refused: list[tuple[int, str]] = []
        self._num_reported_preemptions = 0
        least = _LEAST_COLUMNS if isinstance(self.scheduler, PaddedScheduler) else 1
        self._budget = TokenBudget(self.scheduler.max_batch_tokens, least)
        self._failed: list[StepPlan] = []  # launched in vain for lack of memory
        log.info(
            "layout %s, attention backend %s, KV cache of %d blocks of %d tokens in %s, lookahead %d",
            loaded.layout,
            self.attention_name,
            self.scheduler.blocks.num_blocks,
            self.scheduler.blocks.block_size,
            str(loaded.kv_dtype).removeprefix("torch."),
            self.lookahead,
        )
        if loaded.device.type == "cuda":
            self.warm_up()

    def warm_up(self) -> None:
        """Every kind of step once, so that what is compiled at first use is compiled now. Leaves nothing behind but
        blocks that nobody will ask for. To be called before any Sequence is added."""
        num_tokens = min(_WARM_UP_TOKENS, self.scheduler.blocks.capacity - 4, self.loaded.max_model_len - 4)
        if num_tokens < 1:
            return
        prompt = np.zeros(num_tokens, dtype="<i4").tobytes()
        for i in range(_WARM_UP_SEQUENCES):
            # One more each time: numbers of rows and tokens are odd and even, and prompts join others' decode.
            self.add(NewSequence(-1 - i, prompt[: 4 * max(num_tokens - i, 1)], 4, (), float(i % 2), 1.0, 0, 0, 0))
            self.step()
        while self.has_work:
            self.step()
        self.telemetry.reset()

    @classmethod
    def start(cls, settings: EngineSettings) -> "Engine":
        """The engine for `settings.model`, read from its folder or from the model hub."""
        check_limits(settings)
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        folder = resolve_folder(settings.model, settings.revision)
        loaded = load_model(folder, settings)
        return cls(loaded, settings, fingerprint(files_digest(folder), loaded.dtype_name, loaded.rounding))

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(self._in_flight or self._refused or scheduler.num_running or scheduler.num_waiting)

    def ready(self) -> EngineReady:
        return EngineReady(
            fingerprint=self.fingerprint,
            max_model_len=self.loaded.max_model_len,
            kv_tokens=self.scheduler.blocks.capacity,
            max_num_seqs=self.scheduler.max_num_seqs,
            block_size=self.scheduler.blocks.block_size,
            dtype=self.loaded.dtype_name,
            attention_backend=self.attention_name,
            layout=self.loaded.layout,
            vocab_size=self.loaded.vocab_size,
            quantization=self.loaded.rounding,
            **environment(self.loaded.device, spreads=self._spreads),
        )

    def add(self, new: NewSequence) -> None:
        """Queue a Sequence. One that can never finish is refused in the next frame and costs the others nothing."""
        first = None
        if new.sample_of is not None:
            first = self.scheduler.get(new.sample_of)
            if first is None:
                reason = dict(self._refused).get(
                    new.sample_of, f"it shares its prompt with {new.sample_of}, unknown here"
                )
                self._refused.append((new.seq_id, reason))
                return
        sequence = Sequence(
            new.seq_id,
            np.frombuffer(new.token_ids, dtype="<i4") if first is None else first.prompt_ids,
            max_tokens=new.max_tokens,
            stop_token_ids=new.stop_token_ids,
            temperature=new.temperature,
            top_p=new.top_p,
            top_k=new.top_k,
            seed=new.seed,
            sample=new.sample,
            score_from=None if new.score_from < 0 else new.score_from,
            num_top=new.num_top,
            min_p=new.min_p,
            terms=new.terms,
            logprobs=new.logprobs,
            priority=new.priority,
            deadline=new.deadline,
            tenant=new.tenant,
            job=new.job,
        )
        try:
            self._check_vocabulary(sequence)
            if new.score_from >= 0 and self.loaded.scoring_obstacle is not None:
                reason = self.loaded.scoring_obstacle
                raise InvalidRequest("not_scorable", f"this model's prompts cannot be scored: {reason}")
            self.scheduler.add(sequence, sample_of=first)
        except InvalidRequest as error:
            self._refused.append((new.seq_id, error.message))

    def finish(self, seq_id: int, num_kept: int) -> None:
        self.scheduler.finish(seq_id, num_kept)
        if not self.has_work:
            self.telemetry.stop()

    def change_priority(self, seq_id: int, priority: int) -> None:
        self.scheduler.change_priority(seq_id, priority)

    def step(self) -> StepFrame | None:
        """Launch what may be launched, then report the oldest step; None when there is nothing left to do."""
        assert self.lookahead is not None
        while len(self._in_flight) <= self.lookahead and not self._failed and self._launch():
            pass
        refused, self._refused = self._refused, []
        if not self._in_flight and self._failed:
            self._give_way()
            return self._frame(Outcome(), StepPlan(), refused, [], [])
        if not self._in_flight:
            return self._frame(Outcome(), StepPlan(), refused, [], []) if refused else None
        plan, handle = self._in_flight.popleft()
        started = time.perf_counter()
        try:
            tokens = handle.wait()
        except torch.OutOfMemoryError:
            self._failed = [plan, *(later for later, _ in self._in_flight), *self._failed]
            self._in_flight.clear()
            self._give_way()
            return self._frame(Outcome(), StepPlan(), refused, [], [])
        self._budget.step_done()
        self.telemetry.count_wait(started, is_idle=not self._in_flight)
        started = time.perf_counter()
        outcome = self.scheduler.process(plan, tokens)
        scores = [] if handle.scores is None else token_scores(plan, handle.scores)
        self._waste.count(plan.num_scheduled_tokens, plan.num_padding_tokens + handle.num_padding)
        if not self.has_work:
            self._waste.report()
            self.telemetry.stop()
        logprobs = [] if handle.logprobs is None else sampled_pieces(plan, handle.logprobs)
        frame = self._frame(outcome, plan, refused, scores, logprobs, handle)
        self.telemetry.host_s += time.perf_counter() - started
        return frame

    def _launch(self) -> bool:
        """The next step, if there is one."""
        started = time.perf_counter()
        self.scheduler.max_batch_tokens = self._budget.tokens
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        begun = time.perf_counter()
        try:
            handle = self.runner.launch(plan)
        except torch.OutOfMemoryError:
            self._failed.append(plan)
            return False
        if handle.done is not None:
            begun = time.perf_counter()  # a GPU has it from now on; a CPU was at it meanwhile
        self._in_flight.append((plan, handle))
        num_padding = plan.num_padding_tokens + handle.num_padding
        self.telemetry.count_launch(
            started, begun, len(plan.sequences), plan.num_scheduled_tokens, num_padding, handle.is_captured
        )
        return True

    def _give_way(self) -> None:
        """After a step that the memory was too small for: smaller ones from here on, with everything preempted.

        Raises OutOfMemoryError when they cannot be smaller: whoever restarts the process finds out who is to blame.
        """
        is_halved = self._budget.halve()
        # Of rectangles, rows count too.
        if not is_halved and not any(isinstance(plan, PaddedPlan) and plan.num_rows > 1 for plan in self._failed):
            raise torch.OutOfMemoryError("the smallest possible step does not fit into the memory")
        log.warning("out of memory: everything is preempted, and steps have %d tokens at most", self._budget.tokens)
        self.runner.forget()
        self.scheduler.take_back(self._failed)
        self._failed = []
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _frame(
        self,
        outcome: Outcome,
        plan: StepPlan,
        refused: list[tuple[int, str]],
        scores: list[TokenScores],
        logprobs: list[tuple[int, bytes]],
        handle: StepHandle | None = None,
    ) -> StepFrame:
        num_preemptions = self.scheduler.num_preemptions - self._num_reported_preemptions
        self._num_reported_preemptions += num_preemptions
        return StepFrame(
            seq_ids=np.array(outcome.seq_ids, dtype="<i8").tobytes(),
            token_ids=np.array(outcome.token_ids, dtype="<i4").tobytes(),
            finished=outcome.finished,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=self.scheduler.blocks.num_free,
            num_scheduled_tokens=plan.num_scheduled_tokens,
            refused=refused,
            num_padding_tokens=plan.num_padding_tokens + (0 if handle is None else handle.num_padding),
            scores=scores,
            logprobs=logprobs,
            num_prefix_hit_tokens=plan.num_prefix_hit_tokens,
            num_preemptions=num_preemptions,
            num_rows=len(plan.sequences),
            is_captured=handle is not None and handle.is_captured,
            host_gap_s=self.telemetry.take_gap(),
        )

    def _check_vocabulary(self, sequence: Sequence) -> None:
        """An id outside the vocabulary would read outside the embedding: on CUDA the end of the whole process."""
        ids, vocab_size = sequence.prompt_ids, self.loaded.vocab_size
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise InvalidRequest(
                "invalid_token", f"the prompt has a token id outside the model's vocabulary of {vocab_size}"
            )
        bias = sequence.terms.logit_bias if sequence.terms is not None else {}
        if bias and not 0 <= min(bias) <= max(bias) < vocab_size:
            raise InvalidRequest(
                "invalid_token", f"logit_bias has a token id outside the model's vocabulary of {vocab_size}"
            )


def sampled_pieces(plan: StepPlan, scores: Scores) -> list[tuple[int, bytes]]:
    """A step's log-probabilities of sampled tokens, as in StepFrame."""
    logprobs, top_ids, top = (x.numpy() for x in (scores.logprobs, scores.top_ids, scores.top_logprobs))
    asked = [seq for seq in map(plan.sequences.__getitem__, plan.sampled) if seq.logprobs is not None]
    return [
        (
            seq.seq_id,
            logprobs[i].astype("<f4").tobytes()
            + top_ids[i, : seq.logprobs].astype("<i4").tobytes()
            + top[i, : seq.logprobs].astype("<f4").tobytes(),
        )
        for i, seq in enumerate(asked)
    ]


def token_scores(plan: StepPlan, scores: Scores) -> list[TokenScores]:
    """A step's scores, apart for each Sequence."""
    logprobs, ranks = scores.logprobs.numpy(), scores.ranks.numpy()
    top_ids, top_logprobs = scores.top_ids.numpy(), scores.top_logprobs.numpy()
    found, at = [], 0
    for segment, start, end in plan.scored:
        seq, part = plan.sequences[segment], slice(at, at + end - start)
        at += end - start
        num_top = min(seq.num_top, top_ids.shape[1])
        found.append(
            TokenScores(
                seq_id=seq.seq_id,
                start=start,
                logprobs=logprobs[part].astype("<f4").tobytes(),
                ranks=ranks[part].astype("<i4").tobytes(),
                num_top=num_top,
                top_ids=top_ids[part, :num_top].astype("<i4").tobytes(),
                top_logprobs=top_logprobs[part, :num_top].astype("<f4").tobytes(),
            )
        )
    return found
