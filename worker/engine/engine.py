"""Engine: Scheduler and Runner together, and the loop that may run one step ahead. It knows token ids, and no pipe."""

import logging
import platform
from collections import deque
from typing import Any

import numpy as np
import torch

from batching.block_manager import BlockManager
from batching.padded import PaddedScheduler
from batching.scheduler import Outcome, Scheduler, StepPlan
from batching.sequence import Sequence
from protocol.errors import ConfigurationError, InvalidRequest
from protocol.frames import EngineReady, LogitTerms, NewSequence, StepFrame, TokenScores
from protocol.settings import EngineSettings
from worker.engine.attention import AttentionBackend, choose_backend
from worker.engine.kv_cache import block_bytes
from worker.engine.loader import LoadedModel, load_model
from worker.engine.memory import available_bytes, check_cache
from worker.engine.model_files import ENGINE_VERSION, files_digest, fingerprint, resolve_folder
from worker.engine.padded_runner import PaddedRunner
from worker.engine.runner import Runner, StepHandle
from worker.engine.scorer import Scores
from worker.engine.waste import Waste

log = logging.getLogger("millrace.engine")

#: On a CPU the cache competes with everything else on the machine: this many tokens a Sequence, and no more than this.
CPU_TOKENS_PER_SEQUENCE = 1024
CPU_MAX_BYTES = 1 << 30


class Engine:
    """Raises ConfigurationError when the model, the settings and the machine do not fit together."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, model_fingerprint: str = "") -> None:
        _check(settings)
        self.loaded = loaded
        self._spreads = settings.device == "auto"
        self.fingerprint = model_fingerprint
        self.lookahead = settings.lookahead
        if self.lookahead is None:
            self.lookahead = 1 if loaded.device.type == "cuda" else 0
        max_num_seqs = min(settings.max_num_seqs, settings.max_batch_tokens)
        self.scheduler: Scheduler | PaddedScheduler
        if loaded.layout == "padded":
            self.lookahead = 0  # a rectangle's next tokens come from the host
            self.attention_name = f"transformers' {loaded.attention}"
            self.runner: Runner = PaddedRunner(loaded, max_num_seqs=max_num_seqs)
            self.scheduler = _padded_scheduler(loaded, settings, _num_padded_tokens(loaded, settings, self.runner))
        else:
            backend = choose_backend(settings.attention, loaded.device, loaded.dtype)
            self.attention_name = backend.name
            num_blocks = _num_blocks(loaded, settings, backend, max_num_seqs)
            self.runner = Runner(loaded, backend, max_num_seqs=max_num_seqs, num_blocks=num_blocks)
            self.scheduler = _scheduler(loaded, settings, num_blocks, backend.block_size)
        self._waste = Waste(loaded.layout)
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._refused: list[tuple[int, str]] = []
        self._num_reported_preemptions = 0
        log.info(
            "layout %s, attention backend %s, KV cache of %d blocks of %d tokens, lookahead %d",
            loaded.layout,
            self.attention_name,
            self.scheduler.blocks.num_blocks,
            self.scheduler.blocks.block_size,
            self.lookahead,
        )

    @classmethod
    def start(cls, settings: EngineSettings) -> "Engine":
        """The engine for `settings.model`, read from its folder or from the model hub."""
        _check(settings)
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        folder = resolve_folder(settings.model, settings.revision)
        loaded = load_model(folder, settings)
        return cls(loaded, settings, fingerprint(files_digest(folder), loaded.dtype_name))

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(self._in_flight or self._refused or scheduler.num_running or scheduler.num_waiting)

    def ready(self) -> EngineReady:
        import transformers

        return EngineReady(
            fingerprint=self.fingerprint,
            max_model_len=self.loaded.max_model_len,
            kv_tokens=self.scheduler.blocks.capacity,
            max_num_seqs=self.scheduler.max_num_seqs,
            block_size=self.scheduler.blocks.block_size,
            device=_device_name(self.loaded.device),
            dtype=self.loaded.dtype_name,
            attention_backend=self.attention_name,
            versions={
                "engine": ENGINE_VERSION,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            layout=self.loaded.layout,
            num_devices=torch.cuda.device_count() if self._spreads and self.loaded.device.type == "cuda" else 1,
            vocab_size=self.loaded.vocab_size,
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

    def step(self) -> StepFrame | None:
        """Launch what may be launched, then report the oldest step; None when there is nothing left to do."""
        assert self.lookahead is not None
        while len(self._in_flight) <= self.lookahead:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight.append((plan, self.runner.launch(plan)))
        refused, self._refused = self._refused, []
        if self._in_flight:
            plan, handle = self._in_flight.popleft()
            outcome = self.scheduler.process(plan, handle.wait())
            scores = [] if handle.scores is None else token_scores(plan, handle.scores)
            self._waste.count(plan.num_scheduled_tokens, plan.num_padding_tokens)
            if not self.has_work:
                self._waste.report()
            logprobs = [] if handle.logprobs is None else sampled_pieces(plan, handle.logprobs)
            return self._frame(outcome, plan, refused, scores, logprobs)
        return self._frame(Outcome(), StepPlan(), refused, [], []) if refused else None

    def _frame(
        self,
        outcome: Outcome,
        plan: StepPlan,
        refused: list[tuple[int, str]],
        scores: list[TokenScores],
        logprobs: list[tuple[int, bytes]],
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
            num_padding_tokens=plan.num_padding_tokens,
            scores=scores,
            logprobs=logprobs,
            num_prefix_hit_tokens=plan.num_prefix_hit_tokens,
            num_preemptions=num_preemptions,
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


def _check(settings: EngineSettings) -> None:
    # A Sequence is a prompt of one token and an output of one, at least.
    limits = {"max_batch_tokens": 1, "max_num_seqs": 1, "max_model_len": 2, "kv_tokens": 2, "num_threads": 1}
    for name, least in limits.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ConfigurationError(f"engine.{name}={value} is too small: it must be at least {least}")
    if settings.lookahead not in (None, 0, 1):
        raise ConfigurationError(f"engine.lookahead={settings.lookahead} is out of range: it is 0 or 1")
    if not 0 < settings.memory_fraction <= 1:
        raise ConfigurationError(
            f"engine.memory_fraction={settings.memory_fraction} is out of range: it must be above 0 and at most 1"
        )


def _scheduler(loaded: LoadedModel, settings: EngineSettings, num_blocks: int, block_size: int) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        max_model_len=loaded.max_model_len,
        admission=settings.admission,
        prefix_reuse=settings.prefix_reuse,
    )


def _padded_scheduler(loaded: LoadedModel, settings: EngineSettings, num_tokens: int) -> PaddedScheduler:
    return PaddedScheduler(
        num_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        max_model_len=loaded.max_model_len,
    )


def _num_blocks(loaded: LoadedModel, settings: EngineSettings, backend: AttentionBackend, max_num_seqs: int) -> int:
    block_size = backend.block_size
    bytes_each = block_bytes(loaded.layers, block_size, loaded.dtype)
    if settings.kv_tokens is not None:
        if settings.kv_tokens < block_size:
            raise ConfigurationError(
                f"engine.kv_tokens={settings.kv_tokens} is less than one block of {block_size} tokens"
            )
        check_cache(loaded.device, settings.kv_tokens // block_size * bytes_each, settings.kv_tokens, settings)
        return settings.kv_tokens // block_size
    if loaded.device.type != "cuda":
        return _cpu_tokens(loaded, settings, max_num_seqs) // block_size or 1
    peak = _peak_bytes(loaded, settings, backend, max_num_seqs)
    return _left_beside(peak, bytes_each, loaded, settings) // bytes_each


def _num_padded_tokens(loaded: LoadedModel, settings: EngineSettings, runner: Runner) -> int:
    bytes_each = block_bytes(loaded.layers, 1, loaded.dtype)
    if settings.kv_tokens is not None:
        check_cache(loaded.device, settings.kv_tokens * bytes_each, settings.kv_tokens, settings)
        return settings.kv_tokens
    if loaded.device.type != "cuda":
        return _cpu_tokens(loaded, settings, min(settings.max_num_seqs, settings.max_batch_tokens))
    most = settings.max_num_seqs * loaded.max_model_len
    scheduler = _padded_scheduler(loaded, settings, most)
    peak = _measure(loaded, settings, scheduler, runner)
    # Each step a layer's cache is copied into one that is longer by a column: for a moment it is there twice.
    bytes_each += -(-bytes_each // len(loaded.layers))
    return min(_left_beside(peak, bytes_each, loaded, settings) // bytes_each, most)


def _cpu_tokens(loaded: LoadedModel, settings: EngineSettings, max_num_seqs: int) -> int:
    """A cache that is always enough for some Sequences, and leaves the machine's other work its memory."""
    wanted = max_num_seqs * min(loaded.max_model_len, CPU_TOKENS_PER_SEQUENCE)
    bytes_each = block_bytes(loaded.layers, 1, loaded.dtype)
    limit = min(CPU_MAX_BYTES, available_bytes(loaded.device, settings) // 2)
    return max(min(wanted, limit // bytes_each), 1)


def _left_beside(peak: int, bytes_each: int, loaded: LoadedModel, settings: EngineSettings) -> int:
    available = available_bytes(loaded.device, settings) - peak
    if available < bytes_each:
        lacking = (bytes_each - available) / torch.cuda.get_device_properties(loaded.device).total_memory
        raise ConfigurationError(
            f"engine.memory_fraction={settings.memory_fraction} leaves no memory for a KV cache beside the model and "
            f"steps of {settings.max_batch_tokens} tokens, which take {peak / 2**30:.2f} GiB: raise it by "
            f"{lacking:.3f} or more, or lower engine.max_batch_tokens or engine.max_num_seqs"
        )
    return available


def _peak_bytes(loaded: LoadedModel, settings: EngineSettings, backend: AttentionBackend, max_num_seqs: int) -> int:
    """What weights and the largest step take without the KV cache, measured by running one.

    The step is full, samples as many rows as may run, draws them all with top_p, whose sort takes most memory, has
    penalties and log-probabilities for all of them, and scores every token.
    """
    num_blocks = max_num_seqs * -(-(_tokens_each(loaded, settings) + 1) // backend.block_size)
    scheduler = _scheduler(loaded, settings, num_blocks, backend.block_size)
    runner = Runner(loaded, backend, max_num_seqs=max_num_seqs, num_blocks=num_blocks)
    peak = _measure(loaded, settings, scheduler, runner)
    return peak - num_blocks * block_bytes(loaded.layers, backend.block_size, loaded.dtype)


def _tokens_each(loaded: LoadedModel, settings: EngineSettings) -> int:
    max_num_seqs = min(settings.max_num_seqs, settings.max_batch_tokens)
    return max(1, min(settings.max_batch_tokens // max_num_seqs, loaded.max_model_len - 1))


def _measure(
    loaded: LoadedModel, settings: EngineSettings, scheduler: Scheduler | PaddedScheduler, runner: Runner
) -> int:
    """Bytes at the height of a full step."""
    num_each = _tokens_each(loaded, settings)
    for i in range(min(settings.max_num_seqs, settings.max_batch_tokens)):
        prompt = np.zeros(num_each, dtype=np.int32)
        terms = LogitTerms(repetition_penalty=1.5)
        wishes: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 0.5,
            "terms": terms,
            "logprobs": 1,
            "score_from": 1,
            "num_top": 1,
        }
        scheduler.add(Sequence(i, prompt, max_tokens=1, **wishes))
    plan = scheduler.schedule()
    assert plan is not None
    torch.cuda.reset_peak_memory_stats(loaded.device)
    runner.launch(plan).wait()
    peak = torch.cuda.max_memory_allocated(loaded.device)
    torch.cuda.empty_cache()
    return peak


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


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"
