"""Pauses grow to their limit, and no two who failed together wait equally long."""

from itertools import islice

from protocol.backoff import backoff


def test_pauses_double_up_to_the_limit_and_differ_by_chance() -> None:
    runs = [list(islice(backoff(0.1, 5.0), 12)) for _ in range(50)]
    for run in runs:
        assert all(full / 2 <= pause <= full for pause, full in zip(run, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2], strict=False))
        assert all(2.5 <= pause <= 5.0 for pause in run[6:])
    assert len({run[0] for run in runs}) == len(runs)
