"""Handover: items from an iterator that blocks, in a thread, to a coroutine, some ahead and no more."""

import asyncio
import threading
from collections import deque
from collections.abc import Generator
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")

#: Items taken from the iterator before the coroutine asks for them.
_MAX_AHEAD = 1000


class Handover(Generic[T]):
    """Belongs to the running event loop; `run` is for one thread, all else for the loop's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._is_over = self._is_stopped = False
        self._has_news = asyncio.Event()

    def run(self, items: Generator[T, None, None]) -> None:
        """Hand the items over until they end, raise or are not wanted any more."""
        try:
            with closing(items):
                for item in items:
                    if not self._put(item):
                        return
                    self._tell()
        except BaseException as error:
            self._error = error
        finally:
            self._is_over = True
            self._tell()

    def stop(self) -> None:
        """No more items are wanted."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    async def next_items(self) -> list[T]:
        """All that are there, as soon as there are any; none at the end. Raises what the iterator raised."""
        while True:
            self._has_news.clear()
            is_over = self._is_over  # before the items are taken: nothing is added once it is over
            with self._changed:
                items, self._items = list(self._items), deque()
                self._changed.notify()
            if items:
                return items
            if is_over:
                if self._error is not None:
                    raise self._error
                return []
            await self._has_news.wait()

    def _put(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < _MAX_AHEAD or self._is_stopped)
            if not self._is_stopped:
                self._items.append(item)
            return not self._is_stopped

    def _tell(self) -> None:
        # Once for many items: the loop looks at all of them when it comes round to it.
        if not self._has_news.is_set() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._has_news.set)
