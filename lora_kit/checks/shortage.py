"""Memory that does not suffice: how to tell, how to get what a failed step holds back, and what to advise."""

import gc
from typing import TYPE_CHECKING

import torch

from lora_kit.adaptation import base_of, record_of
from lora_kit.errors import LoraKitError, OutOfMemoryError
from lora_kit.memory.result import size
from lora_kit.types import Model

if TYPE_CHECKING:
    from lora_kit.memory.result import MemoryPlan

# what comes as a plain RuntimeError: the CPU's allocator (its words differ by system), and CUDA beside torch's own
_WORDS = (
    "not enough memory: you tried to allocate",
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def let_go(error: BaseException) -> None:
    """Part an exception, and those behind it, from the frames of the failed call, which hold its graph.

    Python frees them with the exception; but a logger or a model's own code may keep that.
    """
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        following = seen.__cause__ or seen.__context__
        seen.__cause__ = seen.__context__ = None
        seen = following


def give_back() -> None:
    """Return what is free to the device, so that it can be cut anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def room(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    import psutil  # type: ignore[import-untyped]  # no type information is shipped; it comes with accelerate

    found = psutil.virtual_memory()
    return int(found.available), int(found.total)


def one_row(model: Model, device: torch.device, length: int, plan: "MemoryPlan | None", why: str) -> OutOfMemoryError:
    """The error for a micro-batch that does not fit and cannot be made smaller; `why` is why not."""
    free, total = room(device)
    said = [
        f"out of memory with {why} (longest sequence {length}); {size(free)} of {size(total)} are free on {device}. "
        "The optimizer has not stepped: weights and states are as they were."
    ]
    said.append(f"Options: {', '.join(_remedies(model, length))}.")
    if plan is not None:
        try:
            said.append(f"The plan: {plan.fit(total, 'seq_len')}.")
        except LoraKitError:
            pass  # a plan that cannot be searched has nothing to add
    return OutOfMemoryError(" ".join(said))


def of_states(device: torch.device, wanted: int) -> OutOfMemoryError:
    """The error for optimizer states that do not fit; nothing was changed."""
    free, total = room(device)
    return OutOfMemoryError(
        f"out of memory: the optimizer's states take {size(wanted)}; {size(free)} of {size(total)} are free on "
        f"{device}. They were taken back, the weights are as they were. Options: "
        "bitsandbytes.optim.PagedAdamW8bit(param_groups(model)), adapt(model, 'lora'), or for 'full' "
        "weights='stochastic' with lora_kit.lean.optimizer.AdamW."
    )


def half_updated() -> OutOfMemoryError:
    """The error for an optimizer's step that broke off."""
    return OutOfMemoryError(
        "out of memory in the middle of the optimizer's step: some weights may be updated and others not. Load the "
        "last checkpoint, and use an optimizer that needs less at a time: torch.optim.AdamW(..., fused=True) or "
        "bitsandbytes.optim.PagedAdamW8bit."
    )


def _remedies(model: Model, length: int) -> list[str]:
    """What of our own is not in use yet."""
    from lora_kit.lean import layers

    record, inner = record_of(model), base_of(model)
    found = [f"max_length below {length}"]
    if record.method == "full":
        found.append("adapt(model, 'lora')")
    elif record.quantization == "16bit":
        found.append('adapt(..., quantization="4bit")')
    if not any(layers.SETTINGS in vars(module) for module in inner.modules()):
        found.append('lean=True or lean="low-memory"')
    else:
        found.append('lean="low-memory"')
    if not any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        found.append("gradient checkpointing")
    return found
