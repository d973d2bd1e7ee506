"""LocalSystem: the whole system on one machine. A private Redis and a worker process over a state folder's ledger.

Watched from the caller's own loop: what died is started again, and what keeps dying is given up.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import msgspec

from protocol.errors import WorkerDied
from protocol.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings
from storage.leases import release_all
from storage.ledger import Ledger
from worker.local.child import Child
from worker.local.log_follower import LogFollower
from worker.local.redis_server import RedisServer
from worker.local.state import StateFolder

logger = logging.getLogger("millrace.local")

#: Deaths of one process without a new Result between them, after which starting it again is no use.
_MAX_DEATHS = 3
#: Seconds a worker may take to hand its Chunks back and end.
_WORKER_GRACE_S = 30.0
#: How the command line reports one of our errors; the worker's last such line is what its user has to know.
_ERROR_MARK = "Error: "
_TAIL_LINES = 200
#: Seconds without a new Result after which the worker's last complaint is passed on, since it may say why; and how old
#: that must be, since a younger one may be its last words, which are told when it has ended.
_SILENCE_S = 5.0
#: Less free space than this, and SQLite may not be able to commit any more; nor may the log say so.
_MIN_FREE_BYTES = 4 << 20


class LocalSystem:
    """A context manager: everything runs within and has ended afterwards. Needs the lock of the state folder.

    `worker_command` starts a worker that is configured by `environ` and the MILLRACE_* variables added to it. Entering
    raises ConfigurationError and BrokerUnavailable; the worker's own trouble with starting shows in `supervise`.
    """

    def __init__(
        self,
        state: StateFolder,
        settings: Settings,
        worker_command: Sequence[str],
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._given = settings
        self._worker_command = worker_command
        self._environ = environ
        self._ledger = Ledger(state.database_url)
        self._redis = RedisServer(state.redis_log, held_fds=[state.lock_fd])
        self._worker: Child | None = None
        self._num_results: int | None = None  # when last looked at; a resumed Job begins with some
        self._has_progressed = False
        self._deaths = {"Redis": 0, "worker": 0}
        self._clock = clock
        self._log = LogFollower(state.worker_log)
        self._silent_since = clock()
        self._trouble_kind, self._troubled_since = "", clock()
        self._told: set[str] = set()

    def __enter__(self) -> "LocalSystem":
        try:
            self._ledger.migrate()
            # We hold the folder's lock: whoever had these leases is dead.
            release_all(self._ledger)
            self._redis.start()
            self._start_worker()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def settings(self) -> Settings:
        """How to reach this system, for a Client."""
        # Whoever stops a run wants it to stop: the same command goes on from there anyway.
        own = {"database_url": self._state.database_url, "broker_url": self._redis.url, "drain_seconds": 0.0}
        return msgspec.structs.replace(self._given, **own)

    @property
    def is_worker_ready(self) -> bool:
        """Whether the worker that runs now has said so, as far as `supervise` has seen."""
        return self._log.is_ready

    def supervise(self, num_results: int) -> None:
        """Start again what has died; to be called every second or so, with the number of Results there are.

        Raises WorkerDied for a worker that does not start or keeps dying, BrokerUnavailable for a Redis that does.
        """
        self._log.read()
        if (kind := _kind_of(self._log.trouble or "")) != self._trouble_kind:
            self._trouble_kind, self._troubled_since = kind, self._clock()
        if self._num_results is not None and num_results > self._num_results:
            self._has_progressed = True
            self._deaths = dict.fromkeys(self._deaths, 0)
            self._silent_since = self._clock()
            self._told.clear()
        elif self._clock() - self._silent_since >= _SILENCE_S:
            self._pass_trouble_on()
        self._num_results = num_results
        if not self._redis.is_running:
            self._count_death("Redis", f"see {self._state.redis_log}")
            # Its messages are gone; a worker with nothing to do finds the Chunks in the ledger.
            self._redis.start()
        assert self._worker is not None
        code = self._worker.poll()
        if code is None:
            return
        # A signal is somebody else's doing and may not come again; an error at the start will.
        if 0 < code < 128 and not self._has_progressed:
            raise WorkerDied(self._last_words(self._worker))
        self._count_death("worker", self._last_words(self._worker))
        release_all(self._ledger)
        self._start_worker()

    def _pass_trouble_on(self) -> None:
        """Each complaint once, also when only its numbers change, until there is a Result again."""
        free = shutil.disk_usage(self._state.path).free
        full = f"the disk of the state folder {self._state.path} is full" if free < _MIN_FREE_BYTES else None
        is_known = self._log.trouble is not None and self._clock() - self._troubled_since >= _SILENCE_S
        said = f"no new result for some time; the worker says: {self._log.trouble}" if is_known else None
        for trouble in (full, said):
            if trouble is not None and (kind := _kind_of(trouble)) not in self._told:
                self._told.add(kind)
                logger.warning("%s", trouble)

    def _start_worker(self) -> None:
        self._log.restart()
        self._worker = Child(
            self._worker_command,
            log=self._state.worker_log,
            environ={**_without_settings(self._environ), **settings_environ(self.settings)},
            held_fds=[self._state.lock_fd],
        )

    def _stop(self) -> None:
        # The worker first: it hands its leases back and says goodbye to a Redis that is still there.
        try:
            if self._worker is not None:
                self._worker.stop(_WORKER_GRACE_S)
        finally:
            self._redis.stop()
            self._ledger.close()

    def _count_death(self, name: str, last_words: str) -> None:
        self._deaths[name] += 1
        if self._deaths[name] >= _MAX_DEATHS:
            raise WorkerDied(
                f"the {name} died {_MAX_DEATHS} times without a new result in between, so it is not started again; "
                f"what is done is kept, and the same command goes on from there. Its last words: {last_words}"
            )
        logger.warning("the %s died and is started again: %s", name, last_words)

    def _last_words(self, worker: Child) -> str:
        lines = worker.log_tail(_TAIL_LINES)
        errors = [line.removeprefix(_ERROR_MARK) for line in lines if line.startswith(_ERROR_MARK)]
        if errors:
            return errors[-1]
        last = lines[-1] if lines else "none"
        return f"{last} (exit code {worker.poll()}, see {self._state.worker_log})"


def settings_environ(settings: Settings) -> dict[str, str]:
    """The environment from which `load_settings` reads exactly these settings."""
    values = msgspec.structs.asdict(settings)
    engine = msgspec.structs.asdict(values.pop("engine"))
    values |= {f"engine_{name}": value for name, value in engine.items()}
    shown = {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in values.items()}
    environ = {ENV_PREFIX + name.upper(): text for name, text in shown.items() if values[name] is not None}
    # No file of settings besides: it has been read already, and a value left unset here must stay unset.
    return {**environ, CONFIG_VARIABLE: "/dev/null"}


def _kind_of(trouble: str) -> str:
    return re.sub(r"\d+", "#", trouble)


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}
