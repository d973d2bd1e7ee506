"""Module calls: how the modules of a model that have linear layers are called, seen in one forward pass.

What they gave then is what they must give after they have been changed.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine import attention
from worker.engine.probe import WholeStep, probe_tokens

#: What an output may differ by, of its size, when the same products are summed in another order.
TOLERANCE = 0.02


@dataclass
class ModuleCall:
    """How a module was called, once, and which of its linears were given the same tensor."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any = None
    num_calls: int = 1
    linears: dict[str, int] = field(default_factory=dict)  # by name, with the number of calls on the module's input

    def place_of(self, given: Tensor) -> int | str | None:
        """Where the module was given this tensor."""
        for i, argument in enumerate(self.arguments):
            if argument is given:
                return i
        return next((name for name, value in self.keywords.items() if value is given), None)

    def is_repeated_by(self, module: nn.Module) -> bool:
        """Whether a module, called in the same way, gives the same."""
        return self.difference_from(module) <= TOLERANCE

    def difference_from(self, module: nn.Module) -> float:
        """Of what a module, called in the same way, gives, as a part of it; infinite where it is something else."""
        try:
            with attention.running(WholeStep()):
                output = module(*self.arguments, **self.keywords)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
            return math.inf
        return _difference(output, self.output)


@torch.inference_mode()
def watch_calls(model: Any, config: Any) -> dict[nn.Module, ModuleCall]:
    """Every module that has several linears of its own, and its call in a forward pass."""
    parents = [m for m in model.modules() if sum(type(child) is nn.Linear for child in m.children()) > 1]
    calls: dict[nn.Module, ModuleCall] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module in calls:
            calls[module].num_calls += 1
        else:
            calls[module] = ModuleCall(arguments, keywords)

    def after(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        calls[module].output = output

    hooks = []
    for parent in parents:
        hooks.append(parent.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(parent.register_forward_hook(after, with_kwargs=True))
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                hooks.append(child.register_forward_pre_hook(_note(parent, name, calls)))
    try:
        ids = probe_tokens(model, config)
        with attention.running(WholeStep()):
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _note(parent: nn.Module, name: str, calls: dict[nn.Module, ModuleCall]) -> Any:
    def before(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
        call = calls.get(parent)
        if call is not None and arguments and call.place_of(arguments[0]) is not None:
            call.linears[name] = call.linears.get(name, 0) + 1

    return before


def _difference(one: Any, other: Any) -> float:
    """Outputs are tensors, or tuples of tensors and whatever else."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or not one.numel():  # nothing says nothing
            return math.inf
        difference, size = float((one.float() - other.float()).norm()), float(other.float().norm())
        return difference / size if size > 0 else 0.0 if difference == 0 else math.inf
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    return 0.0 if type(one) is type(other) and not isinstance(one, tuple) else math.inf
