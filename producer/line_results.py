"""All Results of one line together, out of a stream of them."""

from collections.abc import Iterable, Iterator

from protocol.requests import Result


def whole_lines(results: Iterable[Result], *, is_in_order: bool) -> Iterator[list[Result]]:
    """Each line's Results as soon as the last of its samples is there; those that are never complete, at the end.

    Lines `is_in_order` are never held longer than until the next one begins. What is held otherwise is bounded by the
    lines that are being worked on.
    """
    held: dict[int, list[Result]] = {}
    for result in results:
        if is_in_order and held and result.line not in held:
            yield from held.values()
            held.clear()
        samples = held.setdefault(result.line, [])
        samples.append(result)
        if len(samples) >= _num_samples(result):
            yield held.pop(result.line)
    yield from held.values()


def _num_samples(result: Result) -> int:
    # A line that was refused before its parameters were known has one Result.
    return 1 if result.params is None else result.params.n
