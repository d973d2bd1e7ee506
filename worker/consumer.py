"""Celery's consumer, made to survive the loss of its broker."""

from celery.worker.consumer import Consumer as CeleryConsumer


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """kombu 5.7 would put unacked messages back through the connection that has just been lost, and end the worker
        with an AttributeError. They are safe without that: the ledger has every Chunk, claimed or not."""
        if self.task_consumer is not None:
            self.task_consumer.channel.qos.restore_at_shutdown = False
        super().on_connection_error_after_connected(exc)
