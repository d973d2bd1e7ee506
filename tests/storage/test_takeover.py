"""When a lease that has run out says that its owner is dead."""

import pytest

from storage.takeover import Takeover


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_taken_over_until_those_who_live_had_the_time_to_renew(clock: Clock) -> None:
    takeover = Takeover(30.0, clock)
    takeover.answered(clock.now)
    assert takeover.is_fair(clock.now)
    takeover.away()
    clock.now += 600
    assert not takeover.is_fair(clock.now)
    takeover.answered(clock.now)
    clock.now += 29
    takeover.answered(clock.now)  # every further answer changes nothing
    assert not takeover.is_fair(clock.now)
    clock.now += 1
    assert takeover.is_fair(clock.now)


def test_a_question_that_waited_for_long_was_an_outage_for_everybody(clock: Clock) -> None:
    takeover = Takeover(30.0, clock)
    asked_at = clock.now
    clock.now += 10
    assert takeover.is_fair(asked_at)
    clock.now += 1
    assert not takeover.is_fair(asked_at)
    assert not takeover.is_fair(clock.now)
    clock.now += 30
    assert takeover.is_fair(clock.now)
    # Whatever it was that was asked.
    takeover.answered(clock.now - 11)
    assert not takeover.is_fair(clock.now)


def test_a_database_that_fails_now_and_then_keeps_nothing_of_the_dead_for_ever(clock: Clock) -> None:
    takeover = Takeover(30.0, clock)
    num_fair = 0
    for second in range(200):
        clock.now += 1
        if second % 20 < 2:
            takeover.away()
        else:
            num_fair += takeover.is_fair(clock.now)
    assert num_fair > 100


def test_a_database_that_is_always_slow_keeps_nothing_of_the_dead_for_ever(clock: Clock) -> None:
    takeover = Takeover(30.0, clock)
    answers = []
    for _ in range(10):
        asked_at = clock.now
        clock.now += 12
        answers.append(takeover.is_fair(asked_at))
        clock.now += 1
    assert answers == [False, True] * 5


def test_an_outage_at_the_end_of_another_one_is_waited_out_too(clock: Clock) -> None:
    takeover = Takeover(30.0, clock)
    for _ in range(2):
        takeover.away()
        clock.now += 600
        assert not takeover.is_fair(clock.now)
        clock.now += 25
        assert not takeover.is_fair(clock.now)
    clock.now += 5
    assert takeover.is_fair(clock.now)
