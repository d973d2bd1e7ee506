"""How much memory there is, what a model takes of it, and what to say when it is too little: always with the numbers.

Imports torch for the device's side alone; weights are counted from their files before anything is loaded.
"""

import json
import logging
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine.model_files import LAYER, weight_files
from worker.engine.quantizing import MULTIPLE

log = logging.getLogger("millrace.engine")

_GIB = 1 << 30
#: Part of the memory that may lie in blocks too small for what is asked for.
_FRAGMENTS = 0.05
#: A safetensors header longer than this is no header.
_MAX_HEADER_BYTES = 1 << 27
#: Part of the names of weights that are matrices in files alone: transformers makes one tensor of all experts.
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def check_memory(
    folder: Path, device: torch.device, dtype: torch.dtype, settings: EngineSettings, task: str = "generate"
) -> None:
    """Raises ConfigurationError when the weights alone, as they come to the device, are more than what is free."""
    quantization = quantization_before(device, settings, task)
    needed = weight_bytes(folder, dtype, quantization)
    available = available_bytes(device, settings)
    kept = str(dtype).removeprefix("torch.") + ("" if quantization == "none" else f", quantized to {quantization}")
    log.info("weights take %.2f GiB in %s; %.2f GiB are available on %s", needed / _GIB, kept, available / _GIB, device)
    if needed <= available:
        return
    smaller = dtype.itemsize > 2
    half = f", engine.dtype=bfloat16 (then {needed * 2 / dtype.itemsize / _GIB:.2f} GiB)" if smaller else ""
    if device.type == "cuda" and task == "generate" and not smaller and quantization == "none":
        half = f", engine.quantization=int8 or float8 (then {weight_bytes(folder, dtype, 'int8') / _GIB:.2f} GiB)"
    raise ConfigurationError(
        f"the weights in {folder} take {needed / _GIB:.2f} GiB in {kept}, and "
        f"{available / _GIB:.2f} GiB are available on {device}{_fraction(device, settings)}: use a device with more "
        f"memory{half} or a smaller model"
    )


def quantization_before(device: torch.device, settings: EngineSettings, task: str) -> str:
    """How weights are quantized on their way to the device, if need be; for other tasks that comes after it."""
    return settings.quantization if device.type == "cuda" and task == "generate" else "none"


def weight_bytes(folder: Path, dtype: torch.dtype, quantization: str = "none") -> int:
    """What the tensors of a folder's weights take once they are floats of `dtype`, or quantized in the layers."""

    def num_bytes(tensor: StoredTensor) -> int:
        is_matrix = len(tensor.shape) == 2 and not any(size % MULTIPLE for size in tensor.shape)
        is_linear = is_matrix and LAYER.search(tensor.name) and not _EXPERT.search(tensor.name)
        if quantization != "none" and is_linear:
            return tensor.num_elements + tensor.shape[0] * torch.float32.itemsize
        return tensor.num_elements * dtype.itemsize

    return sum(map(num_bytes, stored_tensors(folder)))


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """The tensors of a folder's weights."""
    for path in weight_files(folder):
        yield from _tensors(path)


def available_bytes(device: torch.device, settings: EngineSettings) -> int:
    """Free for this process: memory_fraction of a GPU less what others hold, or the machine's (or container's) rest."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return int(total * settings.memory_fraction - others)
    return min(_machine_bytes(), _container_bytes())


def bound_memory(device: torch.device, settings: EngineSettings) -> None:
    """Torch gives unused blocks back rather than hold more than memory_fraction, and a little for fragments."""
    torch.cuda.set_per_process_memory_fraction(min(settings.memory_fraction + _FRAGMENTS, 1.0), device)


def check_cache(device: torch.device, num_bytes: int, num_tokens: int, settings: EngineSettings) -> None:
    """Raises ConfigurationError, naming the largest kv_tokens, when a KV cache of `num_tokens` would not fit.

    On CUDA what is free is what the weights have left; a step's own needs come on top.
    """
    available = available_bytes(device, settings)
    if device.type == "cuda":
        available -= torch.cuda.memory_allocated(device)
    if num_bytes <= available:
        return
    fitting = max(available, 0) * num_tokens // num_bytes
    raise ConfigurationError(
        f"a KV cache of {num_tokens} tokens takes {num_bytes / _GIB:.2f} GiB, and {max(available, 0) / _GIB:.2f} GiB "
        f"are available on {device}{_fraction(device, settings)}: set engine.kv_tokens to {fitting} or less"
    )


def _fraction(device: torch.device, settings: EngineSettings) -> str:
    return f" (engine.memory_fraction={settings.memory_fraction})" if device.type == "cuda" else ""


def _tensors(path: Path) -> Iterator[StoredTensor]:
    """From the file's header alone; an unreadable file is left to whoever loads it."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else {}
    except (OSError, ValueError, struct.error):
        return
    for name, tensor in header.items():
        if name != "__metadata__":
            yield StoredTensor(name, tensor["dtype"], tuple(tensor["shape"]))


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: what is installed is the best that is known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kib * 1024


def _container_bytes() -> int:
    """What the control group leaves; as much as there may be where there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        # Cached files count as used and are given up when memory is wanted.
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return 1 << 62 if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62
