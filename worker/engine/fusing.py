"""Fused weights: linear layers that a module applies to the same input become one, whose output is cut up again.

No family is known by name. A forward pass shows which linears of a module are given the very tensor that the module
itself was given; then the module gets the fused output in that tensor's place, and each linear a cut of it. Where
anything else of the module looks at its input, its output changes, and it stays as it was.

Letters: T tokens, I inputs, O outputs of a linear.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine import attention
from worker.engine.probe import WholeStep, probe_tokens

log = logging.getLogger("millrace.engine")

#: Name of the fused linear in its module.
_FUSED = "millrace_fused"
#: What an output may differ by, of its size, when the same products are summed in another order.
_TOLERANCE = 0.02


class _Cut(nn.Module):
    """One linear's part of the fused output."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start = start
        self.end = end

    def forward(self, fused: Tensor) -> Tensor:
        return fused[..., self.start : self.end]


@dataclass
class _Call:
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


@torch.inference_mode()
def fuse_linears(model: Any, config: Any) -> int:
    """Fuse what can be fused, and say so in the log; the number of linears that are part of another one now."""
    calls = _watch(model, config)
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


def _watch(model: Any, config: Any) -> dict[nn.Module, _Call]:
    """Every module that has linears of its own, and its call in a forward pass."""
    parents = [m for m in model.modules() if sum(type(child) is nn.Linear for child in m.children()) > 1]
    calls: dict[nn.Module, _Call] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module in calls:
            calls[module].num_calls += 1
        else:
            calls[module] = _Call(arguments, keywords)

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


def _note(parent: nn.Module, name: str, calls: dict[nn.Module, _Call]) -> Any:
    def before(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
        call = calls.get(parent)
        if call is not None and arguments and call.place_of(arguments[0]) is not None:
            call.linears[name] = call.linears.get(name, 0) + 1

    return before


def _siblings(module: nn.Module, call: _Call) -> tuple[tuple[str, ...], int | str] | None:
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


def _fuse_and_check(module: nn.Module, names: Sequence[str], place: int | str, call: _Call) -> bool:
    """Fuse, run the module once more, and undo it when its output is another."""
    kept = {name: getattr(module, name) for name in names}
    hook = _fuse(module, names, place)
    try:
        with attention.running(WholeStep()):
            output = module(*call.arguments, **call.keywords)
        if _agree(output, call.output):
            return True
    except (RuntimeError, TypeError, ValueError, AttributeError):
        pass
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


def _agree(one: Any, other: Any) -> bool:
    """Outputs are tensors, or tuples of tensors and whatever else."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        difference = (one.float() - other.float()).norm()
        return bool(difference <= _TOLERANCE * other.float().norm())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_agree(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other)
