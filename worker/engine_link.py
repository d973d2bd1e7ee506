"""The engine process from the outside: started, spoken with over one socket, started again when it dies.

The registry of running generations is the only memory of what the engine owes; a new engine gets all of it again.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from protocol.errors import ConfigurationError, EngineDied
from protocol.frames import EngineFailed, EngineReady, Intake, StepFrame, receive_frame, send_frame
from protocol.settings import EngineSettings

logger = logging.getLogger("millrace.worker")

#: Wait before the next start, by the number of starts that failed in a row: a driver needs a moment after a fault.
_RESTART_DELAYS_S = (0.0, 0.5, 2.0, 5.0, 15.0)
_STOP_GRACE_S = 5.0
#: How often the watchdog looks.
_WATCH_INTERVAL_S = 1.0
#: How long a step may take without a setting: on a CPU one of a long prompt takes minutes.
_HANG_S, _HANG_ON_CPU_S = 60.0, 600.0


class _Killed(EngineDied):
    """By a signal, before it had said anything."""


class EngineLink:
    """Owns the process and its socket: `module` is what runs in it, worker.engine.process or what speaks as it does.

    `on_step` and `on_death` run in the link's own thread.

    `on_ready` runs there too when a new engine has replaced a dead one. It gets a function that opens the way to the
    new engine, to be called under whatever lock keeps others from sending before all that is owed has been sent.
    """

    def __init__(
        self,
        settings: EngineSettings,
        module: str,
        start_timeout_s: float,
        hang_s: float | None,
        *,
        has_work: Callable[[], bool],
        on_ready: Callable[[Callable[[], None]], None],
        on_step: Callable[[StepFrame], None],
        on_death: Callable[[], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._module = module
        self._start_timeout_s = start_timeout_s
        self._hang_s = hang_s
        self._has_work = has_work
        self._progress_at = time.monotonic()  # when a step was finished, or there was nothing to do
        self._on_ready, self._on_step, self._on_death, self._on_fatal = on_ready, on_step, on_death, on_fatal
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned: socket.socket | None = None  # to a process that is not ready yet
        self._socket: socket.socket | None = None
        self._send_lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-link", daemon=True)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def spawn(self) -> None:
        """Starts the process; the model loads in it while the caller does something else."""
        self._spawned = self._spawn()

    def start(self) -> EngineReady:
        """Blocks until the model is loaded. Raises ConfigurationError or EngineDied when it cannot be."""
        assert self._spawned is not None, "spawn first"
        ready = self._first_ready()
        self._fingerprint = ready.fingerprint
        if self._hang_s is None:
            self._hang_s = _HANG_S if ready.device.startswith("cuda") else _HANG_ON_CPU_S
        self._connect(self._spawned)
        self._thread.start()
        threading.Thread(target=self._watch, name="engine-watchdog", daemon=True).start()
        return ready

    def send(self, intake: Intake) -> None:
        """Dropped when the engine is down: the next one is told everything by `on_ready`."""
        with self._send_lock:
            if self._socket is None:
                return
            try:
                send_frame(self._socket, intake)
            except OSError:
                logger.debug("the engine went away while being spoken to")

    def stop(self) -> None:
        """Ends the engine: it sees end-of-file; one that does not heed it is killed."""
        self._is_stopping.set()
        if self._socket is None and self._spawned is not None:
            self._spawned.close()
        self._close()
        if self._thread.is_alive():
            self._thread.join(_STOP_GRACE_S)

    def _spawn(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", self._module, "--fd", str(theirs.fileno())]
        command += ["--settings", msgspec.json.encode(self._settings).decode()]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=self._environment()
            )
        return ours

    def _first_ready(self) -> EngineReady:
        delays = iter(_RESTART_DELAYS_S)
        while True:
            assert self._spawned is not None
            try:
                return self._await_ready(self._spawned)
            except _Killed as error:
                # A signal is somebody else's doing and may not come again; what the engine itself says would.
                delay_s = next(delays, None)
                if delay_s is None or self._is_stopping.wait(delay_s):
                    raise
                logger.error("%s; starting another", error)
                self._spawned = self._spawn()

    def _await_ready(self, ours: socket.socket) -> EngineReady:
        try:
            ours.settimeout(self._start_timeout_s)
            frame = receive_frame(ours)
        except TimeoutError:
            ours.close()
            self._reap()
            raise EngineDied(
                f"the model was not loaded within {self._start_timeout_s:.0f} s; raise MILLRACE_ENGINE_START_SECONDS"
            ) from None
        except OSError:
            frame = None
        if isinstance(frame, EngineReady):
            ours.settimeout(None)
            logger.info(
                "engine ready: pid %d, %s, %s, layout %s, attention %s, context %d tokens, KV cache %d tokens",
                self.pid, frame.device, frame.dtype, frame.layout, frame.attention_backend, frame.max_model_len,
                frame.kv_tokens,
            )  # fmt: skip
            return frame
        ours.close()
        code = self._reap()
        if isinstance(frame, EngineFailed):
            raise (ConfigurationError if frame.is_callers else EngineDied)(frame.message)
        death = _Killed if code is not None and code < 0 else EngineDied
        raise death(f"the engine process ended with exit code {code} before it was ready; its log says why")

    def _environment(self) -> dict[str, str]:
        # Threads that spin at OpenMP's barriers take the cores from the very thread they wait for as soon as anything
        # else runs: 4.5 times slower with both of two cores busy. Whoever has the machine alone may set ACTIVE.
        return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}

    def _run(self) -> None:
        try:
            self._keep_running()
        except Exception:
            # Without this thread nobody would read what the engine says, nor see it die.
            logger.exception("the thread that listens to the engine broke")
            self._on_fatal("the thread that listens to the engine broke; see the traceback above")

    def _keep_running(self) -> None:
        num_failed = 0
        while True:
            num_failed = 0 if self._read_until_end() else num_failed + 1
            if self._is_stopping.is_set():
                return
            logger.error("the engine process ended with exit code %s; starting another", self._reap())
            self._on_death()
            while num_failed < len(_RESTART_DELAYS_S) and not self._restart(_RESTART_DELAYS_S[num_failed]):
                num_failed += 1
                if self._is_stopping.is_set():
                    return
            if num_failed == len(_RESTART_DELAYS_S):
                self._on_fatal(f"the engine failed {num_failed} times in a row without finishing a step")
                return

    def _read_until_end(self) -> bool:
        """Hand on steps until end-of-file; True when there was at least one."""
        sock, any_step = self._socket, False
        while sock is not None:
            try:
                frame = receive_frame(sock)
            except OSError:
                frame = None
            if frame is None:
                break
            if isinstance(frame, StepFrame):
                any_step = True
                self._progress_at = time.monotonic()
                self._on_step(frame)
        self._close()
        return any_step

    def _restart(self, delay_s: float) -> bool:
        if self._is_stopping.wait(delay_s):
            return False
        try:
            sock = self._spawn()
            ready = self._await_ready(sock)
        except (ConfigurationError, EngineDied) as error:
            logger.error("the engine did not start: %s", error)
            return False
        if ready.fingerprint != self._fingerprint:
            sock.close()
            self._on_fatal("the model's files changed while it was being served; start the worker again")
            return False
        self._on_ready(lambda: self._connect(sock))
        return True

    def _watch(self) -> None:
        """Kill an engine that has work and finishes no step; whoever reads its socket sees a death as any other."""
        assert self._hang_s is not None
        while not self._is_stopping.wait(min(_WATCH_INTERVAL_S, self._hang_s / 4)):
            silent_s = time.monotonic() - self._progress_at
            if self._socket is None or not self._has_work():
                self._progress_at = time.monotonic()
            elif silent_s > self._hang_s and self._process is not None:
                logger.error("the engine has work and has finished no step for %.0f s: killing it", silent_s)
                self._process.kill()
                self._progress_at = time.monotonic()

    def _connect(self, sock: socket.socket) -> None:
        self._progress_at = time.monotonic()
        with self._send_lock:
            self._socket = sock

    def _close(self) -> None:
        with self._send_lock:
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    logger.debug("the engine's socket was closed already")
                self._socket.close()
                self._socket = None
        if self._is_stopping.is_set():
            self._reap()

    def _reap(self) -> int | None:
        if self._process is None:
            return None
        try:
            return self._process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
