"""When a lease that has run out says that its owner is dead."""

import pytest

from worker.takeover import Takeover


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
