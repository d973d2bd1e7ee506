"""A worker process: Celery's consumer in the main thread, what it works on beside it, the engine in a child."""

import gc
import logging
import os
import signal
import sys
import threading
import warnings
from typing import Any

from protocol.celery_app import chunk_queues, make_worker_app
from protocol.errors import BrokerUnavailable
from protocol.settings import PARENT_FD_VARIABLE, Settings
from storage.optional_redis import check_login
from worker.call_service import CallService
from worker.chunk_service import ChunkService
from worker.consumer import Consumer
from worker.engine.model_files import resolve_folder
from worker.inference import ENGINE_MODULE
from worker.interactive_queues import InteractiveQueues, show_all_queues
from worker.pool import EnginePool, PoolParts
from worker.pooled import KINDS
from worker.stop_signals import heed_stop_signals
from worker.tasks import register_tasks

logger = logging.getLogger("millrace.worker")

#: Chunk messages that may wait unclaimed in this process. Claimed ones are acked and bounded by token credit instead.
_PREFETCH = 4
#: Objects made between two looks for cycles among the youngest. Python's own 700 cost as much time as the work itself.
_GC_ALLOCATIONS = 50_000
#: An orderly stop that takes longer than this after the parent's death is cut short.
_ORPHAN_GRACE_S = 20.0


def run_worker(settings: Settings, engine_module: str = ENGINE_MODULE) -> int:
    """Blocks until SIGTERM, SIGINT or the parent's death; the exit code says whether work had to be given up.

    Raises MillraceError when the worker cannot start: settings, schema, model or engine.
    """
    _log_to_stderr(settings.log_level)
    settings.check_topology()
    try:
        check_login(settings.broker_url)
    except BrokerUnavailable as error:
        logger.warning("%s; until then this worker finds its work in the ledger alone", error)
    app = make_worker_app(settings)
    fatal: list[str] = []

    def give_up(message: str) -> None:
        logger.critical("%s", message)
        fatal.append(message)
        service.hurry()  # there is nothing to wait for any more
        os.kill(os.getpid(), signal.SIGTERM)

    service = ChunkService(
        settings,
        resolve_folder(settings.engine.model, settings.engine.revision),
        on_credit=lambda: worker.pool.credit_changed(),
        on_fatal=give_up,
        engine_module=engine_module,
    )
    models = settings.served_models
    calls = CallService(service.inference, models, settings.tenant, keep=service.keep, on_fatal=give_up)
    parts = PoolParts(service, calls, models, settings.shared_queue, lambda: worker.consumer)
    app.millrace = parts
    app.steps["consumer"].add(InteractiveQueues)
    show_all_queues()
    # Made before the engine starts, since the service's threads speak to the pool; it consumes only once started.
    worker: Any = app.Worker(
        pool_cls=EnginePool,
        consumer_cls=Consumer,
        concurrency=_PREFETCH,
        prefetch_multiplier=1,
        queues=list(chunk_queues(*models)),
        hostname=f"{settings.served_model}@{service.owner.replace(':', '-')}",
        loglevel=settings.log_level,
        quiet=True,
        optimization="fair",
        # Asking the neighbours what they know takes a second, and there is nothing to be known: the ledger decides.
        without_mingle=True,
        without_gossip=True,
    )
    _follow_parent()
    service.load()
    # Until here a signal may simply end the process. Celery sets handlers of its own later, and the pool ours again.
    heed_stop_signals(service.hurry)
    service.start()
    calls.start()
    engine, num_engines = service.inference.engine, service.inference.num_engines
    parts.max_calls = engine.max_num_seqs * num_engines
    register_tasks(app, parts, KINDS[engine.task])
    _collect_garbage_less_often()
    worker.start()
    logger.info("worker ended")
    return 1 if fatal else int(worker.exitcode or 0)


def _collect_garbage_less_often() -> None:
    """Thousands of Requests are alive at a time, in no cycles: looking through them again and again finds nothing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS, 20, 20)


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # Celery's tracer times only itself, since the engine is done when it runs; the worker logs with true times.
    logging.getLogger("celery.app.trace").setLevel(logging.WARNING)
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)
    # Says how it speaks to the database at every check of the tables.
    logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
    # Celery warns of root because of pickle, which is never accepted here; containers run as root all the time.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")


def _follow_parent() -> None:
    """Stop in order when the descriptor that a supervising parent keeps open reaches end-of-file."""
    descriptor = os.environ.get(PARENT_FD_VARIABLE)
    if descriptor is None:
        return

    def watch() -> None:
        while os.read(int(descriptor), 1):
            pass
        logger.warning("the parent is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
