"""The guard in transformers' Trainer: a callback, and for one trainer instance its `training_step`."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lora_kit.checks import shortage
from lora_kit.checks.splitting import Forward, Micro, Part
from lora_kit.checks.watch import Watch
from lora_kit.errors import LoraKitError, OptionError
from lora_kit.types import Model


class GuardCallback(TrainerCallback):
    """What `guard()` returns; watches from the beginning of training to its end."""

    def __init__(self, *, plan: Any = None, output: str | Path | None = None, why_whole: str | None = None) -> None:
        self.plan, self.output, self.why_whole = plan, output, why_whole
        self.watch: Watch | None = None
        self.alone = True
        """Whether there is this callback and nothing else: the model itself then tells of its forwards."""
        self.micros = 0
        self._handles: list[Any] = []
        self._guarded: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self.off()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        self.watch = Watch(
            model,
            optimizer,
            plan=self.plan,
            output=self.output,
            why_whole="several GPUs in one process" if args.n_gpu > 1 else self.why_whole,
            scaler=scaler,
            checks=False,  # by then gradients are clipped; see below
        )
        self.watch.checkpoints = Path(args.output_dir)
        self.watch.open()
        if self.alone and not args.torch_compile:  # a hook would break a compiled graph
            self._handles = [
                model.register_forward_pre_hook(self._begin, with_kwargs=True),
                model.register_forward_hook(self._end, with_kwargs=True),
            ]
        if optimizer is not self.watch.optimizer:
            # accelerate's wrapper around the optimizer; torch's own is left as it is
            self._guarded = optimizer, vars(optimizer).get("step")
            optimizer.step = self._updating(optimizer.step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the last step's micro-batches."""
        if self.watch is not None:
            self.watch.steps = state.global_step
            self.watch.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before a step that is not finite."""
        if self.alone:
            self.check(clipped=args.max_grad_norm is not None and args.max_grad_norm > 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what happened, and take everything off."""
        self.off()

    def check(self, *, clipped: bool = False) -> None:
        """`Watch.check`; Trainer tells nobody of an error, so that everything is taken off here."""
        if self.watch is None:
            return
        try:
            self.watch.check(clipped=clipped)
        except LoraKitError:
            self.off()
            raise

    def off(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._guarded is not None:
            (optimizer, own), self._guarded = self._guarded, None
            del optimizer.step
            if own is not None:
                optimizer.step = own
        if self.watch is not None:
            self.watch.close()
            self.watch = None

    def _updating(self, own: Any) -> Any:
        """An optimizer's `step` that says what a lack of memory in the middle of it means."""

        @functools.wraps(own)  # a scheduler leaves its mark on the function, and warns where it is gone
        def step(*args: Any, **kwargs: Any) -> Any:
            try:
                return own(*args, **kwargs)
            except Exception as error:  # whatever it is: Trainer does not say that training has ended
                broke = self.watch is not None and self.watch.updating and shortage.is_shortage(error)
                self.off()
                if broke:
                    raise shortage.half_updated() from error
                raise

        return step

    def _begin(self, model: Model, args: Any, kwargs: Any) -> None:
        if self.watch is not None and model.training and not args:
            self.watch.seen.append(Forward.of(kwargs, self.watch.device))

    def _end(self, model: Model, args: Any, kwargs: Any, output: Any) -> None:
        if self.watch is not None and model.training and not args and self.watch.seen:
            loss = output.get("loss") if isinstance(output, dict) else None
            if torch.is_tensor(loss):
                self.watch.seen[-1].loss = loss.detach()


def attach(trainer: Any, *, plan: Any, output: str | Path | None, split: bool) -> Any:
    """Guard one trainer: a callback, and a `training_step` that can run a micro-batch in parts."""
    if any(isinstance(callback, GuardCallback) for callback in trainer.callback_handler.callbacks):
        raise OptionError("this trainer is guarded already: guard(trainer) or Trainer(callbacks=[guard()]), not both.")
    callback = GuardCallback(plan=plan, output=output, why_whole=_why_whole(trainer) if split else "split=False")
    callback.alone = False
    trainer.add_callback(callback)
    own = trainer.training_step
    trainer.training_step = lambda model, inputs, num_items_in_batch=None: _training_step(
        trainer, callback, own, model, inputs, num_items_in_batch
    )
    return trainer


def _training_step(
    trainer: Any, callback: GuardCallback, own: Any, model: Model, inputs: Any, number: Any
) -> torch.Tensor:
    """`Trainer.training_step` under the guard; `number` is `num_items_in_batch`."""
    watch = callback.watch
    if watch is None:  # called by hand, outside of train()
        return own(model, inputs, number)
    last = trainer.accelerator.sync_gradients
    callback.micros += 1
    if watch.skips(inputs, callback.micros):
        if last:
            callback.check()
        # in a step with other micro-batches this one's share of the loss is nothing. A step with no label at all has no
        # loss: Trainer puts the mean of the steps before in the place of NaN, unless it was told not to
        value = float("nan") if last and not watch.splitter.micros else 0.0
        return torch.full((), value, device=trainer.args.device)

    def run(part: Part, micro: Micro) -> torch.Tensor:
        # a mean over all rows is the sum of the parts' means times their weights; and a sum over the whole step's
        # tokens stays that sum if their number shrinks by the weight that the loss is multiplied with
        count = number if number is None or part.weight == 1 else number * part.weight
        with _recorded(trainer, micro, part.weight):
            return own(model, copy.copy(part.batch), count)

    try:
        loss = watch.splitter.run(inputs, run)
    except LoraKitError:
        callback.off()
        raise
    if last:
        callback.check()  # before Trainer clips: one NaN would spread to all gradients
    return loss


def _why_whole(trainer: Any) -> str | None:
    """Why this trainer's micro-batches are not split: a loss of its own may be a mean of anything."""
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is a loss of your own"
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    if owner.__module__.startswith("transformers.") or owner.__name__ == "SFTTrainer":
        return None
    return f"{owner.__name__} has a compute_loss of its own"


@contextlib.contextmanager
def _recorded(trainer: Any, micro: Micro, weight: float) -> Iterator[None]:
    """Trainer's loss, noted and times `weight`, for as long as a step runs."""
    own, before = trainer.compute_loss, vars(trainer).get("compute_loss")

    def compute_loss(model: Model, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        micro.begin(inputs)
        found = own(model, inputs, *args, **kwargs)
        loss, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, None)
        micro.end(loss)
        if weight != 1:
            loss = loss * weight
        return loss if rest is None else (loss, *rest)

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        if before is None:
            del trainer.compute_loss
        else:
            trainer.compute_loss = before
