"""PoolingEngine: the Engine of models that make one vector of a text. A Sequence is whole in one step and then done."""

import logging
import time
from collections import deque

import numpy as np
import torch

from batching.sequence import Sequence
from batching.token_budget import TokenBudget
from batching.whole import WholePlan, WholeScheduler
from protocol.errors import ConfigurationError, InvalidRequest
from protocol.frames import EngineReady, NewSequence, StepFrame
from protocol.settings import EngineSettings
from worker.engine.limits import step_limits
from worker.engine.model_files import files_digest, fingerprint, resolve_folder
from worker.engine.pooled_model import PooledModel, load_pooled
from worker.engine.pooling_runner import PoolingRunner, VectorsHandle
from worker.engine.ready import environment
from worker.engine.task import Task
from worker.engine.telemetry import Telemetry
from worker.engine.text_attention import choose_text_attention
from worker.engine.waste import Waste

log = logging.getLogger("millrace.engine")


class PoolingEngine:
    """Raises ConfigurationError when the model, the settings and the machine do not fit together."""

    def __init__(self, pooled: PooledModel, settings: EngineSettings, model_fingerprint: str = "") -> None:
        self.pooled = pooled
        self.fingerprint = model_fingerprint
        self._spreads = settings.device == "auto"
        attention = choose_text_attention(settings.attention, pooled.device, pooled.backbone.dtype)
        is_packed = pooled.layout == "packed"
        self.attention_name = attention.name if is_packed else f"transformers' {pooled.attention}"
        limits = step_limits(settings, pooled.device, is_whole=True)
        self.scheduler = WholeScheduler(
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_len=pooled.max_model_len,
            is_padded=not is_packed,
        )
        self.runner = PoolingRunner(pooled, attention)
        #: On a GPU the host prepares the next step while this one runs.
        self._max_in_flight = 2 if pooled.device.type == "cuda" else 1
        self._in_flight: deque[tuple[WholePlan, VectorsHandle]] = deque()
        self._refused: list[tuple[int, str]] = []
        self._budget = TokenBudget(self.scheduler.max_batch_tokens, 1)
        self._has_given_way = False
        self.telemetry = Telemetry()
        self._waste = Waste(pooled.layout)
        self._try_full_step()

    @classmethod
    def start(cls, settings: EngineSettings, task: Task) -> "PoolingEngine":
        """The engine for `settings.model`, read from its folder or from the model hub."""
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        folder = resolve_folder(settings.model, settings.revision)
        pooled = load_pooled(folder, task, settings)
        digest = files_digest(folder)
        return cls(
            pooled, settings, fingerprint(digest, pooled.dtype_name, pooled.quantization, task=pooled.description)
        )

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._refused or self.scheduler.num_running or self.scheduler.num_waiting)

    def ready(self) -> EngineReady:
        scheduler = self.scheduler
        return EngineReady(
            fingerprint=self.fingerprint,
            max_model_len=self.pooled.max_model_len,
            kv_tokens=scheduler.max_batch_tokens,  # nothing is kept beyond a step, so it is what holds a text
            max_num_seqs=scheduler.max_num_seqs,
            block_size=1,
            dtype=self.pooled.dtype_name,
            attention_backend=self.attention_name,
            layout=self.pooled.layout,
            vocab_size=self.pooled.vocab_size,
            quantization=self.pooled.quantization,
            task=self.pooled.task,
            num_dimensions=self.pooled.num_dimensions,
            labels=self.pooled.labels,
            **environment(self.pooled.device, spreads=self._spreads),
        )

    def add(self, new: NewSequence) -> None:
        """Queue a text. One that fits no step is refused in the next frame and costs the others nothing."""
        if new.sample_of is not None or new.max_tokens or new.score_from >= 0:
            self._refused.append((new.seq_id, f"this engine does nothing but {self.pooled.task}"))
            return
        ids = np.frombuffer(new.token_ids, dtype="<i4")
        sequence = Sequence(
            new.seq_id,
            ids,
            max_tokens=0,
            priority=new.priority,
            deadline=new.deadline,
            tenant=new.tenant,
            job=new.job,
        )
        try:
            # An id outside the vocabulary would read outside the embedding: on CUDA the end of the whole process.
            if len(ids) and (ids.min() < 0 or ids.max() >= self.pooled.vocab_size):
                raise InvalidRequest(
                    "invalid_token",
                    f"the text has a token id outside the model's vocabulary of {self.pooled.vocab_size}",
                )
            self.scheduler.add(sequence)
        except InvalidRequest as error:
            self._refused.append((new.seq_id, error.message))

    def finish(self, seq_id: int, num_kept: int) -> None:
        """Nobody wants it any more."""
        self.scheduler.cancel(seq_id)
        if not self.has_work:
            self.telemetry.stop()

    def change_priority(self, seq_id: int, priority: int) -> None:
        self.scheduler.change_priority(seq_id, priority)

    def step(self) -> StepFrame | None:
        """Launch what may be launched, then report the oldest step; None when there is nothing left to do."""
        while len(self._in_flight) < self._max_in_flight and self._launch():
            pass
        has_given_way, self._has_given_way = self._has_given_way, False
        refused, self._refused = self._refused, []
        plan, pooled = WholePlan(), []
        if self._in_flight:
            plan, handle = self._in_flight.popleft()
            started = time.perf_counter()
            vectors = handle.wait()
            self.telemetry.count_wait(started, is_idle=not self._in_flight)
            started = time.perf_counter()
            pairs = zip(plan.sequences, vectors, strict=True)
            pooled = [(seq.seq_id, vector.astype("<f4").tobytes()) for seq, vector in pairs]
            self.scheduler.finish(plan)
            self._budget.step_done()
            self._waste.count(plan.num_scheduled_tokens, plan.num_padding_tokens)
            if not self.has_work:
                self._waste.report()
                self.telemetry.stop()
            self.telemetry.host_s += time.perf_counter() - started
        elif not refused and not has_given_way:
            return None
        return StepFrame(
            seq_ids=b"",
            token_ids=b"",
            finished=[(seq_id, "stop", 0) for seq_id, _ in pooled],
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=0,
            num_scheduled_tokens=plan.num_scheduled_tokens,
            refused=refused,
            num_padding_tokens=plan.num_padding_tokens,
            num_rows=len(plan.sequences),
            pooled=pooled,
            host_gap_s=self.telemetry.take_gap(),
        )

    def _launch(self) -> bool:
        """The next step, if there is one that fits."""
        started = time.perf_counter()
        self.scheduler.max_step_tokens = self._budget.tokens
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        begun = time.perf_counter()
        try:
            handle = self.runner.launch(plan)
        except torch.OutOfMemoryError:
            self._give_way(plan)
            return False
        if handle.done is not None:
            begun = time.perf_counter()  # a GPU has it from now on; a CPU was at it meanwhile
        self._in_flight.append((plan, handle))
        num_tokens, num_padding = plan.num_scheduled_tokens, plan.num_padding_tokens
        self.telemetry.count_launch(started, begun, len(plan.sequences), num_tokens, num_padding, is_captured=False)
        return True

    def _give_way(self, plan: WholePlan) -> None:
        """After a step that the memory was too small for: smaller ones from here on.

        Raises OutOfMemoryError when one text alone was too much: whoever restarts the process finds out that it was.
        """
        if len(plan.sequences) == 1 and not self._in_flight:
            raise torch.OutOfMemoryError("a step of one text does not fit into the memory")
        self._budget.halve()
        log.warning("out of memory: steps of several texts have %d tokens at most", self._budget.tokens)
        self.scheduler.take_back(plan)
        self._has_given_way = True
        if self.pooled.device.type == "cuda":
            torch.cuda.empty_cache()

    def _try_full_step(self) -> None:
        """On a GPU: whether memory is enough for the largest step is to be known before work is taken in."""
        if self.pooled.device.type != "cuda":
            return
        scheduler, num_each = self.scheduler, min(self.pooled.max_model_len, self.scheduler.max_batch_tokens)
        num = max(scheduler.max_batch_tokens // num_each, 1)
        prompts = [Sequence(i, np.zeros(num_each, dtype=np.int32), max_tokens=0) for i in range(num)]
        try:
            self.runner.launch(WholePlan(prompts, num * num_each)).wait()
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigurationError(
                f"a step of engine.max_batch_tokens={scheduler.max_batch_tokens} tokens does not fit beside the model "
                f"on {self.pooled.device}: lower it"
            ) from error
