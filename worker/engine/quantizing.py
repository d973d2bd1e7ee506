"""Quantized weights: the linears of a model's layers multiply in 8 bits, with a scale for each output and each token.

Weights are rounded once, at load. What they are multiplied with is rounded as it comes, by plain operations, which
torch.compile makes part of the norm or the activation before. Embeddings, norms and heads stay as they are.

Letters: T tokens, I inputs, O outputs of a linear.
"""

import logging
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocol.errors import ConfigurationError

log = logging.getLogger("millrace.engine")

FORMATS = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
#: What the largest number of a row becomes: the largest of the format, and as many steps below zero as above.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
#: From this compute capability on a GPU multiplies the format.
_LEAST_CAPABILITY = {"float8": (8, 9), "int8": (8, 0)}
#: GPUs multiply matrices whose sizes are multiples of this; of the same layers on a CPU, answers are the same.
MULTIPLE = 16
#: Tokens below which torch._int_mm multiplies nothing on a GPU, rounded up to what suits its tiles.
_LEAST_TOKENS = 32
#: A row of zeros is divided by this.
_LEAST_SCALE = torch.finfo(torch.float32).tiny
#: Weights that are rounded at a time, since that takes several copies in float32.
_PIECE = 1 << 24


class QuantizedLinear(nn.Module):
    """In place of a linear layer."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """weight is (O, I), bias (O,)."""
        super().__init__()
        rounded = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        scale = torch.empty(1, len(weight), dtype=torch.float32, device=weight.device)
        num_rows = max(_PIECE // weight.shape[1], 1)
        for start in range(0, len(weight), num_rows):
            part = slice(start, start + num_rows)
            rounded[part], part_scale = round_rows(weight[part], dtype)
            scale[0, part] = part_scale[:, 0]
        self.weight = nn.Parameter(rounded, requires_grad=False)  # (O, I)
        self.register_buffer("scale", scale)  # (1, O)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = round_rows(x.reshape(-1, x.shape[-1]), self.weight.dtype)
        output: Tensor
        if self.weight.dtype == torch.int8:
            sums = torch.ops.millrace.multiply_int8(rounded, self.weight)
            output = (sums * scale * self.scale).to(x.dtype)
        else:
            output = torch.ops.millrace.multiply_float8(rounded, scale, self.weight, self.scale, x.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*x.shape[:-1], len(self.weight))


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (T, I) -> the nearest in `dtype` (T, I), and what each row has to be multiplied with, (T, 1) in float32."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / _LARGEST[dtype]).clamp(min=_LEAST_SCALE)
    x = x / scale
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def check_quantization(quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigurationError when the device cannot multiply so for a model that computes in `dtype`."""
    if quantization == "none":
        return
    setting, obstacle = f"engine.quantization={quantization!r}", None
    if device.type == "cuda":
        least, found = _LEAST_CAPABILITY[quantization], torch.cuda.get_device_capability(device)
        if found < least:
            others = [name for name, capability in _LEAST_CAPABILITY.items() if found >= capability]
            obstacle = (
                f"needs compute capability {least[0]}.{least[1]}, and {torch.cuda.get_device_name(device)} has "
                f"{found[0]}.{found[1]}: use {' or '.join([*others, 'none'])}"
            )
        elif quantization == "float8" and dtype.itemsize != 2:
            name = str(dtype).removeprefix("torch.")
            obstacle = f"gives 16 bits on CUDA, and engine.dtype is {name}: use bfloat16 or float16, or int8"
    elif quantization == "int8" and not _multiplies_exactly():
        obstacle = "needs a CPU with VNNI: this one's products of 8 bits overflow. Use none"
    if obstacle is not None:
        raise ConfigurationError(f"{setting} {obstacle}")


def _multiplies_exactly() -> bool:
    """Without VNNI a CPU may add two products in 16 bits."""
    x, weight = torch.full((4, 64), 127, dtype=torch.int8), torch.full((16, 64), -127, dtype=torch.int8)
    return bool((torch._int_mm(x, weight.t()) == -64 * 127 * 127).all())


@torch.inference_mode()
def quantize_linears(model: Any, config: Any, quantization: str, device: torch.device) -> None:
    """Replace the linears of the model's layers by others on `device`, one after the other, and say so in the log.

    Raises ConfigurationError when there are none.
    """
    replaced: Counter[str] = Counter()
    left: set[str] = set()
    num_bytes = num_bytes_before = 0
    for parent in _modules_of_layers(model, config.num_hidden_layers):
        # Whatever is not a linear, such as the weights of experts, and linears whose sizes do not fit.
        left.update(name for name, parameter in parent.named_parameters(recurse=False) if parameter.dim() > 2)
        for name in [name for name, _ in parent.named_children()]:
            weight = _linear_weight(child := getattr(parent, name))
            if weight is None:
                continue
            if any(size % MULTIPLE for size in weight.shape):
                left.add(name)
                continue
            bias = None if child.bias is None else child.bias.to(device)
            quantized = QuantizedLinear(weight.to(device), bias, FORMATS[quantization])
            setattr(parent, name, quantized)  # and the old weights go, before there are others
            replaced[name] += 1
            num_bytes_before += weight.nbytes
            num_bytes += quantized.weight.nbytes + quantized.scale.nbytes
    if not replaced:
        raise ConfigurationError(
            f"engine.quantization={quantization!r}, but this model of type {config.model_type!r} has no list of "
            f"{config.num_hidden_layers} layers with linear ones whose sizes are multiples of {MULTIPLE}: use none"
        )
    names = " and ".join(sorted(replaced))
    sizes = f"{num_bytes_before / 2**30:.2f} GiB become {num_bytes / 2**30:.2f}"
    log.info("weights quantized to %s: %s, in %d modules; %s", quantization, names, replaced.total(), sizes)
    if device.type == "cpu" and quantization == "float8":
        log.warning("a CPU multiplies no float8, and takes several times as long to convert it: int8 is faster")
    if left:
        log.warning(
            "weights not quantized, since they are of no linear layer or no multiple of %d: %s",
            MULTIPLE,
            " and ".join(sorted(left)),
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # pieces of the old weights' size fit nothing that comes


def _modules_of_layers(model: Any, num_layers: int) -> list[nn.Module]:
    """What holds the linears of the model's layers, each once; heads and embeddings are no part of them."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    modules = dict.fromkeys(module for layers in lists for module in layers.modules())
    # Of the linears themselves nothing may hold on to the weights.
    return [module for module in modules if _linear_weight(module) is None]


def _linear_weight(module: Any) -> Tensor | None:
    """(O, I) of a linear layer, also of GPT-2's, which keeps it the other way round."""
    from transformers.pytorch_utils import Conv1D

    if type(module) not in (nn.Linear, Conv1D):
        return None
    weight: Tensor = module.weight
    return weight if type(module) is nn.Linear else weight.t()


@torch.library.custom_op("millrace::multiply_int8", mutates_args=())
def _multiply_int8(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, I), weight (O, I) -> (T, O) int32."""
    num_tokens = len(x)
    if x.device.type == "cuda" and num_tokens < _LEAST_TOKENS:
        x = F.pad(x, (0, 0, 0, _LEAST_TOKENS - num_tokens))
    return torch._int_mm(x, weight.t())[:num_tokens]


@_multiply_int8.register_fake
def _shape_of_int8(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], len(weight), dtype=torch.int32)


@torch.library.custom_op("millrace::multiply_float8", mutates_args=())
def _multiply_float8(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (T, I) with scale (T, 1), weight (O, I) with weight_scale (1, O) -> (T, O) in `dtype`."""
    if x.device.type == "cuda":
        return torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=dtype)
    return ((x.float() @ weight.float().t()) * scale * weight_scale).to(dtype)


@_multiply_float8.register_fake
def _shape_of_float8(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], len(weight), dtype=dtype)
