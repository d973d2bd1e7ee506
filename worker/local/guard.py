"""A small process between a parent and its child: the child ends when the parent does, however the parent ended.

Run by path, so that it starts without Millrace's imports: `python -I -S guard.py --fd N -- command...`. N is the read
end of a pipe whose only write end the parent holds: end-of-file there means that the parent is gone. The guard exits
with the child's code, or with 128 plus the number of the signal that killed the child.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

#: Seconds between SIGTERM and SIGKILL once the parent is gone: nobody is left to wait for an orderly end.
ORPHAN_GRACE_S = 3.0
#: Exit code, as a shell's, of a command that cannot be started.
CANNOT_START = 127

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def main(argv: list[str]) -> int:
    """`argv` is `--fd N -- command...`."""
    if len(argv) < 4 or argv[0] != "--fd" or argv[2] != "--":
        print("usage: guard.py --fd N -- command...", file=sys.stderr)
        return 2
    return run(argv[3:], parent_fd=int(argv[1]))


def run(command: list[str], parent_fd: int) -> int:
    """Start the command, watch over it until it ends, and say how it ended."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    # Python runs these in the loop's select, which the wake-up pipe ends; before the child is there, nothing is lost.
    asked_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _frame: asked_to_stop.append(signum))
    signal.signal(signal.SIGCHLD, lambda *_: None)

    try:
        child = subprocess.Popen(command, pass_fds=[parent_fd], preexec_fn=_dying_with(os.getpid()))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr)
        return CANNOT_START

    watched, timeout_s = [parent_fd, wake_read], None
    while child.poll() is None:
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if not ready:
            child.kill()
            child.wait()
        if wake_read in ready:
            os.read(wake_read, 4096)
        while asked_to_stop:
            child.send_signal(asked_to_stop.pop(0))
        if parent_fd in ready:
            child.terminate()
            watched, timeout_s = [wake_read], ORPHAN_GRACE_S
    code = child.wait()
    return code if code >= 0 else 128 - code


def _dying_with(guard_pid: int) -> Callable[[], None] | None:
    """What the child does before its command: ask the kernel to be killed with the guard."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        # The signal follows the parent's thread; this process has one.
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != guard_pid:
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
