"""What a model is computed in when nobody says."""

from pathlib import Path

import pytest
import torch

from protocol.settings import EngineSettings
from tests.engine.reference import build_model, settings_for
from worker.engine import dtypes
from worker.engine.dtypes import choose_dtype
from worker.engine.engine import Engine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The same model, kept in either dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = tmp_path_factory.mktemp(str(dtype))
        build_model("llama").to(dtype).save_pretrained(found[dtype])
    return found


@pytest.mark.parametrize(
    ("kept", "capability", "num_enough", "chosen"),
    [
        (torch.bfloat16, "avx512_bf16", 1, torch.bfloat16),
        (torch.bfloat16, "bf16", 1, torch.bfloat16),
        (torch.bfloat16, "avx512_f", 1, torch.float32),  # torch would convert
        (torch.bfloat16, "avx512_bf16", 10**9, torch.float32),  # nothing to gain
        (torch.float32, "avx512_bf16", 1, torch.float32),  # digits to lose
    ],
)
def test_a_cpu_computes_in_bfloat16_what_is_large_and_kept_in_it_if_it_can_do_so_itself(
    kept: torch.dtype,
    capability: str,
    num_enough: int,
    chosen: torch.dtype,
    folders: dict[torch.dtype, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "l2_cache_size": 1})
    monkeypatch.setattr(dtypes, "_MIN_BFLOAT16_PARAMETERS", num_enough)

    engine = Engine.start(settings_for(folders[kept]))

    assert engine.loaded.dtype == chosen
    assert engine.attention_name == ("sdpa" if chosen is torch.bfloat16 else "sparse")


def test_a_gpu_computes_in_bfloat16_and_settings_win(folders: dict[torch.dtype, Path]) -> None:
    folder = folders[torch.float32]

    assert choose_dtype(EngineSettings(), CUDA, folder) == torch.bfloat16
    assert choose_dtype(EngineSettings(dtype="float16"), CPU, folder) == torch.float16
    assert choose_dtype(EngineSettings(), CPU) == torch.float32
