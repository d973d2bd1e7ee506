"""Whether the kernels of this package run on a device; imports none of them."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch


def triton_obstacle(device: torch.device) -> str | None:
    """Why our Triton kernels do not run here; None where they do."""
    if device.type != "cuda":
        return f"the device is {device}, and Triton needs CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return compiler_obstacle()


def product_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel for products does not run here; None where it does."""
    if (obstacle := triton_obstacle(device)) is not None:
        return obstacle
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"{torch.cuda.get_device_name(device)} is not of compute capability 9"
    if dtype.itemsize != 2:
        return f"weights are in {str(dtype).removeprefix('torch.')}, and the kernel multiplies 16 bits"
    return None


def compiler_obstacle() -> str | None:
    """Triton compiles what launches its kernels with a C compiler, against Python's headers (triton.runtime.build)."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is no gcc or clang: install gcc, or name one with CC"
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's headers, and there is no {headers}/Python.h: install python3-dev"
    return None
