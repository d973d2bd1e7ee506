"""How much memory there is, what a model takes of it, and what to say when it is too little: always with the numbers.

Imports torch for the device's side alone; weights are counted from their files before anything is loaded.
"""

import json
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine.model_files import weight_files

log = logging.getLogger("millrace.engine")

_GIB = 1 << 30
#: Part of the memory that may lie in blocks too small for what is asked for.
_FRAGMENTS = 0.05
#: A safetensors header longer than this is no header.
_MAX_HEADER_BYTES = 1 << 27


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype, settings: EngineSettings) -> None:
    """Raises ConfigurationError when the weights alone are more than what is free."""
    needed = weight_bytes(folder, dtype)
    available = available_bytes(device, settings)
    log.info(
        "weights take %.2f GiB in %s; %.2f GiB are available on %s", needed / _GIB, dtype, available / _GIB, device
    )
    if needed <= available:
        return
    smaller = dtype.itemsize > 2
    half = f", engine.dtype=bfloat16 (then {needed * 2 / dtype.itemsize / _GIB:.2f} GiB)" if smaller else ""
    raise ConfigurationError(
        f"the weights in {folder} take {needed / _GIB:.2f} GiB in {str(dtype).removeprefix('torch.')}, and "
        f"{available / _GIB:.2f} GiB are available on {device}{_fraction(device, settings)}: use a device with more "
        f"memory{half} or a smaller model"
    )


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What the tensors of a folder's weights take once they are floats of `dtype`."""
    return sum(num for _, num in stored_tensors(folder)) * dtype.itemsize


def stored_tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """The dtype, as safetensors names it, and the number of elements of each tensor of a folder's weights."""
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


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """From the file's header alone; an unreadable file is left to whoever loads it."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else {}
    except (OSError, ValueError, struct.error):
        return
    for name, tensor in header.items():
        if name != "__metadata__":
            num = 1
            for size in tensor["shape"]:
                num *= size
            yield tensor["dtype"], num


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
