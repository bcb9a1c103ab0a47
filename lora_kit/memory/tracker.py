"""Live bytes: what tensors occupy at the peak of a step, as an allocator on the device would count it.

On CUDA the allocator knows. On the CPU nothing does (the resident set holds freed pages and libraries), so every
operation is watched and each new storage counted from its birth to its death. That slows a step down several times:
measure bytes and seconds in different steps.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class PeakBytes:
    """Context that measures the peak of live tensor bytes on one device.

    `peak` counts what was alive on entry (give it as `existing`: weights, gradients, optimizer states) and what was
    made inside. Scratch space inside a single operation is seen on CUDA only.

    Example:
        >>> import torch
        >>> x = torch.ones(1000)
        >>> with PeakBytes("cpu", [x]) as memory:
        ...     y = (x + 1) * 2
        >>> memory.peak
        12000
    """

    def __init__(self, device: "str | torch.device", existing: "Iterable[torch.Tensor]" = ()) -> None:
        import torch

        self.device = torch.device(device)
        self._existing = list(existing)
        self._watch: Any = None
        self.peak = 0

    def __enter__(self) -> "PeakBytes":
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            from lora_kit.memory.ledger import Ledger

            self._watch = Ledger(self._existing)
            self._watch.__enter__()
        self._existing.clear()  # a reference kept here would keep freed tensors alive
        return self

    @property
    def live(self) -> int:
        """Bytes alive at this moment, counted as `peak` counts them."""
        import torch

        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._watch.live

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._watch.__exit__(kind, error, trace)
            self.peak = self._watch.peak


def resident_tensors(model: Any, optimizer: Any = None) -> "list[torch.Tensor]":
    """What stays in memory between steps: weights with their quantization constants, buffers, gradients, states."""
    import torch
    from torch.utils._pytree import tree_iter

    found: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        # stacks of experts are packed under names of their own
        for weight in module._parameters.values():
            for holder in (getattr(weight, "quant_state", None), getattr(module, "state", None), weight):
                for name in ("absmax", "code", "offset", "CB", "SCB"):
                    found.append(getattr(holder, name, None))
                nested = getattr(holder, "state2", None)
                found += [getattr(nested, name, None) for name in ("absmax", "code")]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    if optimizer is not None:
        found += [t for t in tree_iter(list(optimizer.state.values())) if torch.is_tensor(t)]
    return [tensor for tensor in found if torch.is_tensor(tensor)]
