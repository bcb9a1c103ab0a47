"""The states of an optimizer made before its first step changes anything, so that a lack of memory harms nothing.

torch's Adam makes the states of one group, updates the group, and goes on to the next: without memory for the second
group's states the weights of the first are updated already. Made for all groups beforehand, as the step itself would
make them, they can be taken back and tried again.
"""

from typing import Any

import torch

from lora_kit.checks import shortage


def prepare(optimizer: Any) -> None:
    """Make the states that the coming step would make; on a failure take them back, free memory and try once more.

    Raises:
        OutOfMemoryError: it fails again; the optimizer is as it was.
    """
    if not isinstance(optimizer, torch.optim.Adam) or not hasattr(optimizer, "_init_group"):
        return  # others make them one by one as they update
    wanting = [
        p for g in optimizer.param_groups for p in g["params"] if p.grad is not None and not _state(optimizer, p)
    ]
    if not wanting:
        return
    for _ in range(2):
        if _made(optimizer):
            return
        for p in wanting:
            optimizer.state.pop(p, None)
        shortage.give_back()
    bytes_each = 2 + any(group.get("amsgrad") for group in optimizer.param_groups)
    raise shortage.of_states(wanting[0].device, bytes_each * sum(p.numel() * p.element_size() for p in wanting))


def _state(optimizer: Any, parameter: Any) -> Any:
    return optimizer.state.get(parameter)  # a look-up by [] would make an entry


def _made(optimizer: Any) -> bool:
    try:
        for group in optimizer.param_groups:
            optimizer._init_group(group, [], [], [], [], [], [])
    except RuntimeError as error:
        if not shortage.is_shortage(error):
            raise
        shortage.let_go(error)
        return False
    return True
