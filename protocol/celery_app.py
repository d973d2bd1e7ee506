"""The Celery app both sides share: broker options, serializers, task and queue names.

Messages are msgpack inside Millrace; JSON is accepted from foreign callers, pickle never. Results are JSON, because
`AsyncResult.get()` decodes with the reader's serializer and a foreign reader has JSON. So is what a worker publishes
for a caller, the rest of a chain or the callback of a chord, since it may go to a foreign worker.
"""

from celery import Celery

from protocol.priority import PRIORITIES, Priority, rank
from protocol.requests import Kind
from protocol.sentinels import parse_sentinels
from protocol.settings import Settings

CHUNK_TASK = "millrace.chunk"
#: Interactive: one Request inline, answered through Celery's result backend.
CALL_TASKS: dict[str, Kind] = {
    "millrace.generate": "generate",
    "millrace.score": "score",
    "millrace.embed": "embed",
    "millrace.classify": "classify",
}

#: Seconds a Celery result (a count such as "64 ok, 2 error") stays readable; the Results themselves live in SQL.
_RESULT_EXPIRES_S = 86_400
#: Seconds without a sign of life, and as many again, after which a connection to the broker counts as lost: a Redis
#: that has vanished with its machine, or the network to it, sends no end of it.
_HEALTH_CHECK_S = 10
#: Seconds that storing a reply, which holds up a worker's event loop, waits for Redis.
_STORE_TIMEOUT_S = 2.0
#: Seconds after which a worker that died while it gave messages back no longer keeps others from doing so.
_RESTORE_LOCK_S = 10


def bulk_queue(model: str) -> str:
    """The queue that carries the Chunks of one served model's bulk Jobs."""
    return f"millrace.{model}.bulk"


def normal_queue(model: str) -> str:
    """The queue that carries the Chunks of its other Jobs, the interactive ones among them."""
    return f"millrace.{model}.normal"


def chunk_queue(model: str, priority: Priority) -> str:
    """The queue for the Chunks of such a Job. Which Chunk a message gets is decided in the ledger."""
    return bulk_queue(model) if priority == "bulk" else normal_queue(model)


def chunk_queues(*models: str) -> dict[str, tuple[int, ...]]:
    """The queues of these models' Chunks, with the classes, numbered by `rank`, whose Chunks their messages are for."""
    ranks: dict[str, tuple[int, ...]] = {}
    for model in models:
        for priority in PRIORITIES:
            queue = chunk_queue(model, priority)
            ranks[queue] = (*ranks.get(queue, ()), rank(priority))
    return ranks


def interactive_queue(model: str) -> str:
    """The queue that carries the calls for one served model; see also Settings.shared_queue."""
    return f"millrace.{model}.interactive"


def make_app(settings: Settings) -> Celery:
    """A configured app; connects to nothing."""
    sentinels = parse_sentinels(settings.broker_url)
    url = settings.broker_url if sentinels is None else sentinels.celery_url
    app = Celery("millrace", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_serializer="msgpack",
        result_serializer="json",
        event_serializer="json",
        accept_content=["msgpack", "json"],
        result_expires=_RESULT_EXPIRES_S,
        task_default_queue=bulk_queue(settings.served_model),
        task_send_sent_event=True,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # for ever: the ledger keeps everything while Redis is away
        # Results are stored from the worker's event loop: waiting long for an absent Redis would hold up all else.
        result_backend_transport_options={
            "retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}
        },
        broker_transport_options={
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "health_check_interval": _HEALTH_CHECK_S,
        },
    )
    if sentinels is not None:
        app.conf.broker_transport_options |= sentinels.celery_options
        app.conf.result_backend_transport_options |= sentinels.celery_options
    return app


def make_worker_app(settings: Settings) -> Celery:
    """An app that consumes, and publishes for callers what follows on their calls; connects to nothing."""
    app = make_app(settings)
    app.conf.update(
        task_serializer="json",
        # Where a foreign app with no setting of its own would have sent what follows, if nothing else is said.
        task_default_queue=settings.shared_queue or "celery",
        # What follows on a call holds its answer: nothing of it is told to whoever watches.
        task_send_sent_event=False,
        redis_socket_timeout=_STORE_TIMEOUT_S,
        redis_socket_connect_timeout=_STORE_TIMEOUT_S,
        # A Redis that is full, cannot write its disk or has just become a replica refuses what it is told, for a while.
        broker_channel_error_retry=True,
    )
    app.amqp.argsrepr_maxsize = app.amqp.kwargsrepr_maxsize = 0
    # Of this system's workers alone: in Celery's own keys, unacked messages of other apps' workers in the same Redis
    # would be handed out again as early as ours. Ours renew their own; see worker.interactive_queues.
    app.conf.broker_transport_options |= {
        "unacked_key": "millrace:unacked",
        "unacked_index_key": "millrace:unacked_index",
        "unacked_mutex_key": "millrace:unacked_mutex",
        "unacked_mutex_expire": _RESTORE_LOCK_S,
        "visibility_timeout": settings.lease_seconds,
    }
    return app


def make_watching_app(broker_url: str) -> Celery:
    """An app that only looks on: it has no result backend, and so cannot show anybody's answers."""
    return Celery("millrace", broker=broker_url, set_as_current=False)
