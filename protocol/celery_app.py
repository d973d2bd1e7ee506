"""The Celery app both sides share: broker options, serializers, task and queue names.

Messages are msgpack inside Millrace; JSON is accepted from foreign callers, pickle never. Results are JSON, because
`AsyncResult.get()` decodes with the reader's serializer and a foreign reader has JSON.
"""

from celery import Celery

from protocol.priority import PRIORITIES, Priority, rank
from protocol.settings import Settings

CHUNK_TASK = "millrace.chunk"

#: Seconds a Celery result (a count such as "64 ok, 2 error") stays readable; the Results themselves live in SQL.
_RESULT_EXPIRES_S = 86_400


def bulk_queue(model: str) -> str:
    """The queue that carries the Chunks of one served model's bulk Jobs."""
    return f"millrace.{model}.bulk"


def normal_queue(model: str) -> str:
    """The queue that carries the Chunks of its other Jobs, the interactive ones among them."""
    return f"millrace.{model}.normal"


def chunk_queue(model: str, priority: Priority) -> str:
    """The queue for the Chunks of such a Job. Which Chunk a message gets is decided in the ledger."""
    return bulk_queue(model) if priority == "bulk" else normal_queue(model)


def chunk_queues(model: str) -> dict[str, tuple[int, ...]]:
    """All queues of Chunks, with the classes, as `rank` numbers them, whose Chunks their messages are for."""
    ranks: dict[str, tuple[int, ...]] = {}
    for priority in PRIORITIES:
        queue = chunk_queue(model, priority)
        ranks[queue] = (*ranks.get(queue, ()), rank(priority))
    return ranks


def make_app(settings: Settings) -> Celery:
    """A configured app; connects to nothing."""
    app = Celery("millrace", broker=settings.broker_url, backend=settings.broker_url, set_as_current=False)
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
        broker_transport_options={"unacked_restore_interval": 1, "unacked_restore_throttle": 1},
    )
    return app
