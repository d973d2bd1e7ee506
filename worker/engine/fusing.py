"""Fused weights: linear layers that a module applies to the same input become one, whose output is cut up again.

No family is known by name. A forward pass shows which linears of a module are given the very tensor that the module
itself was given; then the module gets the fused output in that tensor's place, and each linear a cut of it. Where
anything else of the module looks at its input, its output changes, and it stays as it was.

Letters: T tokens, I inputs, O outputs of a linear.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.module_calls import ModuleCall, watch_calls

log = logging.getLogger("millrace.engine")

#: Name of the fused linear in its module.
_FUSED = "millrace_fused"


class _Cut(nn.Module):
    """One linear's part of the fused output."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start = start
        self.end = end

    def forward(self, fused: Tensor) -> Tensor:
        return fused[..., self.start : self.end]


@torch.inference_mode()
def fuse_linears(model: Any, config: Any) -> int:
    """Fuse what can be fused, and say so in the log; the number of linears that are part of another one now."""
    calls = watch_calls(model, config)
    kinds: dict[tuple[type[nn.Module], tuple[str, ...]], list[tuple[nn.Module, int | str]]] = {}
    for module, call in calls.items():
        found = _siblings(module, call)
        if found is not None:
            names, place = found
            kinds.setdefault((type(module), names), []).append((module, place))
    num_fused = 0
    for (kind, names), modules in kinds.items():
        first, place = modules[0]
        if not _fuse_and_check(first, names, place, calls[first]):
            log.warning("weights of %s.%s are not fused: it uses its input elsewhere too", kind.__name__, names)
            continue
        for module, other_place in modules[1:]:
            _fuse(module, names, other_place)
        num_fused += len(names) * len(modules)
        log.info("weights fused: %s of %s, in %d modules", " + ".join(names), kind.__name__, len(modules))
    if not num_fused:
        log.info("weights run unfused: no linear layers of this model share their input, or they are fused already")
    return num_fused


def _siblings(module: nn.Module, call: ModuleCall) -> tuple[tuple[str, ...], int | str] | None:
    """The linears of a module, called once each on its one input, and where that input is among its arguments."""
    names = tuple(call.linears)
    if len(names) < 2 or call.num_calls != 1 or any(num != 1 for num in call.linears.values()):
        return None
    linears = [getattr(module, name) for name in names]
    alike = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in linears}
    tensors = [x for x in (*call.arguments, *call.keywords.values()) if isinstance(x, Tensor)]
    inputs = [x for x in tensors if x.shape[-1] == linears[0].in_features and x.is_floating_point()]
    place = call.place_of(inputs[0]) if len(inputs) == 1 else None
    return (names, place) if len(alike) == 1 and place is not None else None


def _fuse_and_check(module: nn.Module, names: Sequence[str], place: int | str, call: ModuleCall) -> bool:
    """Fuse, run the module once more, and undo it when its output is another."""
    kept = {name: getattr(module, name) for name in names}
    hook = _fuse(module, names, place)
    if call.is_repeated_by(module):
        return True
    hook.remove()
    delattr(module, _FUSED)
    for name, linear in kept.items():
        setattr(module, name, linear)
    return False


def _fuse(module: nn.Module, names: Sequence[str], place: int | str) -> Any:
    linears = [getattr(module, name) for name in names]
    first = linears[0]
    fused = nn.Linear(first.in_features, 1, bias=first.bias is not None, device="meta", dtype=first.weight.dtype)
    fused.weight = nn.Parameter(torch.cat([x.weight for x in linears]), requires_grad=False)  # (sum of O, I)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([x.bias for x in linears]), requires_grad=False)
    fused.out_features = len(fused.weight)
    setattr(module, _FUSED, fused)
    start = 0
    for name, linear in zip(names, linears, strict=True):
        setattr(module, name, _Cut(start, start + linear.out_features))
        start += linear.out_features

    def before(
        module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(place, int):
            return (*arguments[:place], module.millrace_fused(arguments[place]), *arguments[place + 1 :]), keywords
        return arguments, {**keywords, place: module.millrace_fused(keywords[place])}

    return module.register_forward_pre_hook(before, with_kwargs=True)
