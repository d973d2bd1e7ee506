"""What every engine says of itself when it is ready, whatever it computes."""

import platform
from typing import Any

import torch

from worker.engine.model_files import ENGINE_VERSION


def environment(device: torch.device, *, spreads: bool) -> dict[str, Any]:
    """Fields of EngineReady on where it runs; `spreads` says that engines on the machine's other GPUs would do too."""
    import transformers

    is_cuda = device.type == "cuda"
    return {
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if is_cuda else "cpu",
        "num_devices": torch.cuda.device_count() if spreads and is_cuda else 1,
        "versions": {
            "engine": ENGINE_VERSION,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
