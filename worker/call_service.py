"""The life of calls in this worker: read, computed before anything else, answered through Celery, never leased.

A thread of its own takes them up, so that none waits for a Chunk to be prepared; and another those with megabytes of
text, whose tokenizing takes many seconds.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from protocol.errors import InvalidRequest
from protocol.requests import Answer, Failure
from worker.call_reading import read_call, words
from worker.inference import Inference
from worker.open_call import OpenCall, Ticket
from worker.reply import Reply, error_of

logger = logging.getLogger("millrace.worker")

#: Characters from which a call is a large one: a tokenizer takes about a tenth of a second for so many.
_LARGE = 100_000


class CallService:
    """`keep` stores an answer that is new to the database; `on_fatal` is called when work cannot go on."""

    def __init__(
        self,
        inference: Inference,
        models: Sequence[str],
        tenant: str,
        *,
        keep: Callable[[bytes, Answer], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._inference = inference
        self._models = models
        self._tenant = tenant
        self._keep = keep
        self._on_fatal = on_fatal
        self._small: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._large: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._is_closing = False
        self._open: dict[str, OpenCall] = {}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(self._small,), name="calls", daemon=True),
            threading.Thread(target=self._run, args=(self._large,), name="large calls", daemon=True),
        ]

    def start(self) -> None:
        """The Inference must have started."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Takes up what has come in, and nothing more; of large calls only the one in hand, since each of hundreds may
        take a second. What nobody answers here any more goes to another worker."""
        self._is_closing = True
        for tickets in (self._small, self._large):
            tickets.put(None)
        for thread in self._threads:
            thread.join()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def receive(self, ticket: Ticket) -> None:
        """A call has come in. Returns at once. One that is open here already is joined."""
        with self._lock:
            running = self._open.get(ticket.task_id)
            if running is not None:
                running.tickets.append(ticket)
                return
            call = OpenCall(ticket, self._tenant, keep=self._keep, on_end=self._end)
            self._open[ticket.task_id] = call
        is_large = sum(map(len, words((ticket.args, ticket.kwargs)))) >= _LARGE
        (self._large if is_large else self._small).put(ticket)

    def cancel(self, task_id: str) -> None:
        """The caller has been told otherwise: free what was computed for it alone."""
        with self._lock:
            call = self._open.pop(task_id, None)
        if call is not None:
            self._inference.abandon(call)
            for ticket in call.tickets:
                ticket.discard()

    def _run(self, tickets: "queue.SimpleQueue[Ticket | None]") -> None:
        try:
            while (ticket := tickets.get()) is not None:
                if self._is_closing and tickets is self._large:
                    with self._lock:
                        self._open.pop(ticket.task_id, None)
                else:
                    self._answer(ticket)
        except Exception:
            logger.exception("the thread that answers calls broke")
            self._on_fatal("the thread that answers calls broke; see the traceback above")

    def _answer(self, ticket: Ticket) -> None:
        with self._lock:
            call = self._open.get(ticket.task_id)
        if call is None:
            return  # cancelled before its turn
        try:
            request = read_call(ticket.kind, ticket.args, ticket.kwargs, self._models)
            self._inference.preparation.run(call, [request])
        except InvalidRequest as error:
            self._end(call, error_of(Failure(error.code, error.message)))
        except UnicodeEncodeError:
            self._end(call, error_of(Failure("invalid_utf8", "a text has half of a surrogate pair: leave it out")))
        except Exception as error:
            # Its message may quote what the caller wrote: the type and the place must do.
            logger.error("task %s could not be prepared: %s", ticket.task_id, _place_of(error))
            self._end(call, error_of(Failure("internal_error", f"the worker failed at this: {_place_of(error)}")))

    def _end(self, call: OpenCall, outcome: Reply | Exception) -> None:
        with self._lock:
            if self._open.get(call.task_id) is not call:
                return  # cancelled meanwhile
            del self._open[call.task_id]
        shown = outcome if isinstance(outcome, Reply) else str(outcome).partition(":")[0]
        logger.info("%s %s: %s, %.3f s", call.kind, call.task_id, shown, call.seconds)
        *older, newest = call.tickets
        newest.complete(outcome)
        for ticket in older:
            ticket.discard()


def _place_of(error: Exception) -> str:
    """The error's type, and where it was raised."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f" in {code.co_qualname}, {code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}{place}"
