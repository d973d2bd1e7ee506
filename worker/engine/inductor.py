"""What torch's compiler, Inductor, is told beyond its own rules. To be imported only where something is compiled."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: Numbers that a program reduces in its registers, having read them once; torch's own limit is 1024.
_MOST_IN_REGISTERS = 4096


class ResidualFolding(CustomGraphPass):
    """Moves sums behind wide products into them, in graphs that torch.compile makes."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.millrace.multiply.default):
            x, weight, residual = node.args
            if residual is not None or len(node.users) != 1:
                continue
            (total,) = node.users
            if total.target is not torch.ops.aten.add.Tensor or total.kwargs or total.args[0] is total.args[1]:
                continue
            other = total.args[1] if total.args[0] is node else total.args[0]
            if isinstance(other, fx.Node) and _is_like(other, node):
                with graph.inserting_before(total):
                    folded = graph.call_function(node.target, (x, weight, other))
                folded.meta.update(total.meta)
                total.replace_all_uses_with(folded)
                graph.erase_node(total)
                graph.erase_node(node)

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))


def _is_like(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta["val"], other.meta["val"]
    return (
        isinstance(a, Tensor)
        and a.dtype == b.dtype
        and a.dim() == b.dim()
        and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))
    )


class _Choices(InductorChoices):
    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        """Also for norms of larger models."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        is_of_rows = features.get_reduction_hint() is ReductionHint.INNER
        return is_of_rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, _MOST_IN_REGISTERS)


def choosing() -> AbstractContextManager[None]:
    """What is compiled within follows these rules."""
    handled: AbstractContextManager[None] = V.set_choices_handler(_Choices())
    return handled


#: Of torch.compile. The same objects for all layers: to torch, what is compiled with others is another layer. Kernels
#: that do not wait for each other, such as the norms of queries and of keys, are launched as one.
options: Any = {"post_grad_custom_pre_pass": ResidualFolding(), "combo_kernels": True}
