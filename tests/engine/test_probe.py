"""What the probes find out about models that look runnable and are not, or not in the usual way."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from tests.engine.reference import drive, new_sequence
from tests.engine.test_scores import assert_scores
from worker.engine.engine import Engine
from worker.engine.loader import adopt

CPU = EngineSettings(device="cpu", dtype="float32", kv_tokens=256)


def test_a_head_that_calls_the_decoder_itself_is_scored_all_the_same() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            max_position_embeddings=64,
        )
    ).eval()
    prompt = [5, 6, 7, 20, 3]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1).numpy()

    loaded = adopt(model, CPU)
    assert loaded.scoring_obstacle is None
    engine = Engine(loaded, CPU)
    run = drive(engine, [new_sequence(1, prompt, 0, score_from=1)])
    assert_scores(run, 1, prompt, 1, 0, expected)


def test_a_model_that_cannot_be_scored_refuses_scores_and_still_generates(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import worker.engine.loader

    monkeypatch.setattr(worker.engine.loader, "scoring_obstacle", lambda model, config: "it says so")
    engine = Engine.start(EngineSettings(model=str(model_folder("llama")), device="cpu", kv_tokens=256))
    engine.add(new_sequence(1, [5, 6], 0, score_from=1))
    engine.add(new_sequence(2, [5, 6], 3))
    frames = []
    while engine.has_work:
        frames.append(engine.step())
    refused = [entry for frame in frames if frame is not None for entry in frame.refused]
    assert refused == [(1, "this model's prompts cannot be scored: it says so")]
    assert [entry for frame in frames if frame is not None for entry in frame.finished] == [(2, "length", 3)]


def test_a_model_that_looks_ahead_is_refused_however_small_its_weights() -> None:
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, is_decoder=False,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="not supported"):
        adopt(BertLMHeadModel(config).eval(), CPU)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("Phimoe", {"sliding_window": 16, "num_local_experts": 4}, "layer 0 looks less far"),  # its masks alone know
        ("DiffLlama", {}, "layer 0 attends more than once"),  # with other values each time
    ],
)
def test_a_model_whose_attention_is_not_all_that_its_layers_ask_for_runs_padded(
    name: str, fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **fields,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prompt = [7 * i % 64 for i in range(40)]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1).numpy()

    with caplog.at_level(logging.INFO, logger="millrace.engine"):
        engine = Engine(adopt(model, CPU), CPU)

    assert "layout padded" in caplog.text
    assert reason in caplog.text
    assert_scores(drive(engine, [new_sequence(1, prompt, 0, score_from=1)]), 1, prompt, 1, 0, expected)


def test_a_model_with_attention_of_its_own_keeps_the_one_that_transformers_chose(tmp_path: Path) -> None:
    """Falcon's plain attention adds its biases for distance twice."""
    from transformers import AutoModelForCausalLM, FalconConfig

    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(FalconConfig(**fields, alibi=True, initializer_range=0.3)).save_pretrained(
        tmp_path
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [7 * i % 64 for i in range(40)]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1).numpy()

    engine = Engine.start(EngineSettings(model=str(tmp_path), device="cpu", kv_tokens=256, max_model_len=128))

    assert_scores(drive(engine, [new_sequence(1, prompt, 0, score_from=1)]), 1, prompt, 1, 0, expected)
