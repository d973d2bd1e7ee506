"""Doorbell: tells the queue that a Chunk is ready. A bell that does not ring costs seconds, never a Chunk."""

import logging
import time

from kombu.exceptions import OperationalError

from protocol.celery_app import CHUNK_TASK, chunk_queue, make_app
from protocol.errors import ConfigurationError
from protocol.priority import Priority
from protocol.settings import Settings
from storage.optional_redis import translated

logger = logging.getLogger("millrace.producer")

#: Seconds a broker may take to accept a connection and to answer.
_TIMEOUT_S = 5.0
#: Seconds without another try after a failed one: each Chunk of a long submit would wait for the same timeout again.
_REST_S = 10.0


class Doorbell:
    """Connects when it first rings."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)
        timeouts = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
        self._app.conf.broker_transport_options |= timeouts
        self._broker_url = settings.broker_url
        self._resting_until = 0.0
        self._is_told = self._is_proven = False

    def ring(self, chunk_id: int, model: str, priority: Priority) -> None:
        """Publish the Chunk's message.

        Raises ConfigurationError when Redis refuses the login and never took it so far: settings that have worked are
        not wrong.
        """
        if time.monotonic() < self._resting_until:
            return
        try:
            # Nobody reads the task's result through Celery, and asking for it would subscribe to it in Redis.
            self._app.send_task(
                CHUNK_TASK,
                args=(chunk_id,),
                queue=chunk_queue(model, priority),
                ignore_result=True,
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0.1},
            )
            self._is_proven = True
        except OperationalError as error:
            trouble = translated(error, self._broker_url)
            if isinstance(trouble, ConfigurationError) and not self._is_proven:
                raise trouble from error
            self._resting_until = time.monotonic() + _REST_S
            if not self._is_told:
                self._is_told = True
                logger.warning(
                    "%s; the Job goes into the ledger all the same, where a worker looks every second or two while it "
                    "has room for more",
                    trouble,
                )

    def close(self) -> None:
        """Close the connections."""
        self._app.close()
