"""EngineGroup: the engines of one worker, one per visible GPU unless told otherwise, each with its own link.

How many GPUs there are is asked of the first engine, so that no other process has to load torch for it.
"""

import logging
from collections.abc import Callable
from functools import partial

import msgspec

from protocol.errors import ConfigurationError
from protocol.frames import EngineReady, Intake, StepFrame
from protocol.settings import EngineSettings
from worker.engine_link import EngineLink

logger = logging.getLogger("millrace.worker")


class EngineGroup:
    """Callbacks are EngineLink's, with the engine's number first where it matters; they run in the links' threads."""

    def __init__(
        self,
        settings: EngineSettings,
        module: str,
        num_engines: int | None,
        start_timeout_s: float,
        hang_s: float | None,
        *,
        has_work: Callable[[int], bool],
        on_ready: Callable[[int, Callable[[], None]], None],
        on_step: Callable[[StepFrame], None],
        on_death: Callable[[int], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        if num_engines is not None and num_engines < 1:
            raise ConfigurationError(f"num_engines={num_engines} is too small: it must be at least 1")
        self._settings = settings
        self._module = module
        self._num_engines = num_engines
        self._start_timeout_s = start_timeout_s
        self._hang_s, self._has_work = hang_s, has_work
        self._on_ready, self._on_step, self._on_death, self._on_fatal = on_ready, on_step, on_death, on_fatal
        self._links: list[EngineLink] = []

    def spawn(self) -> None:
        """Starts the first engine's process; the model loads in it while the caller does something else."""
        self._add(self._settings)

    def start(self) -> list[EngineReady]:
        """Blocks until all engines are ready. Raises ConfigurationError or EngineDied when one cannot be."""
        first = self._links[0].start()
        num = self._num_engines or first.num_devices
        for i in range(1, num):
            self._add(self._settings_of(i, first))
        ready = [first, *(link.start() for link in self._links[1:])]
        if any(each.fingerprint != first.fingerprint for each in ready):
            raise ConfigurationError("the model's files changed while the engines were started; start the worker again")
        if num > 1:
            logger.info("%d engines: %s", num, ", ".join(each.device for each in ready))
        return ready

    def send(self, engine: int, intake: Intake) -> None:
        """Dropped when that engine is down: the next one is told everything by `on_ready`."""
        self._links[engine].send(intake)

    def stop(self) -> None:
        for link in self._links:
            link.stop()

    def _add(self, settings: EngineSettings) -> None:
        number = len(self._links)
        link = EngineLink(
            settings,
            self._module,
            self._start_timeout_s,
            self._hang_s,
            has_work=partial(self._has_work, number),
            on_ready=partial(self._on_ready, number),
            on_step=self._on_step,
            on_death=partial(self._on_death, number),
            on_fatal=self._on_fatal,
        )
        link.spawn()
        self._links.append(link)

    def _settings_of(self, engine: int, first: EngineReady) -> EngineSettings:
        if not first.device.startswith("cuda"):
            return self._settings
        return msgspec.structs.replace(self._settings, device=f"cuda:{engine % first.num_devices}")
