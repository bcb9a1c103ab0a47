"""The guard in a loop of one's own: `with guard(model, optimizer) as step`."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_kit.checks import shortage
from lora_kit.checks.splitting import Micro, Part
from lora_kit.checks.watch import Watch
from lora_kit.errors import OptionError
from lora_kit.types import Model


class Loop:
    """Context of a guarded loop; entered, it is the function that runs a micro-batch."""

    def __init__(
        self, model: Model, optimizer: Any, *, plan: Any, output: str | Path | None, split: bool, scaler: Any
    ) -> None:
        from accelerate.utils import extract_model_from_parallel

        self.model = model
        self.scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        self.watch = Watch(
            extract_model_from_parallel(model),
            optimizer,
            plan=plan,
            output=output,
            why_whole=None if split else "split=False",
            scaler=self.scaler,
        )
        if self.watch.optimizer is None:
            raise OptionError(f"{type(optimizer).__name__} is no optimizer of torch, nor around one.")
        self.entered = False
        self.micros = 0
        self._at = -1

    def __enter__(self) -> "Loop":
        self.entered = True
        self.watch.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.entered = False
        broke = self.watch.updating and error is not None and shortage.is_shortage(error)
        self.watch.close()
        if broke:
            raise shortage.half_updated() from error

    def __call__(self, batch: Mapping[str, Any], scale: float = 1.0) -> Tensor:
        """Forward and backward of one micro-batch, in parts if memory does not suffice for the whole.

        Args:
            batch: what the model is called with, labels included; tensors are moved to the model's device.
            scale: factor of the loss in the backward pass, 1 / k for k micro-batches a step.

        Returns:
            The loss, detached and without `scale`. NaN for a micro-batch without a labelled token, which is passed
            over: it leaves no gradient, and is no loss of 0.

        Raises:
            OutOfMemoryError: one row alone does not fit.
            NonFiniteError: under a GradScaler; without one it comes from `optimizer.step()`.
        """
        if not self.entered:
            raise OptionError(
                "guard(model, optimizer) is a context: with guard(model, optimizer) as step: step(batch)."
            )
        if not isinstance(batch, Mapping):
            raise OptionError(
                f"step() takes a batch as a dictionary, got a {type(batch).__name__}: step({{'input_ids': ..., "
                "'labels': ...}})."
            )
        watch = self.watch
        if self._at != watch.steps or all(p.grad is None for p in watch.model.parameters()):
            self._at = watch.steps
            watch.begin_step()
        self.micros += 1
        if watch.skips(batch, self.micros):
            return torch.full((), float("nan"), device=watch.device)
        moved = {name: v.to(watch.device) if torch.is_tensor(v) else v for name, v in batch.items()}
        loss = watch.splitter.run(moved, lambda part, micro: self._part(part, micro, scale))
        if self.scaler is not None:
            watch.check()  # the scaler does not call the optimizer where gradients overflow, so nobody else would look
        return loss

    def _part(self, part: Part, micro: Micro, scale: float) -> Tensor:
        micro.begin(part.batch)
        loss = _loss_of(self.model(**part.batch))
        micro.end(loss)
        factor = scale * part.weight
        scaled = loss if factor == 1 else loss * factor
        if self.scaler is not None:
            scaled = self.scaler.scale(scaled)
        # the loop may have autocast around this call; a backward pass runs outside of it
        with torch.autocast(self.watch.device.type, enabled=False):
            scaled.backward()
        return loss.detach() if part.weight == 1 else loss.detach() * part.weight


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    if not torch.is_tensor(loss) or loss.dim():
        raise OptionError("the model returned no loss: put labels into the batch that step() is given.")
    return loss
