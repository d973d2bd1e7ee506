"""How many multiprocessors a device has: what grids of programs that stay are made for."""

import functools

import torch


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """A small number where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5
