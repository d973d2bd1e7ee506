"""AsyncClient: what Client does, for coroutines. Whatever blocks runs in threads, and stops when its task is cancelled.

Calls that only ask the ledger share a few threads. Each that waits or takes long has one of its own meanwhile, so
hundreds of them at once are fine and ten thousand are not; `ask` needs none, however many wait.
"""

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from producer.client import UNSET_PARAMS, Client
from producer.handover import Handover
from producer.job_results import Order
from producer.source import Input, Source
from producer.wakeups import Wakeup
from protocol.errors import TimedOut
from protocol.priority import Priority
from protocol.requests import Request, Result
from protocol.sampling import SamplingParams
from protocol.settings import Settings
from storage.completeness import Verification
from storage.dead_letters import DeadLetter
from storage.jobs import Job, JobStatus

P = ParamSpec("P")
T = TypeVar("T")

#: What `submit` takes: all that Client's takes, and items that come one by one.
AsyncInput = Input | AsyncIterable[str | Mapping[str, Any]]

#: Threads for calls that only ask the ledger: as many as there are pooled connections to PostgreSQL.
_NUM_THREADS = 5
#: Seconds between two looks whether an item that is waited for is still wanted.
_CHECK_S = 0.1
_END: Any = object()


class AsyncClient:
    """One tenant's view of the ledger, and the way into the queue; see Client for what each call does and raises.

    An async context manager that belongs to one event loop. It connects on entering, which raises what making a Client
    does. Progress callbacks are called in the event loop.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings
        self._client: Client | None = None
        self._wakeups: dict[threading.Thread, Wakeup] = {}

    async def __aenter__(self) -> "AsyncClient":
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="millrace-client")
        try:
            self._client = await asyncio.get_running_loop().run_in_executor(self._pool, Client, self._given)
        except BaseException:
            self._pool.shutdown(wait=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop whatever waits, and close all connections."""
        client, self._client = self._client, None
        if client is None:
            return
        threads = dict(self._wakeups)
        for wakeup in threads.values():
            wakeup.stop()

        def end() -> None:
            for thread in threads:
                thread.join()
            self._pool.shutdown()
            client.close()

        await asyncio.to_thread(end)

    @property
    def settings(self) -> Settings:
        return self._open.settings

    async def ask(
        self, item: str | Mapping[str, Any], *, params: SamplingParams = UNSET_PARAMS, timeout_s: float | None = None
    ) -> Result:
        """As Client's, for thousands of tasks at once. A task that is cancelled waits no longer; its prompt is
        computed all the same."""
        future = asyncio.wrap_future(self._open.ask_future(item, params=params))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            if not future.cancelled():
                raise
            raise TimedOut(f"no answer came within {timeout_s:g} s: it is computed all the same") from None

    async def submit(
        self,
        source: AsyncInput | Source,
        *,
        name: str | None = None,
        params: SamplingParams = UNSET_PARAMS,
        priority: Priority | None = None,
        model_names: Sequence[str] = (),
        retry_errors: bool = False,
        window: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Job:
        """As Client's. A task that is cancelled leaves the Job as it is after the Chunk at hand; the same call goes
        on with it."""
        client, loop = self._open, asyncio.get_running_loop()
        tell = _in_loop(loop, on_progress)

        def submit(wakeup: Wakeup) -> Job:
            given = _pulled(source, loop, wakeup) if isinstance(source, AsyncIterable) else source
            return client.submit(
                given,
                name=name,
                params=params,
                priority=priority,
                model_names=model_names,
                retry_errors=retry_errors,
                window=window,
                on_progress=tell,
                wakeup=wakeup,
            )

        return await self._apart(submit)

    async def results(
        self, job: Job | str, *, order: Order = "input", wait: bool = True, timeout_s: float | None = None
    ) -> AsyncIterator[Result]:
        """As Client's; raises with the first Result that is asked for. Leaving the loop early stops it."""
        client, wakeup = self._open, Wakeup()
        handover = Handover[Result]()

        def produce() -> Generator[Result, None, None]:
            yield from client.results(job, order=order, wait=wait, timeout_s=timeout_s, wakeup=wakeup)

        self._start(partial(handover.run, produce()), wakeup)
        try:
            while results := await handover.next_items():
                for result in results:
                    yield result
        finally:
            handover.stop()
            wakeup.stop()

    async def wait(
        self,
        job: Job | str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[JobStatus], None] | None = None,
    ) -> JobStatus:
        """As Client's."""
        client, tell = self._open, _in_loop(asyncio.get_running_loop(), on_progress)
        return await self._apart(lambda wakeup: client.wait(job, timeout_s=timeout_s, on_progress=tell, wakeup=wakeup))

    async def delete(
        self, job: Job | str, *, force: bool = False, on_progress: Callable[[int], None] | None = None
    ) -> int:
        """As Client's. A task that is cancelled leaves the rest to the next call."""
        client, tell = self._open, _in_loop(asyncio.get_running_loop(), on_progress)

        def delete(wakeup: Wakeup) -> int:
            def check_and_tell(num_deleted: int) -> None:
                wakeup.check()
                if tell is not None:
                    tell(num_deleted)

            return client.delete(job, force=force, on_progress=check_and_tell)

        return await self._apart(delete)

    async def find(self, name: str) -> Job:
        """As Client's."""
        return await self._call(self._open.find, name)

    async def find_to_delete(self, name: str) -> Job:
        """As Client's."""
        return await self._call(self._open.find_to_delete, name)

    async def jobs(self, limit: int = 100) -> list[Job]:
        """As Client's."""
        return await self._call(self._open.jobs, limit)

    async def status(self, job: Job | str) -> JobStatus:
        """As Client's."""
        return await self._call(self._open.status, job)

    async def cancel(self, job: Job | str) -> bool:
        """As Client's."""
        return await self._call(self._open.cancel, job)

    async def retry(self, job: Job | str) -> int:
        """As Client's."""
        return await self._call(self._open.retry, job)

    async def find_same(
        self, source: Input | Source, *, name: str | None = None, params: SamplingParams = UNSET_PARAMS
    ) -> Job | None:
        """As Client's. May read all of the source, in a thread that a cancelled task does not stop."""
        client = self._open
        return await self._apart(lambda _wakeup: client.find_same(source, name=name, params=params))

    async def has_retriable_errors(self, job: Job | str) -> bool:
        """As Client's. May read all of the Job's Results, in a thread that a cancelled task does not stop."""
        client = self._open
        return await self._apart(lambda _wakeup: client.has_retriable_errors(job))

    async def set_priority(self, job: Job | str, priority: Priority) -> Job:
        """As Client's."""
        return await self._call(self._open.set_priority, job, priority)

    async def announce(self, job: Job | str) -> None:
        """As Client's."""
        await self._call(self._open.announce, job)

    async def dead_letters(self, job: Job | str | None = None) -> list[DeadLetter]:
        """As Client's."""
        return await self._call(self._open.dead_letters, job)

    async def dead_letter(self, job: Job | str, line: int) -> tuple[list[DeadLetter], Request]:
        """As Client's."""
        return await self._call(self._open.dead_letter, job, line)

    async def replay(self, job: Job | str, lines: Collection[int] | None = None) -> int:
        """As Client's."""
        return await self._call(self._open.replay, job, lines)

    async def drop_dead_letters(self, job: Job | str, lines: Sequence[int] | None = None) -> int:
        """As Client's."""
        return await self._call(self._open.drop_dead_letters, job, lines)

    async def verify(self, job: Job | str) -> Verification:
        """As Client's. Reads all of the Job's Results, in a thread that a cancelled task does not stop."""
        client = self._open
        return await self._apart(lambda _wakeup: client.verify(job))

    @property
    def _open(self) -> Client:
        if self._client is None:
            raise RuntimeError("the client is not open: use it within `async with AsyncClient() as client`")
        return self._client

    async def _call(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        call = partial(function, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def _apart(self, call: Callable[[Wakeup], T]) -> T:
        """What the call returns, which runs in a thread of its own; its Wakeup is stopped when this is cancelled."""
        future: Future[T] = Future()
        wakeup = Wakeup()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(wakeup))
            except BaseException as error:
                future.set_exception(error)

        self._start(run, wakeup)
        try:
            return await asyncio.wrap_future(future)
        finally:
            wakeup.stop()

    def _start(self, body: Callable[[], None], wakeup: Wakeup) -> None:
        def run() -> None:
            try:
                body()
            finally:
                del self._wakeups[threading.current_thread()]

        thread = threading.Thread(target=run, name="millrace-client", daemon=True)
        self._wakeups[thread] = wakeup
        thread.start()


def _in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[T], None] | None) -> Callable[[T], None] | None:
    return None if callback is None else lambda value: cast(None, loop.call_soon_threadsafe(callback, value))


def _pulled(items: AsyncIterable[T], loop: asyncio.AbstractEventLoop, wakeup: Wakeup) -> Iterator[T]:
    """The items, for a thread. Raises WaitStopped once they are not wanted any more."""
    iterator = aiter(items)

    async def pull() -> T:
        return await anext(iterator, _END)

    while True:
        future = asyncio.run_coroutine_threadsafe(pull(), loop)
        try:
            while not future.done():
                wakeup.check()
                wait_for_futures([future], _CHECK_S)
        except BaseException:
            future.cancel()
            raise
        item = future.result()
        if item is _END:
            return
        yield item
