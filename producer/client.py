"""Client: submits Jobs and reads their Results. It writes the ledger and rings the queue's bell; workers do the rest.

Needs neither torch nor a running worker; while the broker is away it goes on, since the ledger is what counts.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, get_args

import msgspec

from producer.asks import Asks
from producer.doorbell import Doorbell
from producer.identity import given_name, job_identity
from producer.intake import Intake
from producer.job_results import Order
from producer.job_watch import JobWatch
from producer.lines import encode_item, read_line
from producer.source import Input, Source
from producer.wakeups import Wakeup, Wakeups
from protocol.errors import (
    ConfigurationError,
    DamagedInput,
    InvalidRequest,
    JobNotFound,
    SubmissionConflict,
    TimedOut,
)
from protocol.priority import DEFAULT_PRIORITY, Priority
from protocol.requests import Request, Result
from protocol.sampling import SamplingParams
from protocol.settings import Settings, load_settings
from storage.completeness import Verification, verify
from storage.dead_letters import (
    DEAD_CODES,
    DeadLetter,
    drop_dead_letters,
    find_dead_letter,
    list_dead_letters,
)
from storage.deletion import delete_job, find_job_to_delete
from storage.jobs import (
    Job,
    JobStatus,
    cancel_job,
    find_job,
    intake_position,
    list_jobs,
    open_job,
    reopen_errors,
    set_priority,
    unclaimed_chunks,
)
from storage.landing_channel import LandingChannel
from storage.ledger import Ledger

UNSET_PARAMS = SamplingParams()

#: Errors whose cause may be gone on another try: the engine's, the worker's, or limits of how the model was served.
#: What depends on the input alone would come out the same.
RETRIABLE_CODES = frozenset(
    {
        "chat_template",
        "empty_prompt",
        "engine_died",
        "engine_refused",
        "invalid_dimensions",
        "internal_error",
        "no_chat_template",
        "prompt_too_long",
        "unsupported_kind",
    }
)


class Client:
    """One tenant's view of the ledger, and the way into the queue. A context manager.

    Threads may share it: one for a whole process will do. Not to be carried across a fork. A call that waits can be
    stopped by another thread: give it a Wakeup and call that one's `stop`, upon which it raises WaitStopped.

    Raises ConfigurationError when the settings cannot work together or the database lacks Millrace's tables. Every
    call raises DatabaseUnavailable when the database does not answer.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = load_settings() if settings is None else settings
        self.settings.check_topology()
        self._ledger = Ledger(self.settings.database_url)
        self._doorbell = Doorbell(self.settings)
        self._landings = LandingChannel.connect(self.settings.broker_url)
        self._wakeups = Wakeups(self.settings.broker_url)
        self._watch = JobWatch(self._ledger, self._wakeups, self.settings.lease_seconds)
        self._asks = Asks(self.settings, self._ledger, self._doorbell, self._wakeups)
        try:
            self._ledger.check_schema()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Whoever still waits for `ask` gets CancelledError."""
        self._asks.close()
        self._wakeups.close()
        self._landings.close()
        self._doorbell.close()
        self._ledger.close()

    def submit(
        self,
        source: Input | Source,
        *,
        name: str | None = None,
        params: SamplingParams = UNSET_PARAMS,
        priority: Priority | None = None,
        model_names: Sequence[str] = (),
        retry_errors: bool = False,
        window: int | None = None,
        on_progress: Callable[[int], None] | None = None,
        wakeup: Wakeup | None = None,
    ) -> Job:
        """Make a Job of the source's lines, or find the one that was made of the same before and go on with it.

        The same means equal content, `params` and model; with a `name`, that name alone, which a source that can be
        read only once needs; the id of a Job that is there stands for its name. `params` hold where a line says
        nothing. `priority` is the Job's class, of one that is there already too; without it a new one is "normal". A
        line may ask for a model by one of `model_names` (default: the served name), and by what the source's Reading
        maps to one of them. `on_progress` is told the number of the last line that is in. With `retry_errors` the Job's
        errors are tried again as by `retry`.

        A source is read a Chunk at a time, whatever its length, and without a `window` as fast as the database takes
        it, whether anybody works or not. With one this waits while more than so many Requests are unfinished, so that
        an endless source fills neither memory nor disk; some Chunks' worth, thousands, keep the workers busy.

        Raises InvalidRequest for `params` out of range, ConfigurationError for a source that cannot be read or needs a
        name, DamagedInput for one that breaks off or changes, whose lines before are in, SubmissionConflict when the
        name stands for another Job or somebody else is submitting the same.
        """
        params.validate()
        intake = Intake(
            self.settings, self._ledger, self._doorbell, self._wakeups, self._watch, window=window, wakeup=wakeup
        )
        content = source if isinstance(source, Source) else Source(source)
        model = self.settings.served_model
        names = content.model_names(model_names or (model,))
        identity = self._identity(content, name, params)
        if self.find_same(content, name=name, params=params) is None:
            content.check()  # a Job that has all its lines does without its input
        job, _ = open_job(
            self._ledger,
            tenant=self.settings.tenant,
            identity=identity,
            model=model,
            params=params,
            priority=priority or DEFAULT_PRIORITY,
        )
        self._check_same(job, params)
        if priority not in (None, job.priority):
            job = self.set_priority(job, priority)
        if job.state == "submitting":
            try:
                intake.run(job, content, names, on_progress)
            except DamagedInput as error:
                raise DamagedInput(f"{error}; {self._way_on(job)}") from error
            self._landings.publish({job.id: ()})
        if retry_errors:
            self.retry(job)
        return self.find(job.id)

    def ask(
        self, item: str | Mapping[str, Any], *, params: SamplingParams = UNSET_PARAMS, timeout_s: float | None = None
    ) -> Result:
        """Store one prompt, wait for its Result and return it; the Result may be a failure.

        Made for many threads at once, as in a web backend: prompts that come within a moment share a transaction, a
        message and a look at the ledger. `item` is what `submit` takes many of. They are Jobs like others, which
        survive this process, count in `prune`, and are left out by `jobs` alone.

        Raises InvalidRequest for an item that cannot be read or asks for several Results, DatabaseUnavailable,
        TimedOut after `timeout_s` seconds, and JobNotFound when somebody cancelled or deleted the prompt's Job.
        """
        future = self.ask_future(item, params=params)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if not future.cancel():  # it came at the last moment, or raised an error of its own
                return future.result()
            raise TimedOut(f"no answer came within {timeout_s:g} s: it is computed all the same") from None

    def ask_future(self, item: str | Mapping[str, Any], *, params: SamplingParams = UNSET_PARAMS) -> "Future[Result]":
        """As `ask`, with the Result to come; what `ask` raises while it waits, this future does."""
        params.validate()
        request = read_line(encode_item(item), 1, (self.settings.served_model,))
        if isinstance(request, Result):
            assert request.failure is not None
            raise InvalidRequest(request.failure.code, request.failure.message)
        num_results = len(request.inputs) if request.inputs is not None else request.params.over(params).n or 1
        if num_results > 1:
            raise InvalidRequest("invalid_parameter", f"this asks for {num_results} Results, not one: use submit")
        return self._asks.put(request, params)

    def set_priority(self, job: Job | str, priority: Priority) -> Job:
        """Let what of the Job nobody has begun have this class. Raises JobNotFound."""
        job_id = self._id(job)
        set_priority(self._ledger, job_id, priority)
        return self.find(job_id)

    def retry(self, job: Job | str) -> int:
        """Have the Job's errors whose cause may be gone (RETRIABLE_CODES) computed again; returns how many.

        Those in Chunks that are being worked on right now stay, as do those of a cancelled Job. Raises JobNotFound.
        """
        job_id = self._id(job)
        # A token id may be this model's or no model's: the ledger tries again only what was refused by a worker.
        num_reopened = reopen_errors(self._ledger, job_id, RETRIABLE_CODES | {"invalid_token"})
        if num_reopened:
            self.announce(job_id)
        return num_reopened

    def dead_letters(self, job: Job | str | None = None) -> list[DeadLetter]:
        """Requests that were given up: of one Job, or all; the newest first. Raises JobNotFound."""
        job_id = None if job is None else self._id(job)
        return list_dead_letters(self._ledger, self.settings.tenant, job_id)

    def dead_letter(self, job: Job | str, line: int) -> tuple[list[DeadLetter], Request]:
        """A line's samples that were given up, and its Request. Raises JobNotFound and DeadLetterNotFound."""
        return find_dead_letter(self._ledger, self._id(job), line)

    def replay(self, job: Job | str, lines: Collection[int] | None = None) -> int:
        """Have the Job's dead letters, or those of these lines, computed again; returns how many Results that was.

        Those in Chunks that are being worked on right now stay, as do those of a cancelled Job. Raises JobNotFound.
        """
        job_id = self._id(job)
        num_reopened = reopen_errors(self._ledger, job_id, DEAD_CODES, lines=lines)
        if num_reopened:
            self.announce(job_id)
        return num_reopened

    def drop_dead_letters(self, job: Job | str, lines: Sequence[int] | None = None) -> int:
        """Forget the Job's dead letters, or those of these lines; their errors stay. Raises JobNotFound."""
        return drop_dead_letters(self._ledger, self._id(job), lines)

    def find_same(
        self, source: Input | Source, *, name: str | None = None, params: SamplingParams = UNSET_PARAMS
    ) -> Job | None:
        """The Job that `submit` would go on with, if there is one. Raises as `submit` does."""
        identity = self._identity(source if isinstance(source, Source) else Source(source), name, params)
        try:
            job = self.find(identity)
        except JobNotFound:
            return None
        if job.identity != identity:  # a name that happens to begin another Job's id
            return None
        self._check_same(job, params)
        return job

    def has_retriable_errors(self, job: Job | str) -> bool:
        """Whether `retry` would have something to do. Reads Results until it knows. Raises JobNotFound."""
        results = self.results(job, wait=False)
        return any(result.failure is not None and result.failure.code in RETRIABLE_CODES for result in results)

    def find(self, name: str) -> Job:
        """The Job with this id, this beginning of an id, or this name. Raises JobNotFound."""
        return find_job(self._ledger, name, self.settings.tenant)

    def jobs(self, limit: int = 100) -> list[Job]:
        """The newest Jobs, newest first. Raises ConfigurationError for a negative `limit`."""
        if limit < 0:
            raise ConfigurationError(f"limit={limit} is out of range: it must be 0 or more")
        return list_jobs(self._ledger, self.settings.tenant, limit)

    def status(self, job: Job | str) -> JobStatus:
        """How far the Job is. Raises JobNotFound."""
        return self._watch.look(self._id(job))

    def wait(
        self,
        job: Job | str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[JobStatus], None] | None = None,
        wakeup: Wakeup | None = None,
    ) -> JobStatus:
        """Block until the Job is finished or cancelled; `on_progress` is called at every look, each second or so.

        Raises JobNotFound, and TimedOut after `timeout_s` seconds.
        """
        return self._watch.until_ended(self._id(job), timeout_s=timeout_s, on_progress=on_progress, wakeup=wakeup)

    def results(
        self,
        job: Job | str,
        *,
        order: Order = "input",
        wait: bool = True,
        timeout_s: float | None = None,
        wakeup: Wakeup | None = None,
    ) -> Iterator[Result]:
        """The Job's Results, each once, in the order of its lines or, with `order="finished"`, as they land.

        In the order of the lines each comes as soon as nothing before it is missing. Ends with the Job; with
        `wait=False`: what is stored now, gaps and all. Raises JobNotFound, and TimedOut when nothing came for
        `timeout_s` seconds.
        """
        if order not in get_args(Order):
            raise ConfigurationError(f"order={order!r} is unknown: it is one of {', '.join(get_args(Order))}")
        job_id = self._id(job)
        if not wait:
            return self._watch.stored(job_id, order)
        return self._watch.results(job_id, order, timeout_s=timeout_s, wakeup=wakeup)

    def cancel(self, job: Job | str) -> bool:
        """Stop the Job: what is not computed yet never will be, what has a Result keeps it.

        True if this call did it, False when the Job had ended. Raises JobNotFound.
        """
        job_id = self._id(job)
        is_cancelled = cancel_job(self._ledger, job_id)
        if is_cancelled:
            self._landings.publish({job_id: ()})
        return is_cancelled

    def delete(self, job: Job | str, *, force: bool = False, on_progress: Callable[[int], None] | None = None) -> int:
        """Delete the Job with its Requests and Results; returns how many Results that were.

        With `force` one that has not ended is cancelled first. `on_progress` is told how many Results have gone. After
        an interruption the same call goes on. The answers that the Job brought stay known: they are nobody's, and go
        when they are pruned. Raises JobNotEnded and JobNotFound.
        """
        job_id = job.id if isinstance(job, Job) else self.find_to_delete(job).id
        if force:
            with contextlib.suppress(JobNotFound):  # where an earlier deletion was interrupted
                cancel_job(self._ledger, job_id)
        num_results = delete_job(
            self._ledger, job_id, None if on_progress is None else lambda _num_jobs, number: on_progress(number)
        )
        self._landings.publish({job_id: ()})
        return num_results

    def find_to_delete(self, name: str) -> Job:
        """As `find`, or else a Job whose deletion was interrupted. Raises JobNotFound."""
        return find_job_to_delete(self._ledger, name, self.settings.tenant)

    def verify(self, job: Job | str) -> Verification:
        """Read all the Job's Results again, and compare them with what it was closed with. Raises JobNotFound."""
        return verify(self._ledger, self._id(job))

    def announce(self, job: Job | str) -> None:
        """Tell the broker of the Job's Chunks that wait: for a broker that is new and cannot know of them."""
        found = self.find(self._id(job))
        for chunk_id in unclaimed_chunks(self._ledger, found.id):
            self._doorbell.ring(chunk_id, found.model, found.priority)

    def _identity(self, content: Source, name: str | None, params: SamplingParams) -> str:
        if name == "":
            raise ConfigurationError("a Job's name is empty: give it one that says what it is")
        if name is None:
            return job_identity(content.digest(), params, self.settings.served_model)
        try:
            job = self.find(name)
        except JobNotFound:
            return name
        return job.identity if job.id == name else name

    def _check_same(self, job: Job, params: SamplingParams) -> None:
        there: dict[str, Any] = {"model": job.model, **msgspec.structs.asdict(job.params)}
        here: dict[str, Any] = {"model": self.settings.served_model, **msgspec.structs.asdict(params)}
        differing = [name for name in there if there[name] != here[name]]
        if differing:
            called = f"{name!r} ({job.id})" if (name := given_name(job)) else job.id
            raise SubmissionConflict(
                f"the Job {called} has {_shown_values(there, differing)}, and here it is "
                f"{_shown_values(here, differing)}: give the same, or give this one another name"
            )

    def _way_on(self, job: Job) -> str:
        """What those can do whose input breaks off or changes."""
        position = intake_position(self._ledger, job.id)
        again = "the same command" if given_name(job) else f"the same command with --job {job.id}"
        if position == 0:
            return f"once it is whole, {again} takes it in"
        return (
            f"the lines up to {position:,} are in the Job {job.id} and get their answers: once the input is whole and "
            f"begins with the same lines, {again} goes on behind them"
        )

    def _id(self, job: Job | str) -> str:
        return job.id if isinstance(job, Job) else self.find(job).id


def _shown_values(values: Mapping[str, Any], names: Collection[str]) -> str:
    return ", ".join(f"no {name}" if values[name] is None else f"{name}={values[name]!r}" for name in names)
