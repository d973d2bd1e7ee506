"""Where a model's files are looked for, and what its fingerprint depends on."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine import memory
from worker.engine.engine import Engine
from worker.engine.loader import load_model
from worker.engine.model_files import files_digest, fingerprint, local_folder, resolve_folder


def make_folder(tmp_path: Path, **files: str) -> Path:
    for name, text in {"config.json": "{}", "model.safetensors": "weights", **files}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_digest_follows_every_file_that_decides_answers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    digests = [files_digest(folder)]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text("changed")
        digests.append(files_digest(folder))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    digests.append(files_digest(folder))

    assert len(set(digests)) == len(digests)


def test_digest_ignores_files_that_do_not(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    before = files_digest(folder)

    for name in ("generation_config.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_text("{}")

    assert files_digest(folder) == before


def test_fingerprint_depends_on_files_dtype_and_quantization() -> None:
    prints = {fingerprint("a", "float32"), fingerprint("b", "float32"), fingerprint("a", "bfloat16")}
    prints.add(fingerprint("a", "float32", "int8"))

    assert len(prints) == 4
    assert fingerprint("a", "float32") == fingerprint("a", "float32", "none")


def test_folder_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ConfigurationError, match=r"no \*\.safetensors.*save_pretrained") as caught:
        resolve_folder(str(tmp_path))

    assert str(tmp_path) in str(caught.value)


def test_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": shards})
    folder = make_folder(tmp_path, **{shards["a"]: "weights", "model.safetensors.index.json": index})

    with pytest.raises(ConfigurationError, match=r"has no model-00002-of-00002\.safetensors, one of 1 missing"):
        resolve_folder(str(folder))


def test_path_that_is_not_there_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such folder"):
        resolve_folder(str(tmp_path / "a" / "b"))


def test_file_and_empty_name_are_told_from_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()

    for find in (resolve_folder, local_folder):
        with pytest.raises(
            ConfigurationError, match=r"engine\.model='model\.gguf' is a file: give the folder with config"
        ):
            find("model.gguf")
        with pytest.raises(ConfigurationError, match=r"engine\.model is empty: give"):
            find("")


def test_hub_name_that_cannot_be_had_is_refused_with_the_way_out() -> None:
    code = (
        "from worker.engine.model_files import resolve_folder\n"
        "from protocol.errors import ConfigurationError\n"
        "try:\n    resolve_folder('nobody/nothing', 'v9')\n"
        "except ConfigurationError as error:\n    print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    answer = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)

    assert "nobody/nothing" in answer.stdout
    assert "revision 'v9'" in answer.stdout
    assert "path of a folder" in answer.stdout


def test_model_files_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, worker.engine.model_files\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )

    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )

    assert answer.stdout.strip() == "[]"


def save(folder: Path, name: str, **fields: object) -> Path:
    import transformers

    config = getattr(transformers, name)(
        vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, num_hidden_layers=2, **fields
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_head": 4}, "does not use the AttentionInterface"),
        ("FalconConfig", {"hidden_size": 32, "num_attention_heads": 4}, "does not use the AttentionInterface"),
        (
            "GptOssConfig",
            {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_local_experts": 4,
                "max_position_embeddings": 256,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "s_aux, which the engine does not compute",
        ),
    ],
)
def test_model_that_cannot_run_packed_runs_padded_and_the_log_says_why(
    name: str, fields: dict[str, object], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, name, **fields)
    caplog.set_level("INFO", logger="millrace.engine")

    loaded = load_model(folder, EngineSettings(device="cpu", max_model_len=64))

    assert loaded.layout == "padded"
    assert any("layout padded" in line and reason in line for line in caplog.messages)
    with pytest.raises(ConfigurationError, match=r"layout='packed', but models of type .* use auto or padded"):
        load_model(folder, EngineSettings(device="cpu", max_model_len=64, layout="packed"))


def test_model_without_a_cache_of_keys_and_values_is_refused_by_its_type(tmp_path: Path) -> None:
    folder = save(tmp_path, "MambaConfig", hidden_size=32)

    with pytest.raises(ConfigurationError, match=r"'mamba' are not supported.*Supported are"):
        load_model(folder, EngineSettings(device="cpu", max_model_len=64))


def test_unknown_layout_is_refused_by_name(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="layout='ragged' is unknown: it is one of auto, packed, padded"):
        load_model(model_folder("llama"), EngineSettings(device="cpu", layout="ragged"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
        ({"model_type": "made-up"}, "models of type 'made-up' are unknown to transformers.*Supported are"),
    ],
)
def test_config_that_cannot_be_served_is_refused(
    change: dict[str, object], words: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = model_folder("llama")
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")

    with pytest.raises(ConfigurationError, match=words):
        load_model(tmp_path, EngineSettings(device="cpu"))


def test_longrope_beyond_its_original_length_is_refused(tmp_path: Path) -> None:
    factors = [1.0] * 4
    folder = save(
        tmp_path,
        "LlamaConfig",
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 128,
        },
    )

    with pytest.raises(ConfigurationError, match=r"set engine\.max_model_len to 128 or less"):
        load_model(folder, EngineSettings(device="cpu"))

    assert load_model(folder, EngineSettings(device="cpu", max_model_len=128)).max_model_len == 128


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    monkeypatch.setattr(memory, "available_bytes", lambda device, settings: 100_000)

    with pytest.raises(ConfigurationError, match=r"take .* GiB in float32.*are available on cpu.*dtype=bfloat16"):
        load_model(folder, EngineSettings(device="cpu"))


def test_weights_are_counted_as_they_will_be_loaded(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    loaded = load_model(folder, EngineSettings(device="cpu"))
    num_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())

    assert memory.weight_bytes(folder, torch.float32) == num_bytes
    assert memory.weight_bytes(folder, torch.bfloat16) == num_bytes // 2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_cache_that_does_not_fit_is_refused_with_the_number_that_would(
    layout: str, model_folder: Callable[[str], Path]
) -> None:
    settings = EngineSettings(model=str(model_folder("llama")), device="cpu", layout=layout, kv_tokens=10**12)

    with pytest.raises(
        ConfigurationError, match=r"KV cache of 1000000000000 tokens.*kv_tokens to \d+ or less"
    ) as caught:
        Engine.start(settings)

    fitting = int(str(caught.value).split("kv_tokens to ")[1].split()[0])
    assert 0 < fitting < 10**12
