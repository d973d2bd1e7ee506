"""Kernels compiled for a GPU that is not here: what their launches would compile, from the arguments they are given."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = GPUTarget("cuda", 90, 32)
#: What a program may have of a multiprocessor's shared memory on sm_90, and what all of them may have together.
SHARED_BYTES, SHARED_BYTES_OF_ALL = 232_448, 233_472
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    kernel: str
    shared_bytes: int
    num_registers: int
    spilled_bytes: int
    ptx: str
    specialization: str  # what Triton compiles anew for


@contextmanager
def compiled() -> Iterator[list[Compiled]]:
    """Launches within compile for HOPPER and run nothing."""
    found: list[Compiled] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_compile(kernel, arguments, options))

    with patch.object(JITFunction, "run", run):
        yield found


def _compile(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    names = kernel.arg_names
    launch = {name: options.pop(name) for name in list(options) if name not in names}
    values = dict(zip(names, arguments, strict=False)) | options
    constants = {p.name for p in kernel.params if p.is_constexpr}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(names):
        value = values[name]
        if name in constants or value is None or (isinstance(value, int) and value == 1 and name not in general):
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            element = _TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in general:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    result = triton.compile(source, target=HOPPER, options=launch)
    registers, spilled = _resources(result.asm["cubin"])
    return Compiled(kernel.fn.__name__, result.metadata.shared, registers, spilled, result.asm["ptx"], source.hash())


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of each that did not fit."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])
