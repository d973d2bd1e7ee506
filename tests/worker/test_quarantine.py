"""Quarantine against engines that die of certain Sequences, or of nothing at all."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.quarantine import MAX_DEATHS, Quarantine


class Engine:
    """Runs the first `max_aboard` it was told of and finishes one at a time; dies with poison aboard."""

    def __init__(self, num: int, poison: set[int], max_aboard: int) -> None:
        self.quarantine = Quarantine(max_aboard)
        self.poison = poison
        self.max_aboard = max_aboard
        self.finished: list[int] = []
        self.given_up: list[int] = []
        self.num_deaths = 0
        self.told = self.quarantine.add(range(num))

    def die(self) -> None:
        self.num_deaths += 1
        guilty = self.quarantine.on_death(self.told[: self.max_aboard])
        if guilty is not None:
            self.given_up.append(guilty)
            self.quarantine.remove([guilty])
        self.told = self.quarantine.restart()

    def run_on(self) -> None:
        aboard = self.told[: self.max_aboard]
        if self.poison.intersection(aboard):
            self.die()
            return
        done = aboard[0]
        self.finished.append(done)
        self.told = self.told[1:] + self.quarantine.remove([done])

    def run_to_the_end(self) -> None:
        while self.told:
            self.run_on()


@pytest.mark.parametrize("poison", [0, 57, 131, 399])
def test_the_poisonous_one_is_found_and_all_others_finish(poison: int) -> None:
    engine = Engine(400, {poison}, max_aboard=128)
    engine.run_to_the_end()
    assert engine.given_up == [poison]
    assert sorted(engine.finished) == [i for i in range(400) if i != poison]
    # Twice together, then in halves of at most 128.
    assert engine.num_deaths <= 2 + 8


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 59), max_size=8), st.integers(1, 20))
def test_any_number_of_poisonous_ones_is_found(poison: set[int], max_aboard: int) -> None:
    engine = Engine(60, poison, max_aboard)
    engine.run_to_the_end()
    assert set(engine.given_up) == poison
    assert sorted(engine.finished + engine.given_up) == list(range(60))


def test_an_engine_that_is_killed_from_outside_again_and_again_loses_nothing() -> None:
    engine = Engine(400, set(), max_aboard=256)
    for _ in range(MAX_DEATHS + 2):
        for _ in range(3):
            engine.run_on()
        engine.die()
    engine.run_to_the_end()
    assert engine.given_up == []
    assert sorted(engine.finished) == list(range(400))


def test_what_comes_during_a_quarantine_waits_for_its_end() -> None:
    engine = Engine(8, {3}, max_aboard=8)
    engine.run_on()
    engine.run_on()
    assert engine.quarantine.is_active
    assert engine.quarantine.add([100, 101]) == []
    engine.run_to_the_end()
    assert engine.given_up == [3]
    assert engine.finished[-2:] == [100, 101]


def test_cancelling_suspects_lets_the_others_go_on() -> None:
    rng = random.Random(0)
    engine = Engine(40, {7}, max_aboard=16)
    for _ in range(3):
        engine.run_on()
    cancelled = rng.sample(sorted(set(range(40)) - set(engine.finished)), 20)
    following = engine.quarantine.remove(cancelled)
    engine.told = [i for i in engine.told if i not in cancelled] + following
    engine.run_to_the_end()
    assert set(engine.finished) | set(engine.given_up) == set(range(40)) - set(cancelled)
