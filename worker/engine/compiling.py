"""Compiling: the model's layers through torch.compile, one at a time, with the number of tokens left open.

All layers of a kind run the same code, so it is compiled once for all of them and all lengths. So are the modules
beside them, such as the last norm and the rotary embedding, each alone; what is between all these stays as it is.
Attention is opaque to the compiler: see `attention`.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from worker.engine import attention
from worker.engine.attention import LAYER_BUFFER
from worker.engine.loader import LoadedModel
from worker.engine.probe import WholeStep, probe_tokens

log = logging.getLogger("millrace.engine")

#: Tokens that the layers are compiled with on a GPU. Their number is left open, but the compiler cuts its kernels for
#: what it sees first: for the probe's few tokens, so small that half of a multiprocessor's warps find no place.
_GPU_TOKENS, _CPU_TOKENS = 1024, 8


@torch.inference_mode()
def compile_layers(loaded: LoadedModel) -> bool:
    """Compile the model's layers, now, unless they are; False, with the reason in the log, where they run as they
    are."""
    model: Any = loaded.model
    layers = _layers(model, len(loaded.layers))
    if layers is None:
        log.warning("layers run uncompiled: the model does not keep its %d layers in one list", len(loaded.layers))
        return False
    if layers[0]._compiled_call_impl is not None:  # for another engine
        return True
    from worker.engine.inductor import choosing, options  # some seconds, which only those wait who compile

    for layer in layers:
        for module in layer.modules():
            if isinstance(number := getattr(module, "layer_idx", None), int):
                # On the CPU, where it is read without asking the device.
                module.register_buffer(LAYER_BUFFER, torch.tensor(number, device="cpu"), persistent=False)
    started = time.perf_counter()
    num_tokens = _GPU_TOKENS if loaded.device.type == "cuda" else _CPU_TOKENS
    tokens = probe_tokens(model, model.config.get_text_config(), num_tokens)
    # An odd number: sizes that are equal are one and the same to the compiler, and those of models are even. With as
    # many tokens as, say, a hidden state has numbers it would compile for this number of them alone, and once more for
    # whatever comes next.
    tokens = tokens[: len(tokens) - 1 + len(tokens) % 2]

    def obstacle(modules: Iterable[nn.Module]) -> str | None:
        """Why these cannot be compiled, if they cannot; then they run as they are."""
        for module in modules:
            module.compile(dynamic=True, fullgraph=True, options=options)
        try:
            with attention.running(WholeStep()), choosing():
                model(input_ids=tokens.unsqueeze(0), use_cache=False)
        # torch's own errors are RuntimeErrors, but the one of layers that are of more kinds than it compiles.
        except (RuntimeError, TypeError, AttributeError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            for module in modules:
                module._compiled_call_impl = None
            return " ".join(str(error).split("\n")[:2])
        return None

    if (reason := obstacle(layers)) is not None:
        log.warning("layers run uncompiled: %s", reason)
        return False
    names = [name for name, module in _beside(model, layers) if obstacle([module]) is None]
    log.info(
        "layers compiled in %.1f s, %s beside them", time.perf_counter() - started, " and ".join(names) or "nothing"
    )
    return True


@contextmanager
def uncompiled(is_wanted: bool) -> Iterator[None]:
    """One token alone would be compiled apart, since sizes of 1 are never left open: not worth a compiler's time."""
    if not is_wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _layers(model: Any, num_layers: int) -> nn.ModuleList | None:
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    numbered = [m for m in found if all(any(hasattr(x, "layer_idx") for x in layer.modules()) for layer in m)]
    return numbered[0] if len(numbered) == 1 else None


def _beside(model: Any, layers: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """What computes between embedding and head, and is no layer."""
    parent = next(module for module in model.modules() if any(child is layers for child in module.children()))
    nothing_to_fuse = (nn.Embedding, nn.Linear, nn.Dropout, nn.Identity)
    return [
        (name, module)
        for name, module in parent.named_children()
        if module is not layers and not isinstance(module, nothing_to_fuse)
    ]
