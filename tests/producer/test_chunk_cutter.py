"""How a Job's lines are cut into Chunks."""

from collections.abc import Iterator

import pytest

from producer.chunk_cutter import cut_chunks
from protocol.errors import DamagedInput
from protocol.requests import Failure, Request, Result


def sizes(num_lines: int, position: int = 0, max_requests: int = 512, max_bytes: int = 1 << 30) -> list[int]:
    items = (Request(line=line, prompt="word") for line in range(position + 1, num_lines + 1))
    return [len(requests) for requests, _ in cut_chunks(items, position, max_requests, max_bytes)]


def test_chunks_grow_with_their_job_up_to_the_limit() -> None:
    found = sizes(60_000)

    assert sum(found) == 60_000
    assert found[:32] == [64] * 32
    assert max(found) == 512
    # None but the small ones at first holds more than a 32nd of what comes before it.
    assert all(size <= max(64, sum(found[:i]) // 32) for i, size in enumerate(found))


def test_a_resumed_submission_goes_on_with_chunks_as_large_as_they_were() -> None:
    assert sizes(52_000, position=50_000) == [512, 512, 512, 464]


def test_settings_below_the_first_size_hold_from_the_start() -> None:
    assert sizes(10, max_requests=4) == [4, 4, 2]


def test_long_texts_make_chunks_of_fewer_requests_also_before_the_limit_of_bytes() -> None:
    items = [Request(line=line, prompt="x" * 100_000) for line in range(1, 6)]

    assert [len(requests) for requests, _ in cut_chunks(items, 0, 512, 1 << 30)] == [2, 2, 1]
    assert [len(requests) for requests, _ in cut_chunks(items, 0, 512, 50_000)] == [1] * 5
    carrying = [Request(line=line, prompt="x", carried="x" * 100_000) for line in range(1, 6)]
    assert [len(requests) for requests, _ in cut_chunks(carrying, 0, 512, 1 << 30)] == [2, 2, 1]


def test_what_comes_before_damage_is_given_first() -> None:
    def damaged() -> Iterator[Request | Result]:
        yield Request(line=1, prompt="a")
        yield Result(line=2, failure=Failure("invalid_json", "no"))
        raise DamagedInput("the file ends within a line")

    chunks = cut_chunks(damaged(), 0, 512, 1 << 20)
    requests, failures = next(chunks)
    assert ([each.line for each in requests], [each.line for each in failures]) == ([1], [2])
    with pytest.raises(DamagedInput):
        next(chunks)
