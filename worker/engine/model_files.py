"""A model's files: where they are, and which of them decide answers. Imports no torch and no transformers, since the
Celery side needs the folder and the fingerprint too.
"""

import hashlib
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protocol.errors import ConfigurationError

log = logging.getLogger("millrace.engine")

#: Part of the fingerprint: raised whenever the engine's arithmetic changes, so that stored answers are not reused.
ENGINE_VERSION = "1"

#: generation_config.json is not among them: it sets defaults, and an answer's key holds the resolved parameters.
ANSWER_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    # What sentence-transformers writes beside an embedding model.
    "modules.json",
    "sentence_bert_config.json",
    "[0-9]_*/config.json",
)

#: The number of a layer in the name of its tensors, whatever the family calls its layers.
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`, downloaded from the hub when it is a hub name and no folder here.

    Raises ConfigurationError when there is no such folder or hub name, or when it lacks what the engine needs.
    """
    if not model:
        raise ConfigurationError("engine.model is empty: give the path of a folder, or a name on the model hub")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigurationError(
                f"engine.revision={revision!r} is for names on the model hub, but engine.model={model!r} is a local "
                "folder: leave the revision out"
            )
    elif folder.is_file():
        raise ConfigurationError(
            f"engine.model={model!r} is a file: give the folder with config.json and *.safetensors in it"
        )
    elif _HUB_NAME.fullmatch(model):
        folder = _download(model, revision)
    else:
        raise ConfigurationError(
            f"engine.model={model!r}: there is no such folder (working directory {Path.cwd()}), and it is no name on "
            "the model hub either: give the path of a folder with config.json and *.safetensors, or a name like "
            "'Qwen/Qwen3-0.6B'"
        )
    _check(folder, model)
    return folder


def local_folder(model: str, revision: str | None = None) -> Path | None:
    """As `resolve_folder`, and downloads nothing: None for a hub name whose files are not here."""
    if Path(model).expanduser().exists() or not _HUB_NAME.fullmatch(model):
        return resolve_folder(model, revision)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from; a repository may hold the same weights in another form too."""
    for index in sorted(folder.glob("model*.safetensors.index.json")):
        return sorted({folder / name for name in _shards(index)})
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def files_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that decide answers."""
    paths = sorted({path for pattern in ANSWER_FILES for path in folder.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(_file_digest, paths))
    total = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def fingerprint(digest: str, dtype: str, quantization: str = "none", task: str = "generate") -> str:
    """What the model is as far as answers go: its files, the arithmetic, the engine that runs it, and its task."""
    text = f"engine={ENGINE_VERSION} files={digest} dtype={dtype} quantization={quantization} task={task}"
    return hashlib.sha256(text.encode()).hexdigest()


def _download(name: str, revision: str | None) -> Path:
    # Imported here since a local folder, the usual case, needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*ANSWER_FILES, "generation_config.json"]
    try:
        ignored = ["consolidated*"]  # the same weights again, for other software
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigurationError(
            f"engine.model={name!r}: there is no such folder (working directory {Path.cwd()}), and the model hub did "
            f"not give a model of that name{at} ({type(error).__name__}): check the spelling, the network and, for a "
            "gated model, HF_TOKEN, or give the path of a folder with config.json and *.safetensors"
        ) from error
    log.info("model %s at commit %s of the hub%s", name, folder.name, "" if revision else "; no revision is pinned")
    return folder


def _check(folder: Path, model: str) -> None:
    missing = [pattern for pattern in ("config.json", "*.safetensors") if not any(folder.glob(pattern))]
    if missing:
        raise ConfigurationError(
            f"engine.model={model!r}: {folder} has no {' and no '.join(missing)}. Weights are read from safetensors "
            "files alone; save the model with save_pretrained(), which writes both"
        )
    if not _is_object(folder / "config.json"):
        raise ConfigurationError(
            f"engine.model={model!r}: {folder / 'config.json'} is no JSON object: copy or download the model again"
        )
    for index in folder.glob("*.safetensors.index.json"):
        absent = sorted(name for name in _shards(index) if not (folder / name).is_file())
        if absent:
            raise ConfigurationError(
                f"engine.model={model!r}: {folder} has no {absent[0]}, one of {len(absent)} missing files that "
                f"{index.name} names: copy or download the model again"
            )


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{index} is no index of safetensors files: {type(error).__name__}") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
