"""Running the model for a check: as in training, drawn the same way each time, and with words for what it was given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_kit import probe
from lora_kit.checks.subject import Subject
from lora_kit.checks.tokens import pads_left
from lora_kit.errors import listing

if TYPE_CHECKING:
    import torch


@contextmanager
def as_in_training(subject: Subject) -> Iterator[None]:
    """Training mode, if only for now, with gradients; what the forward warns of it says again in training."""
    import warnings

    import torch

    from lora_kit.messages import quiet

    with warnings.catch_warnings(), quiet("bitsandbytes.autograd._functions", "transformers.modeling_utils"):
        warnings.simplefilter("ignore")
        with torch.inference_mode(False), torch.enable_grad(), probe.unchanged(subject.model):
            if not subject.model.training:
                subject.model.train()
            yield


def answer(subject: Subject, batch: dict[str, Any]) -> Any:
    """What the model gives; random parts are drawn the same way each time."""
    import torch

    torch.manual_seed(0)
    return subject.model(**batch)


def loss_of(output: Any) -> "torch.Tensor | None":
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output and getattr(output[0], "dim", lambda: 1)() == 0:
        found = output[0]
    return found.mean() if found is not None and found.dim() else found


def logits_of(subject: Subject, batch: dict[str, Any] | None = None) -> "torch.Tensor | None":
    """Logits in evaluation mode, in float32, of the batch or of its beginning."""
    import torch

    with probe.unchanged(subject.model), torch.no_grad():
        subject.model.eval()
        output = answer(subject, beginning(subject) if batch is None else batch)
    items = output.items() if isinstance(output, dict) else enumerate(output if isinstance(output, tuple) else [output])
    tensors = {
        str(key): value for key, value in items if torch.is_tensor(value) and value.is_floating_point() and value.dim()
    }
    found = next((value for key, value in tensors.items() if "logits" in key), next(iter(tensors.values()), None))
    return None if found is None else found.float()


def beginning(subject: Subject) -> dict[str, Any]:
    """Four rows of the batch, of text 128 tokens: all logits may not fit where training's chunked loss does."""
    import torch

    batch = subject.batch
    ids = batch.get("input_ids")
    plain = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "use_cache"}
    if not torch.is_tensor(ids) or set(batch) - plain or pads_left(subject) is not None:
        return batch
    short = {key: value[:4] if torch.is_tensor(value) and value.dim() else value for key, value in batch.items()}
    if subject.generates:
        short = {k: v[:, :128] if torch.is_tensor(v) and v.dim() == 2 else v for k, v in short.items()}
    return short


def tolerance(subject: Subject) -> float:
    import torch

    exact = subject.record.quantization == "16bit" and all(
        p.dtype in (torch.float32, torch.float64) for p in subject.model.parameters()
    )
    return 1e-4 if exact else 0.02


def given(batch: dict[str, Any]) -> str:
    import torch

    parts = []
    for key, value in batch.items():
        what = (
            f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if torch.is_tensor(value) else repr(value)
        )
        parts.append(f"{key} {what[:60]}")
    return listing(parts, 6)
