"""What tune measures: steps of an engine that has as many rows as it has room for."""

from collections.abc import Callable
from pathlib import Path

from tests.engine.reference import settings_for
from worker.engine.engine import Engine
from worker.engine.tuning import Load


def test_rows_are_full_before_anything_is_measured_though_a_prompt_takes_many_steps(
    model_folder: Callable[[str], Path],
) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), max_num_seqs=4, max_batch_tokens=8))

    Load(engine, 40).fill(600.0)

    assert engine.scheduler.num_running == 4


def test_rows_are_full_when_the_cache_has_room_for_no_more(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), max_num_seqs=64, kv_tokens=256))

    Load(engine, 40).fill(600.0)

    assert 2 < engine.scheduler.num_running < 64
