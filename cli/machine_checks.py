"""What doctor looks at on this machine: packages, device, attention, model, disks. Loads torch where there is one."""

import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cli.finding import Finding, failed, ok, shown_bytes, warning
from protocol.errors import ConfigurationError
from protocol.settings import Settings

if TYPE_CHECKING:
    import torch

#: What cannot be done without the packages of an extra.
_ABSENT = {
    "postgres": "this machine can use SQLite only",
    "parquet": "this machine reads and writes no Parquet",
    "worker": "this machine can submit, not work",
}
CLIENT_ONLY = f"not installed: {_ABSENT['worker']}"
_INSTALL_WORKER = "for a worker: pip install torch, then pip install '.[worker]' in Millrace's folder"
#: Free space on a disk below which a long Job may not get through, and below which nothing will.
_LOW_DISK_BYTES = 2 << 30
_NO_DISK_BYTES = 64 << 20
#: Where `millrace run` keeps its ledger unless it is told otherwise.
_STATE = Path(".millrace")
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")


def check_packages() -> Iterator[Finding]:
    """Each package that Millrace asks for, against the versions it asks for."""
    yield ok("millrace", f"{metadata.version('millrace')}, Python {platform.python_version()}, {platform.platform()}")
    groups: dict[str, list[str]] = {}
    for text in metadata.requires("millrace") or ():
        marked = _EXTRA.search(text)
        groups.setdefault(marked[1] if marked else "", []).append(text)
    for extra in ("", *_ABSENT):
        if extra in groups:
            yield _packages(f"{extra} packages".lstrip(), extra, groups[extra])


def _packages(name: str, extra: str, requirements: list[str]) -> Finding:
    from packaging.requirements import Requirement

    present: list[str] = []
    wrong: list[str] = []
    absent: list[str] = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            absent.append(requirement.name)
            continue
        present.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    target = f"'.[{extra}]'" if extra else "."
    install = f"pip install {target} in Millrace's folder"
    if wrong or (absent and not extra):
        missing = [f"{package} is missing" for package in absent]
        return failed(name, "; ".join([*wrong, *missing]), install)
    if absent:
        way_out = _INSTALL_WORKER if extra == "worker" else install
        return warning(name, f"not installed: {_ABSENT[extra]} ({', '.join(absent)})", way_out)
    return ok(name, ", ".join(present))


def check_device(settings: Settings) -> Iterator[Finding]:
    """The device the engine would take, its memory, and the attention that the model would have on it."""
    if find_spec("torch") is None:
        yield warning("device", CLIENT_ONLY, _INSTALL_WORKER)
        return
    import torch

    from worker.engine.loader import choose_device

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield ok("torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} CPU threads")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        facts = f"cuda:{index} {torch.cuda.get_device_name(index)}, {shown_bytes(free)} of {shown_bytes(total)} free"
        yield ok("gpu", facts)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        way_out = "install the build of torch for this driver's CUDA: `nvidia-smi` shows which it supports"
        yield warning("gpu", "nvidia-smi is here, but torch sees no GPU", way_out)
    device = choose_device(settings.engine)
    yield ok("device", str(device))
    yield _attention(settings, device)


def _attention(settings: Settings, device: "torch.device") -> Finding:
    from worker.engine.attention import choose_backend, flash_attention_obstacle
    from worker.engine.dtypes import cache_dtype, choose_dtype
    from worker.engine.kernels.obstacle import triton_obstacle
    from worker.engine.model_files import local_folder
    from worker.engine.task import choose_task
    from worker.engine.text_attention import choose_text_attention

    engine = settings.engine
    try:
        folder = local_folder(engine.model, engine.revision)
    except ConfigurationError:  # what is wrong with it is said by `check_model`
        folder = None
    dtype = choose_dtype(engine, device, folder)
    facts = f"in {_shown_dtype(dtype)}" + ("" if folder else ", as far as can be said without the model")
    is_best = engine.attention == "auto" and device.type == "cuda"
    if folder is not None and (task := choose_task(folder, engine)) != "generate":
        facts = f"{choose_text_attention(engine.attention, device, dtype).name} {facts}, to {task}"
        missing, gain = flash_attention_obstacle(device, dtype), "whole texts are faster with flash-attn"
    else:
        backend = choose_backend(engine.attention, device, dtype, cache_dtype(engine, dtype))
        facts = f"{backend.name} {facts}"
        missing, gain = triton_obstacle(device), "the engine is several times as fast with Triton's kernels"
    return warning("attention", f"{facts}; {missing}", gain) if is_best and missing else ok("attention", facts)


def check_model(settings: Settings) -> Iterator[Finding]:
    """The model's files as they lie here: whether they can be read, and the weights fit. Downloads nothing."""
    engine = settings.engine
    if find_spec("torch") is None:
        yield warning("model", CLIENT_ONLY, _INSTALL_WORKER)
        return
    from worker.engine.checkpoint import check_checkpoint
    from worker.engine.dtypes import choose_dtype
    from worker.engine.loader import choose_device
    from worker.engine.memory import available_bytes, check_memory, quantization_before, weight_bytes
    from worker.engine.model_files import local_folder
    from worker.engine.quantizing import check_quantization
    from worker.engine.task import choose_task
    from worker.text import Tokenizer

    folder = local_folder(engine.model, engine.revision)
    if folder is None:
        facts = f"{engine.model} is no folder here and is not in the hub's cache"
        yield warning("model", facts, "a worker downloads it at its start if the model hub has it, or fails")
        return
    check_checkpoint(folder)
    Tokenizer(folder)
    device = choose_device(engine)
    dtype = choose_dtype(engine, device, folder)
    check_quantization(engine.quantization, device, dtype)
    task = choose_task(folder, engine)
    quantization = quantization_before(device, engine, task)
    needed, available = weight_bytes(folder, dtype, quantization), available_bytes(device, engine)
    check_memory(folder, device, dtype, engine, task)
    kept = "" if engine.quantization == "none" else f", quantized to {engine.quantization}"
    if quantization != engine.quantization:
        kept = f", before they are quantized to {engine.quantization}"
    yield ok(
        "model",
        f"{folder}, served as {settings.served_model}: weights take {shown_bytes(needed)} of "
        f"{shown_bytes(available)} on {device} in {_shown_dtype(dtype)}{kept}",
    )


def _shown_dtype(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def check_disks(settings: Settings) -> Iterator[Finding]:
    """Free space where the ledger, the state of `millrace run` and temporary files are."""
    places = {"state": _STATE, "temporary files": Path(tempfile.gettempdir())}
    if settings.database_url.startswith("sqlite:///"):
        places = {"database": Path(settings.database_url.removeprefix("sqlite:///").partition("?")[0]).parent, **places}
    for what, path in places.items():
        there = path.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        facts = f"{what}: {shown_bytes(free)} free at {there}"
        way_out = "free some space, or move it to a larger disk; what is stored stays, and the same command goes on"
        if free < _NO_DISK_BYTES:
            yield failed("disk", facts, way_out)
        elif free < _LOW_DISK_BYTES:
            yield warning("disk", facts, way_out)
        else:
            yield ok("disk", facts)
