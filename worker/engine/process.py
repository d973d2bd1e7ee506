"""The engine process: `python -m worker.engine.process --fd N --settings JSON` serves one Engine over a socket.

It ends when its parent does, which it sees as end-of-file, also in the middle of a step or of loading. Its log goes to
stderr and holds no prompt and no token.
"""

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Sequence

import msgspec

from protocol.errors import CallerError, ConfigurationError
from protocol.faults import fault_point
from protocol.frames import EngineFailed, Frame, Intake, receive_frame, send_frame
from protocol.settings import EngineSettings
from worker.engine.engine import Engine
from worker.engine.model_files import resolve_folder
from worker.engine.pooling_engine import PoolingEngine
from worker.engine.task import choose_task

log = logging.getLogger("millrace.engine")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.engine.process", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the parent")
    parser.add_argument("--settings", required=True, help="EngineSettings as JSON")
    arguments = parser.parse_args(argv)

    # Ctrl-C, and a service manager's SIGTERM, reach the whole process group; when the engine ends is the parent's
    # decision, which it tells by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sock = socket.socket(fileno=arguments.fd)
    intakes: queue.SimpleQueue[Intake] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sock, intakes), name="receive", daemon=True).start()
    try:
        fault_point("engine load")
        engine = _start(arguments.settings)
    except CallerError as error:
        log.error("the engine cannot start: %s", error)
        _send(sock, EngineFailed(str(error), is_callers=True))
        return 1
    except Exception as error:
        log.exception("the engine cannot start")
        _send(sock, EngineFailed(f"{type(error).__name__}: {error}", is_callers=False))
        return 1
    try:
        _send(sock, engine.ready())
        _serve(engine, sock, intakes)
    except Exception:
        log.exception("the engine broke")
    return 1


def _start(text: str) -> Engine | PoolingEngine:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        settings = msgspec.json.decode(text, type=EngineSettings)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"the engine's settings cannot be read: {error}") from error
    folder = resolve_folder(settings.model, settings.revision)
    if (task := choose_task(folder, settings)) != "generate":
        return PoolingEngine.start(settings, task)
    return Engine.start(settings)


def _serve(engine: Engine | PoolingEngine, sock: socket.socket, intakes: "queue.SimpleQueue[Intake]") -> None:
    """Steps while there is work, taking in what has arrived in between; waits for an Intake when there is none."""
    while True:
        while not engine.has_work or not intakes.empty():
            _take_in(engine, intakes.get())
        fault_point("engine step")
        frame = engine.step()
        if frame is not None:
            for _, _, num_tokens in frame.finished:
                fault_point("end of %d tokens", num_tokens)
            _send(sock, frame)


def _take_in(engine: Engine | PoolingEngine, intake: Intake) -> None:
    for new in intake.add:
        engine.add(new)
    for seq_id, priority in intake.urge:
        engine.change_priority(seq_id, priority)
    for seq_id, num_kept in intake.finish:
        engine.finish(seq_id, num_kept)


def _receive(sock: socket.socket, intakes: "queue.SimpleQueue[Intake]") -> None:
    """The reader thread. With the parent gone nobody wants the running step's tokens, so nothing is wound up."""
    try:
        while (frame := receive_frame(sock)) is not None:
            if not isinstance(frame, Intake):
                raise TypeError(f"the engine was sent a {type(frame).__name__}, and takes Intakes alone")
            intakes.put(frame)
        log.info("the parent has closed the pipe")
        _exit(0)
    except Exception:
        log.exception("the pipe from the parent broke")
        _exit(1)


def _send(sock: socket.socket, frame: Frame) -> None:
    try:
        send_frame(sock, frame)
    except OSError:
        log.info("the parent no longer reads the pipe")
        _exit(0)


def _exit(code: int) -> None:
    """At once: an orderly exit would wait for the device and for threads that are in the middle of something."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # Daemon threads inside torch or the reader must not be able to hold up the end either.
    _exit(main())
