"""Gated layers: an MLP's gate, its activation and what is multiplied with it become one product.

As with fused weights no family is known by name. A forward pass shows which linears of a module are given the module's
own input; what they, an activation and one more linear may be is built, and takes the module's place where it gives the
same.

Letters: T tokens, I inputs, O outputs of each half.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.engine.kernels.plain import GATE_BLOCK, plain_gate
from worker.engine.module_calls import TOLERANCE, ModuleCall, watch_calls

log = logging.getLogger("millrace.engine")

#: Activations that the kernels know.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
#: So many times further off is the half that is not the gate in the gate's place.
_DISTINCTION = 4
#: Tokens from which one kernel for product and activation is faster than two.
LEAST_TOKENS = 1024


class GatedLayer(nn.Module):
    """down(activation(gate x) * (other x))."""

    def __init__(self, gate: Tensor, other: Tensor, activation: str, down: nn.Module) -> None:
        """gate and other are (O, I)."""
        super().__init__()
        halves = [half.view(-1, GATE_BLOCK, half.shape[1]) for half in (gate, other)]
        self.weight = nn.Parameter(torch.stack(halves, dim=1).flatten(0, 2), requires_grad=False)  # (2 O, I)
        self.activation = activation
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.ops.millrace.gated(x, self.weight, self.activation))
        return output


@torch.inference_mode()
def gate_layers(model: Any, config: Any) -> int:
    """Replace what can be replaced, and say so in the log; the number of layers that are gated now. For GPUs that have
    the kernel."""
    calls = watch_calls(model, config)
    kinds: Counter[tuple[str, str]] = Counter()
    while calls:  # one after the other, so that there is never more than one weight twice
        module, call = calls.popitem()
        layer = _gated_layer(module, call)
        if layer is not None:
            path = next(name for name, other in model.named_modules() if other is module)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
            kinds[" + ".join(call.linears), type(module).__name__] += 1
    for (names, kind), num in kinds.items():
        log.info("weights gated: %s of %s, in %d modules", names, kind, num)
    return kinds.total()


def _gated_layer(module: nn.Module, call: ModuleCall) -> GatedLayer | None:
    """What gives the same as this module. Others of its class may be of another size, or do something else."""
    if not set(call.linears.values()) == {1} == {call.num_calls}:
        return None
    tried = [(call.difference_from(layer), layer) for layer in _candidates(module, tuple(call.linears))]
    if not tried:
        return None
    # What an activation of next to nothing gives is next to the same whichever half is the gate.
    (least, best), (other, _) = sorted(tried, key=lambda pair: pair[0])
    return best if least <= TOLERANCE and other > _DISTINCTION * least else None


def _candidates(module: nn.Module, names: tuple[str, ...]) -> Iterator[GatedLayer]:
    """What a module may be, if it is gated at all, which is two things: one half or the other is the gate. `names` are
    those of its linears that are given its input."""
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if type(child) is nn.Linear}
    activation = _activation([x for x in children.values() if type(x) not in (nn.Linear, nn.Dropout)])
    starts = [linears[name] for name in names]
    ends = [linear for name, linear in linears.items() if name not in names]
    if activation is None or len(ends) != 1 or any(linear.bias is not None for linear in starts):
        return
    down = ends[0]
    halves = [half for linear in starts for half in torch.split(linear.weight, down.in_features)]
    if len(halves) != 2 or any(len(half) % GATE_BLOCK or half.shape[1] % 8 for half in halves):
        return
    if halves[0].shape == halves[1].shape == (down.in_features, starts[0].in_features):
        for gate, other in (halves, halves[::-1]):
            yield GatedLayer(gate, other, activation, down)


def _activation(modules: list[nn.Module]) -> str | None:
    """Which of ACTIVATIONS the only one of these is."""
    if len(modules) != 1 or list(modules[0].parameters()):
        return None
    points = torch.linspace(-6, 6, 97)
    try:
        given = modules[0](points)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
        return None
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known(points), given, atol=1e-5)), None)


@torch.library.custom_op("millrace::gated", mutates_args=())
def _gated(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """x (..., I), weight (2 O, I) with alternating rows -> (..., O)."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        result = plain_gate(F.linear(rows, weight), ACTIVATIONS[activation])
        return result.view(*x.shape[:-1], result.shape[-1])
    from worker.engine.kernels.product import gate, product

    if len(rows) < LEAST_TOKENS or x.dtype.itemsize != 2:
        result = gate(F.linear(rows, weight), activation)
    else:
        result = product(rows, weight, activation)
    return result.view(*x.shape[:-1], result.shape[-1])


@_gated.register_fake
def _shape_of(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)
