"""A whole engine on the Triton backend. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

from pathlib import Path

import pytest

from tests.engine.reference import (
    assert_equal_where_decided,
    build_model,
    drive,
    make_reference,
    new_sequence,
    random_prompts,
    settings_for,
)
from worker.engine import engine as engine_module
from worker.engine.backends.sdpa import SDPABackend
from worker.engine.backends.triton import TritonBackend
from worker.engine.engine import Engine


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # the second has windows and a softcap
def test_text_of_the_triton_backend_equals_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(family).save_pretrained(tmp_path)
    stem = random_prompts(1, seed=5, max_len=140)[0] * 3
    ends = random_prompts(4, seed=6, max_len=30)
    prompts = [*(stem[:130] + end for end in ends), *random_prompts(3, seed=7, max_len=90)]
    expected = make_reference(tmp_path, prompts, num_tokens=5)
    monkeypatch.setattr(engine_module, "choose_backend", lambda *arguments: TritonBackend(SDPABackend()))
    engine = Engine.start(settings_for(tmp_path, lookahead=1))

    run = drive(engine, [new_sequence(i, prompt, 5) for i, prompt in enumerate(prompts)], wave=7)

    assert engine.attention_name == "triton, prefill by sdpa"
    assert run.num_prefix_hit_tokens == 3 * 128
    assert_equal_where_decided([run.outputs[i] for i in range(len(prompts))], expected)
