"""Cutting a Job's lines into Chunks: what one queue message points to and one lease covers.

A Chunk costs a message and some transactions, whatever is in it, so a large Job has large ones; but a small Job must
spread over many workers, and nobody knows how long an input is before its end. So Chunks grow with what there is.
"""

from collections.abc import Iterable, Iterator

from protocol.errors import DamagedInput
from protocol.requests import Request, Result

#: A Chunk holds at most this part of its Job so far: with many workers none gets much more of the rest than another.
_PART = 32
#: Requests that are never too many, and bytes of text that each of them may have on average.
_FIRST_REQUESTS = 64
_BYTES_EACH = 4096


def cut_chunks(
    items: Iterable[Request | Result], position: int, max_requests: int, max_bytes: int
) -> Iterator[tuple[list[Request], list[Result]]]:
    """The items, which follow the Job's line `position`, in runs of what one Chunk may hold.

    Raises DamagedInput as the items do, once what came before the damage has been given.
    """
    requests: list[Request] = []
    failures: list[Result] = []
    num_bytes = 0
    most_requests, most_bytes = _limits(position, max_requests, max_bytes)
    damage: DamagedInput | None = None
    try:
        for item in items:
            item_bytes = _text_bytes(item) if isinstance(item, Request) else 0
            is_full = len(requests) + len(failures) >= most_requests
            if is_full or (requests and num_bytes + item_bytes > most_bytes):
                yield requests, failures
                requests, failures, num_bytes = [], [], 0
                most_requests, most_bytes = _limits(item.line - 1, max_requests, max_bytes)
            if isinstance(item, Request):
                requests.append(item)
                num_bytes += item_bytes
            else:
                failures.append(item)
    except DamagedInput as error:
        damage = error
    if requests or failures:
        yield requests, failures
    if damage is not None:
        raise damage


def _limits(position: int, max_requests: int, max_bytes: int) -> tuple[int, int]:
    """Of the next Chunk's Requests and bytes."""
    most_requests = max(_FIRST_REQUESTS, position // _PART)
    return min(most_requests, max_requests), min(most_requests * _BYTES_EACH, max_bytes)


def _text_bytes(request: Request) -> int:
    texts = (
        request.prompt,
        request.context,
        request.continuation,
        request.carried,
        *(message.content for message in request.messages or ()),
        *(text for text in request.inputs or () if isinstance(text, str)),
    )
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts if text)
