"""What every form of the guard does around a step: look before the optimizer steps, and compare after."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kit import quantization as bits
from lora_kit.adaptation import base_of, record_of
from lora_kit.checks import nonfinite, parts, states
from lora_kit.checks.splitting import Forward, Splitter
from lora_kit.checks.updates import STEPS, LostUpdates
from lora_kit.errors import LoraKitError, NonFiniteError, NothingToTrainError, OptionError, UnsupportedError
from lora_kit.memory.check import Check
from lora_kit.memory.tracker import PeakBytes, resident_tensors
from lora_kit.messages import say
from lora_kit.methods import METHODS, Native
from lora_kit.types import Model

FAR = 5
"""A learning rate further off than by this factor is worth a line."""


class Watch:
    """One model and its optimizer while they train.

    `open` sets hooks on the optimizer, `close` takes them off and says what happened. `checks` is whether the hook
    before the optimizer's step looks for NaN; where gradients are clipped before, somebody must look earlier.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Any,
        *,
        plan: Any,
        output: str | Path | None,
        why_whole: str | None,
        scaler: Any = None,
        checks: bool = True,
    ) -> None:
        self.model, self.plan, self.output, self.scaler, self.checks = model, plan, output, scaler, checks
        self.optimizer = torch_optimizer(optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.device = trained[0].device if trained else torch.device("cpu")
        self._refuse(trained)
        self.splitter = Splitter(model, self.device, why_whole or _why_whole(), plan)
        self.seen: list[Forward] = []
        """Forwards of this step that did not go through the splitter."""
        self.checkpoints: Path | None = None
        """Folder that Trainer saves into."""
        self.steps = 0
        """Steps that the optimizer has taken."""
        self.skipped = 0
        """Micro-batches without a labelled token."""
        self.updating = False
        """Whether the optimizer is in the middle of a step."""
        self.updates = LostUpdates(self.optimizer) if self.optimizer is not None else None
        self._handles: list[Any] = []
        self._memory: PeakBytes | None = None
        self._met_rate = self._told_updates = self._measured = False
        self._taken = 0
        """Steps taken under this watch; `steps` goes on from a checkpoint's."""

    def _refuse(self, trained: list[Tensor]) -> None:
        if not trained:
            raise NothingToTrainError(
                "no parameter of this model is trainable: call adapt(model, ...), or load(path, ..., train=True)."
            )
        quantized = bits.of(base_of(self.model))
        if quantized is not None and not hasattr(self.model, "get_base_model"):
            raise UnsupportedError(
                f"the base is in {quantized}: its matrices hold integers, and only what is left beside them would be "
                "trained. Use adapt(model, 'lora'), or load the model without quantization."
            )
        half = [n for n, p in self.model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if half and self.scaler is not None:
            raise UnsupportedError(
                f"float16 weights cannot be trained under a GradScaler: {half[0]!r} and {len(half) - 1} more are "
                "float16. Use dtype='bfloat16', or train float32 weights: adapt(model, 'full')."
            )
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if not any(id(p) in held for p in trained):
                raise OptionError(
                    "the optimizer holds none of this model's trainable parameters; make it after adapt(): "
                    "AdamW(param_groups(model))."
                )
        if self.plan is not None and self.plan.settings["device"] != self.device.type:
            raise OptionError(
                f"the plan is for {self.plan.settings['device']}, the model is on {self.device}: plan(..., "
                f"device={self.device.type!r})."
            )

    # ---- hooks

    def open(self) -> None:
        """Begin to watch the optimizer."""
        if self.optimizer is not None:
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before),
                self.optimizer.register_step_post_hook(self._after),
            ]

    def close(self) -> None:
        """Take every hook off, and say in one line what happened, if anything did."""
        for handle in self._handles:
            handle.remove()
        opened, self._handles = bool(self._handles), []
        self._leave()
        self.splitter.begin_step()
        self.seen.clear()
        if not opened:
            return
        self._tell_updates()
        happened = {
            "without a labelled token, skipped": self.skipped,
            "split for lack of memory": self.splitter.split,
        }
        if any(happened.values()):
            counts = "; ".join(f"{count} {what}" for what, count in happened.items() if count)
            say(f"guard: of the micro-batches {counts}")

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.checks:
            self.check()
        states.prepare(optimizer)
        self._meet_rate()
        if self.updates is not None:
            self.updates.before()
        self.updating = True

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.updating = False
        self.steps += 1
        self._taken += 1
        if self.updates is not None:
            self.updates.after()
            if self.updates.steps == STEPS:
                self._tell_updates()
        if self._memory is not None:
            self._leave()
            if self.splitter.split == 0:
                say(str(Check(self.plan.peak, self._peak)))

    # ---- a step

    def begin_step(self) -> None:
        """To be called before the first micro-batch of a step."""
        self.splitter.begin_step()
        self.seen.clear()
        if self.plan is not None and self._taken == 1 and not self._measured:
            self._measured = True  # the first step has made the states; the second is like all that follow
            self._memory = PeakBytes(self.device, resident_tensors(self.model, self.optimizer))
            self._memory.__enter__()

    def _leave(self) -> None:
        """End the measurement, if one is under way."""
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            self._peak, self._memory = self._memory.peak, None

    def skips(self, batch: Any, number: int) -> bool:
        """Whether no token of a micro-batch has a label; counted, and said the first time."""
        if _why_whole() is not None or not self._unlabelled(batch):
            return False
        self.skipped += 1
        if self.skipped == 1:
            say(f"micro-batch {number} has no labelled token: skipped (1 so far)")
        return True

    def _unlabelled(self, batch: Any) -> bool:
        try:
            return not bool(parts.targets_of(self.model, batch).any())
        except UnsupportedError:
            return False  # a loss that is not known may need no labels

    def check(self, *, clipped: bool = False) -> None:
        """Raise if the losses or gradients of this step are not finite.

        Raises:
            NonFiniteError: with where it began; weights and optimizer states are as they were.
        """
        forwards = [*self.seen, *(f for micro in self.splitter.micros for f in micro.forwards)]
        losses = [f.loss for f in forwards if f.loss is not None]
        # a GradScaler tries large factors on purpose and passes over the steps that overflow
        trusts = self.scaler is not None and self.scaler.get_scale() >= 1
        gradients = [] if trusts else [p.grad for p in self.model.parameters() if p.grad is not None]
        if nonfinite.finite(losses, gradients):
            return
        # a mean over no labels is NaN, and has no part in the gradient
        forwards = [f for f in forwards if f.loss is None or bool(f.loss.isfinite()) or not self._unlabelled(f.batch)]
        if nonfinite.finite([f.loss for f in forwards if f.loss is not None], gradients):
            return
        where, cause = nonfinite.explain(self.model, forwards, self._rate(), clipped=clipped)
        raise NonFiniteError(
            f"step {self.steps + 1}: {where}. The step was not taken: weights and optimizer are as step {self.steps} "
            f"left them; {self._kept()}. Usual cause: {cause}."
        )

    def _kept(self) -> str:
        """Where the last good state is; it is saved now if a folder was given for that."""
        from transformers.trainer_utils import get_last_checkpoint

        from lora_kit.storage.save import save

        if not all(bool(p.isfinite().all()) for p in self.model.parameters() if p.requires_grad):
            return "they hold NaN or infinities themselves"
        if self.output is not None:
            try:
                return f"saved in {save(self.model, self.output)}"
            except LoraKitError as error:
                return f"saving them failed: {error}"
        found = get_last_checkpoint(self.checkpoints) if self.checkpoints and self.checkpoints.is_dir() else None
        if found is not None:
            return f"last checkpoint: {found}"
        return "guard(..., output='folder') would have saved them"

    # ---- what is worth a line

    def _rate(self) -> float:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return max((float(group["lr"]) for group in groups), default=0.0)

    def _meet_rate(self) -> None:
        """Compare the learning rate with the method's own, once, before the first step."""
        if self._met_rate:
            return
        self._met_rate = True
        if "adam" not in type(self.optimizer).__name__.lower():
            return  # the methods' rates are Adam's
        record = record_of(self.model)
        groups = [g for g in self.optimizer.param_groups if g.get("name") != "head"] or self.optimizer.param_groups
        largest = max(groups, key=lambda group: sum(p.numel() for p in group["params"]))
        # a scheduler writes down what it warms up to
        rate = float(largest.get("initial_lr", largest["lr"]))
        own = METHODS.get(record.method, Native).learning_rate(record.parameters, record.task)
        if rate > 0 and not 1 / FAR <= rate / own <= FAR:
            times, side = (rate / own, "above") if rate > own else (own / rate, "below")
            say(
                f"learning rate {rate:g} is {times:.0f} times {side} {own:g}, {record.method}'s own for a model of "
                "this size: AdamW(param_groups(model)), or TrainingArguments(**training_defaults(model))"
            )

    def _tell_updates(self) -> None:
        if self.updates is None or self._told_updates:
            return
        self._told_updates = True
        share = self.updates.share()
        if share <= 0.01:
            return
        better = "what is trained in float32 loses none"
        if record_of(self.model).method == "full":
            better = 'adapt(model, "full") trains float32 weights'
            if self.updates.dtype == "bfloat16":
                better += ', with weights="stochastic" bfloat16 ones that move on average as they should'
        say(
            f"{100 * share:.0f} % of the updates are lost to rounding (lr {self.updates.rate:g} in "
            f"{self.updates.dtype}): {better}"
        )


def torch_optimizer(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's or DeepSpeed's wrapping, or None."""
    while hasattr(optimizer, "optimizer"):  # accelerate's is an Optimizer by its class, and has no hooks
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


def _why_whole() -> str | None:
    """Why micro-batches are not split in this process, or None."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            return "every process of a distributed run must call the model equally often"
    return None
