"""A model without weights (on `meta`), made to run for a moment: its maps are replaced by ones that cost nothing.

What a trial forward asks for (which modules are used, where attention is, whether positions matter) does not depend on
what the weights hold. Each map becomes another affine one of its sizes, embeddings get a small table, small weights are
drawn, and what is large is one number seen as many.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.lean.recognition import StandIn, linear_size
from lora_kit.stacks import PACKED
from lora_kit.types import Model

LARGEST = 2**20
"""Entries of a weight or buffer that is really made."""
ROWS = 512
"""Rows of an embedding's table."""


def needed(model: Model) -> bool:
    """Whether some weights are not there."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def runnable(model: Model) -> Iterator[None]:
    """Inside, the model runs on the CPU; outside it is as it was before."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    replaced: list[Model] = []
    packed = {module: held for module in model.modules() if (held := vars(module).get(PACKED))}
    made: dict[int, Any] = {}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for module, parameters, buffers in before:
            lacks = any(p is not None and p.is_meta for p in parameters.values())
            forward = _forward_of(module) if lacks else None
            if forward is not None and "forward" not in vars(module):
                vars(module)["forward"] = forward
                replaced.append(module)
            for name, parameter in parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(_values(parameter), requires_grad=False)
                    module._parameters[name] = made[id(parameter)]
            lacking = [name for name, buffer in buffers.items() if buffer is not None and buffer.is_meta]
            for name in lacking:
                module._buffers[name] = _zeros(buffers[name])
            if lacking and not parameters and hasattr(model, "_init_weights"):
                _fill(model, module)
    for module in packed:
        vars(module)[PACKED] = {}  # nothing to unpack
    try:
        yield
    finally:
        for module, held in packed.items():
            vars(module)[PACKED] = held
        for module in replaced:
            vars(module).pop("forward", None)
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _fill(model: Model, module: Model) -> None:
    """Buffers that transformers computes, such as rotary frequencies."""
    try:
        model._init_weights(module)
    except Exception:  # a model whose own code does not expect this: its buffers stay zero
        return


def _forward_of(module: Model) -> Any:
    """What takes the place of the forward of a module with large or quantized weights; None: its own can run."""
    own = [p for p in module._parameters.values() if p is not None]
    if not vars(module).get(PACKED) and all(p.numel() <= LARGEST and p.is_floating_point() for p in own):
        return None
    size = linear_size(module)
    if size is not None:
        stand_in = StandIn(*size)
        return lambda x, *args, **kwargs: (0.25 * stand_in(x.float())).to(x.dtype)
    if isinstance(module, nn.Embedding):
        table = torch.randn(min(ROWS, module.num_embeddings), module.embedding_dim).to(module.weight.dtype)

        def look_up(ids: Any, *args: Any, **kwargs: Any) -> Any:
            # position tables may be asked by something else than ids
            return (
                table[ids % len(table)] if torch.is_tensor(ids) else type(module).forward(module, ids, *args, **kwargs)
            )

        return look_up
    if vars(module).get(PACKED) or any(p.dim() == 3 and p.numel() > LARGEST for p in own):
        return lambda x, *args, **kwargs: x * 0.5  # a stack of experts
    return None


def _values(like: Tensor) -> Tensor:
    if like.numel() > LARGEST or not like.is_floating_point():
        return _zeros(like)
    if like.dim() < 2:
        return (torch.randn(like.shape) * 0.1 + 1).to(like.dtype)
    # small, so that no squashing function is driven to where its gradient vanishes
    return (torch.randn(like.shape) * 0.5 / like.shape[-1] ** 0.5).to(like.dtype)


def _zeros(like: Tensor) -> Tensor:
    if like.numel() > LARGEST:
        return torch.zeros(1, dtype=like.dtype).expand(like.shape)
    return torch.zeros(like.shape, dtype=like.dtype)
