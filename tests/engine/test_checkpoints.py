"""Checkpoints that do not hold what they should: refused with the name of what is wrong, never filled up with noise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from protocol.errors import ConfigurationError
from tests.engine.reference import settings_for
from worker.engine.engine import Engine
from worker.engine.memory import weight_bytes


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def start(folder: Path) -> Engine:
    return Engine.start(settings_for(folder))


def test_a_missing_tensor_is_named_and_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lack 1 tensors .* model\.layers\.0\.self_attn\.q_proj\.weight"):
        start(folder)


def test_weights_under_other_names_are_refused(folder: Path) -> None:
    weights = {f"other.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="lack"):
        start(folder)


def test_more_layers_than_the_config_names_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="more than the 1 layers"):
        start(folder)


@pytest.mark.parametrize("num_bytes", [0, 100, 5000])
def test_a_truncated_file_is_named(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not a complete safetensors file"):
        start(folder)


def test_a_second_copy_of_the_weights_does_not_count(folder: Path) -> None:
    before = weight_bytes(folder, torch.float32)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_bytes(folder, torch.float32) == before


def test_a_model_of_a_class_that_generates_otherwise_is_refused_in_a_line(folder: Path) -> None:
    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)

    with pytest.raises(ConfigurationError, match="models of type 't5' are of no class that does this") as refused:
        start(folder)

    assert len(str(refused.value)) < 500
