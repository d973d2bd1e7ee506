"""The client of coroutines."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from producer import AsyncClient
from protocol.errors import ConfigurationError, InvalidRequest, JobNotEnded, JobNotFound, TimedOut
from protocol.settings import Settings
from storage.ledger import Ledger
from tests.producer.conftest import answer_oldest
from tests.producer.test_asks import text, worker

T = TypeVar("T")

#: Seconds after which a test that waits has failed.
_LONG_S = 60.0


def run(settings: Settings, body: Callable[[AsyncClient], Awaitable[T]]) -> T:
    async def main() -> T:
        async with AsyncClient(settings) as client, asyncio.timeout(_LONG_S):
            return await body(client)

    before = threading.active_count()
    result = asyncio.run(main())
    assert threading.active_count() <= before, "a thread was left behind"
    return result


async def prompts(number: int) -> AsyncIterator[str]:
    for i in range(number):
        await asyncio.sleep(0)
        yield f"p{i}"


def test_job_goes_from_items_that_come_one_by_one_to_results_as_they_land(
    settings: Settings, ledger: Ledger, redis_url: str
) -> None:
    told: list[int] = []
    in_loop: set[threading.Thread] = set()

    def tell(number: int) -> None:
        told.append(number)
        in_loop.add(threading.current_thread())

    async def body(client: AsyncClient) -> None:
        job = await client.submit(prompts(10), name="nightly", on_progress=tell)
        assert (job.state, job.num_lines) == ("running", 10)
        with worker(ledger, redis_url):
            results = [result async for result in client.results(job, order="finished")]
            assert (await client.wait(job)).is_finished
        assert sorted(text(result) or "" for result in results) == [f"p{i}!" for i in range(10)]
        assert [result.line async for result in client.results("nightly")] == list(range(1, 11))
        assert [result.line async for result in client.results("nightly", wait=False)] == list(range(1, 11))
        assert (await client.status(job)).num_ok == 10
        assert [found.id for found in await client.jobs()] == [(await client.find("nightly")).id]
        assert (await client.verify(job)).holds
        assert await client.delete(job) == 10
        assert await client.jobs() == []

    run(settings, body)

    assert told == [4, 8, 10]
    assert in_loop == {threading.main_thread()}


def test_a_thousand_tasks_ask_at_once(settings: Settings, ledger: Ledger, redis_url: str) -> None:
    async def body(client: AsyncClient) -> None:
        before = threading.active_count()
        asking = asyncio.gather(*(client.ask(f"p{i}", timeout_s=_LONG_S) for i in range(1000)))
        await asyncio.sleep(0)
        assert threading.active_count() <= before + 3
        assert [text(result) for result in await asking] == [f"p{i}!" for i in range(1000)]
        with pytest.raises(InvalidRequest, match="use submit"):
            await client.ask({"prompt": "a", "n": 2})

    with worker(ledger, redis_url) as claimed:
        run(settings, body)
    assert len(claimed) < 100


def test_errors_reach_the_coroutine(settings: Settings, ledger: Ledger) -> None:
    async def body(client: AsyncClient) -> None:
        job = await client.submit(["a"])
        with pytest.raises(JobNotEnded):
            await client.delete(job)
        with pytest.raises(JobNotFound):
            await anext(client.results("nothing"))
        with pytest.raises(ConfigurationError, match="--job NAME"):
            await client.submit(prompts(1))
        with pytest.raises(TimedOut):
            await client.wait(job, timeout_s=0.05)
        with pytest.raises(TimedOut):
            await anext(client.results(job, timeout_s=0.05))
        with pytest.raises(TimedOut, match=r"no answer came within 0\.05 s"):
            await client.ask("a", timeout_s=0.05)

        async def broken() -> AsyncIterator[str]:
            yield "a"
            raise KeyError("broken")

        with pytest.raises(KeyError, match="broken"):
            await client.submit(broken(), name="broken")

    run(settings, body)


def test_cancelled_tasks_leave_no_thread_behind_and_can_be_gone_on_with(settings: Settings, ledger: Ledger) -> None:
    async def cancelled(task: Awaitable[object], until: asyncio.Event | None = None) -> None:
        running = asyncio.ensure_future(task)
        await (asyncio.sleep(0.05) if until is None else until.wait())
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    async def endless() -> AsyncIterator[str]:
        for i in range(6):
            yield f"p{i}"
        await asyncio.Event().wait()

    async def body(client: AsyncClient) -> None:
        job = await client.submit(["a"])
        await cancelled(client.wait(job))
        await cancelled(anext(client.results(job)))
        await cancelled(client.ask("b"))
        await cancelled(client.submit(endless(), name="endless"))
        is_full = asyncio.Event()
        submitting = client.submit(
            prompts(100), name="stopped", window=8, on_progress=lambda number: is_full.set() if number == 8 else None
        )
        await cancelled(submitting, is_full)
        (stopped,) = [found for found in await client.jobs() if found.identity == "stopped"]
        assert (stopped.state, (await client.status(stopped)).num_lines) == ("submitting", 8)
        assert (await client.submit(prompts(100), name="stopped")).num_lines == 100

    run(settings, body)


def test_iteration_that_is_left_early_is_stopped(settings: Settings, ledger: Ledger) -> None:
    async def body(client: AsyncClient) -> None:
        job = await client.submit([f"p{i}" for i in range(8)])
        answer_oldest(ledger)
        async for result in client.results(job):
            assert result.line == 1
            break

    run(settings, body)


def test_client_that_is_not_open_says_so(settings: Settings) -> None:
    with pytest.raises(RuntimeError, match="within `async with AsyncClient"):
        asyncio.run(AsyncClient(settings).jobs())


def test_database_without_tables_is_refused_on_entering(settings: Settings, tmp_path: object) -> None:
    async def enter() -> None:
        async with AsyncClient(Settings(database_url=f"sqlite:///{tmp_path}/nothing.db")):
            pass

    with pytest.raises(ConfigurationError, match="millrace migrate"):
        asyncio.run(enter())
