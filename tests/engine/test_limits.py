"""Limits of a step where nothing is set."""

import pytest
import torch

from protocol.settings import EngineSettings
from worker.engine import limits
from worker.engine.limits import Limits, step_limits


@pytest.mark.parametrize(
    ("name", "num_multiprocessors", "num_tokens"),
    [("T4", 40, 15_360), ("L4", 58, 14_848), ("A100", 108, 13_824), ("H200", 132, 16_896), ("B200", 148, 18_944)],
)
def test_a_gpus_step_is_whole_rounds_of_tiles_unless_texts_or_settings_decide(
    name: str, num_multiprocessors: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "num_multiprocessors", lambda device: num_multiprocessors)
    device = torch.device("cuda")

    assert step_limits(EngineSettings(), device) == Limits(1024, num_tokens)
    assert num_tokens % (128 * num_multiprocessors) == 0
    assert step_limits(EngineSettings(), device, is_whole=True) == Limits(1024, 16_384)
    assert step_limits(EngineSettings(max_batch_tokens=500), device) == Limits(500, 500)


def test_a_cpus_step_is_small() -> None:
    assert step_limits(EngineSettings(), torch.device("cpu")) == Limits(256, 2048)
    assert step_limits(EngineSettings(), torch.device("cpu"), is_whole=True) == Limits(256, 8192)
