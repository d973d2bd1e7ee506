"""What a model is computed in."""

from collections import Counter
from pathlib import Path

import torch

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings
from worker.engine.memory import stored_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Parameters from which a CPU's bfloat16 is worth that its answers depend on the machine. Measured with
#: benchmarks/cpu_engine.py's requests: 4 million gain nothing, 159 million run 2 to 3 times as fast.
_MIN_BFLOAT16_PARAMETERS = 100_000_000
#: Names that torch gives to what multiplies in bfloat16; without it torch converts, and is slower than in float32.
_BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


def choose_dtype(settings: EngineSettings, device: torch.device, folder: Path | None = None) -> torch.dtype:
    """The settings', or what suits the device and the weights in `folder`. Raises ConfigurationError."""
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise ConfigurationError(
            f"engine.dtype={settings.dtype!r} is unknown: it is auto or one of {', '.join(DTYPES)}"
        )
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if device.type == "cuda" or (folder is not None and _suits_bfloat16(folder)):
        return torch.bfloat16
    return torch.float32


def cache_dtype(settings: EngineSettings, dtype: torch.dtype) -> torch.dtype:
    """What K and V of a model that computes in `dtype` are kept in."""
    return dtype if settings.kv_dtype == "auto" else torch.float8_e4m3fn


def _suits_bfloat16(folder: Path) -> bool:
    """On a CPU: large weights that are kept in bfloat16, where it is the machine's own."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not any(capabilities.get(name) for name in _BFLOAT16_CAPABILITIES):
        return False
    nums: Counter[str] = Counter()
    for tensor in stored_tensors(folder):
        nums[tensor.dtype] += tensor.num_elements
    return 2 * nums["BF16"] > nums.total() >= _MIN_BFLOAT16_PARAMETERS
