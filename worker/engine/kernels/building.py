"""Building: kernels compiled before their first launch, in processes of their own.

Triton compiles a kernel when it is first launched, in half a second or more, one after the other, while whoever
launches waits. Here launches are only noted, by the hook that Triton asks before it compiles; processes compile what
was noted into Triton's cache, and the first real launch finds it there. Threads would not do: beside torch.compile,
which is Python too, they wait for the interpreter most of the time.

    python -m worker.engine.kernels.building < launches.json
"""

import hashlib
import importlib
import itertools
import json
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("millrace.engine")

#: The module that such a process runs.
_BUILDER = __name__
#: Processes at most: the longest of the kernels takes as long as some of the others together.
_MOST_PROCESSES = 8
#: Seconds after which whoever waits goes on without them.
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Launch:
    """What Triton would compile for a launch."""

    module: str
    kernel: str
    specialization: str  # Triton's own description of it, for JITFunction.preload
    source: str  # a hash of the kernel's source, and of what it calls
    length: int  # of its source, a hint at how long it takes


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches within run nothing and compile nothing; of those that would compile, each kind is listed once. What they
    would have written is not written."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    found: dict[tuple[str, str, str], Launch] = {}

    def note(*, fn: Any, **others: Any) -> bool:
        specialization = others["compile"]["specialization_data"]
        key = fn.module, fn.name, specialization
        if key not in found:
            found[key] = Launch(*key, fn.jit_function.cache_key, len(fn.jit_function.src))
        return True  # there is nothing to be compiled

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # Also of a kernel that this process has: it would read what another did not write.
        own_run(kernel, *arguments, grid=grid, warmup=True, **options)

    launches: list[Launch] = []
    own_hook, own_run = knobs.runtime.jit_cache_hook, JITFunction.run
    knobs.runtime.jit_cache_hook, JITFunction.run = note, run
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = own_hook, own_run
        launches += found.values()


@contextmanager
def building(launches: Sequence[Launch], num_processes: int | None = None) -> Iterator[None]:
    """Compile what these launches need in the meantime, unless that has been done on this machine before; at the end
    it is there. What fails is compiled once more when it is launched, and fails there for all to see."""
    if not launches:
        yield
        return
    keep_one_cache()
    stamp = _stamp(launches)
    if stamp.exists():
        yield
        return
    started = time.perf_counter()
    num_processes = min(num_processes or _num_processes(), len(launches))
    ordered = sorted(launches, key=lambda launch: -launch.length)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        try:
            for i in range(num_processes):
                processes.append(_start(ordered[i::num_processes]))
        except OSError as error:
            log.warning("kernels are compiled only when they are launched: %s", error)
        yield
        deadline = time.perf_counter() + _PATIENCE
        if sum(_is_done(process, deadline) for process in processes) == num_processes:
            with suppress(OSError):  # the cache may be there to be read alone
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.touch()
    finally:
        for process in processes:
            process.kill()  # one that has ended is left alone
            process.wait()
    seconds = time.perf_counter() - started
    log.info("%d kernels built in %d processes, done after %.1f s", len(launches), len(processes), seconds)


def keep_one_cache() -> None:
    """Triton's own folder for all compiled kernels. torch.compile would set another one in passing, whenever it first
    has something to compile: what is compiled after that would not be found by a process that has nothing to."""
    from triton import knobs

    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)


def compile_launches(launches: Iterable[dict[str, Any]]) -> int:
    """Compile Launches, given as dicts, into Triton's cache; the number of those that cannot be compiled."""
    from triton.runtime import driver

    num_failed = 0
    for launch in launches:
        try:
            kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
            compiled = kernel.preload(launch["specialization"])
            # With the code that launches it, for which Triton may ask a C compiler.
            driver.active.launcher_cls(compiled.src, compiled.metadata)
        except Exception as error:
            log.warning("%s cannot be compiled ahead of its launch: %s", launch["kernel"], error)
            num_failed += 1
    return num_failed


def _stamp(launches: Sequence[Launch]) -> Path:
    """The file that says that all of these are in the cache; it lies there, so that it goes when the cache does."""
    import triton

    parts = [triton.__version__, str(sysconfig.get_config_var("EXT_SUFFIX"))]
    parts += sorted(json.dumps(asdict(launch)) for launch in launches)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Path(triton.knobs.cache.dir) / f"millrace-{digest[:32]}"


def _num_processes() -> int:
    """Half of the processors, since torch.compile wants some as well, and engines on other GPUs may start too."""
    import torch

    shares = 2 * max(torch.cuda.device_count(), 1)
    return max(min(len(os.sched_getaffinity(0)) // shares, _MOST_PROCESSES), 1)


def _start(launches: Sequence[Launch]) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:  # no pipe: nobody has to wait until it is read
        file.write(json.dumps([asdict(launch) for launch in launches]).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", _BUILDER],  # what lies in the working folder is not ours
            stdin=file,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )


def _is_done(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        return process.wait(max(deadline - time.perf_counter(), 0)) == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    parent = os.getppid()
    wanted = itertools.takewhile(lambda _: os.getppid() == parent, json.load(sys.stdin))  # by nobody once it has died
    return 1 if compile_launches(wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
