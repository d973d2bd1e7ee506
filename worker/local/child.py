"""Child: a process that cannot outlive this one, run under the guard, its output in a log file."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from protocol.settings import PARENT_FD_VARIABLE
from worker.local import guard

#: Seconds beyond the guard's own grace, after which something is wrong with the guard itself.
_GUARD_SLACK_S = 5.0
#: Of a log's end that is searched for an error; a traceback fits many times.
_TAIL_BYTES = 65_536


class Child:
    """Starts at once. Raises OSError when the log cannot be written."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environ: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        held_fds: Sequence[int] = (),
    ) -> None:
        """`held_fds` stay open until the command has ended, whatever becomes of this process: locks, for example."""
        self._log = log
        watched, self._lifeline = os.pipe()
        guarded = [sys.executable, "-I", "-S", guard.__file__, "--fd", str(watched), "--", *command]
        try:
            with log.open("ab") as output:
                self._log_start = output.tell()
                # A session of its own: Ctrl-C on the terminal is for us to pass on, in order.
                self._process = subprocess.Popen(
                    guarded,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**(os.environ if environ is None else environ), PARENT_FD_VARIABLE: str(watched)},
                    pass_fds=[watched, *held_fds],
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(watched)
        self._feed(stdin)

    @property
    def pid(self) -> int:
        """The guard's."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code once it has ended: negative when the guard was killed, over 128 when the command was."""
        code = self._process.poll()
        if code is not None:
            self._cut_lifeline()
        return code

    def stop(self, grace_s: float) -> None:
        """SIGTERM, `grace_s` to end in order, then the guard's short way; returns when the command has ended."""
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._cut_lifeline()
            try:
                self._process.wait(guard.ORPHAN_GRACE_S + _GUARD_SLACK_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._cut_lifeline()

    def log_tail(self, num_lines: int) -> list[str]:
        """The last lines it has printed since it was started."""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-num_lines:]

    def _feed(self, stdin: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(stdin)
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already, which poll() says

    def _cut_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
