"""Whether the kernels of this package run on a device; imports none of them."""

import importlib.util

import torch


def triton_obstacle(device: torch.device) -> str | None:
    """Why our Triton kernels do not run here; None where they do."""
    if device.type != "cuda":
        return f"the device is {device}, and Triton needs CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None
