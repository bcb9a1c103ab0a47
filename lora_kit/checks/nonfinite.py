"""NaN and infinities before an optimizer's step: found with one norm, and traced to the module where they begin."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from lora_kit.adaptation import base_of
from lora_kit.checks.splitting import Forward
from lora_kit.errors import listing
from lora_kit.types import Model


def finite(losses: list[Tensor], gradients: list[Tensor]) -> bool:
    """Whether all of them are; one number is read from the device."""
    numbers = [loss.reshape(()).float() for loss in losses]
    if gradients:
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        numbers.append(norm.float().to(numbers[0].device) if numbers else norm.float())
    if not numbers or bool(torch.stack(numbers).isfinite().all()):
        return True
    # a norm overflows before its entries do
    return all(_is_finite(value) for value in (*losses, *gradients))


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


@dataclass(frozen=True)
class Place:
    """The first module whose output is not finite."""

    path: str
    dtype: str
    largest: float | None
    """Largest finite magnitude among its inputs."""
    weight: str | None
    """A parameter of the module that is not finite itself."""

    def __str__(self) -> str:
        if self.weight is not None:
            return f"{self.path}, whose parameter {self.weight!r} is not finite itself"
        size = "" if self.largest is None else f"input max {self.largest:.1e}, "
        return f"{self.path} ({size}{self.dtype})"


def first_place(model: Model, forward: Forward, *, nan_only: bool = False) -> Place | None:
    """Run a forward once more, without gradients and with the random numbers that it had, and see where it breaks.

    Hooks are set on the model's modules for as long as it runs. `nan_only` lets infinities pass: where the loss is
    finite some may be meant, as those of a mask.
    """
    from lora_kit.checks.randomness import Randomness

    found: list[Place] = []

    def watch(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            bad = [t for t in _floats(output) if (bool(t.isnan().any()) if nan_only else not _is_finite(t))]
            if bad and not found:
                inputs = [t.detach().float().nan_to_num(0.0, 0.0, 0.0).abs().max() for t in _floats((args, kwargs))]
                own = (name for name, p in module.named_parameters(recurse=False) if _broken(p))
                largest = max((float(i) for i in inputs), default=None)
                found.append(
                    Place(
                        path.replace("_orig_mod.", ""),
                        str(bad[0].dtype).removeprefix("torch."),
                        largest,
                        next(own, None),
                    )
                )

        return hook

    here = Randomness.now(forward.randomness.device)
    handles = [
        module.register_forward_hook(watch(path), with_kwargs=True)
        for path, module in base_of(model).named_modules()
        if path
    ]
    enabled, dtype = forward.autocast
    forward.randomness.restore()
    try:
        # checkpointing warns of a forward without gradients
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with torch.autocast(forward.randomness.device.type, dtype=dtype, enabled=enabled):
                model(**forward.batch)
    except Exception:  # what broke the loss may break the model's own code; then what was seen before that counts
        pass
    finally:
        for handle in handles:
            handle.remove()
        here.restore()
    return found[0] if found else None


def _floats(value: Any) -> Iterable[Tensor]:
    return (t for t in tree_iter(value) if torch.is_tensor(t) and t.is_floating_point() and t.numel())


def _broken(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and not _is_finite(parameter)


def bad_rows(batch: Mapping[str, Any]) -> str | None:
    """`"inputs_embeds of rows 2, 5 holds NaN"`, or None."""
    for name, value in batch.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.dim():
            # a mask may hold infinities on purpose
            bad = value.detach().isnan() if "mask" in name else ~value.detach().isfinite()
            numbers = bad.reshape(bad.shape[0], -1).any(1).nonzero().squeeze(1).tolist()
            if numbers:
                what = "NaN" if bool(value.isnan().any()) else "infinities"
                return f"{name} of row{'s' * (len(numbers) > 1)} {listing(numbers, 8)} holds {what}"
    return None


def bad_gradients(model: Model) -> list[str]:
    """Names of the trained tensors whose gradient is not finite, the one nearest to the loss last."""
    return [
        f"{name} ({str(p.grad.dtype).removeprefix('torch.')})"
        for name, p in model.named_parameters()
        if p.grad is not None and not _is_finite(p.grad)
    ]


def explain(model: Model, forwards: list[Forward], rate: float, *, clipped: bool) -> tuple[str, str]:
    """(what is not finite and where it begins, the usual cause and what to write)."""
    lower = f"a learning rate that is too high: use lr={rate / 3:.2g} (now {rate:g})" if rate else "a bad row"
    half = "float16, which ends at 65504: load the model with dtype='bfloat16'"
    broken = [forward for forward in forwards if forward.loss is not None and not _is_finite(forward.loss)]
    for forward in broken or forwards:
        rows = bad_rows(forward.batch)
        if rows is not None:
            return f"{_loss(forward)}; {rows}", "that row of the data: leave it out"
    for forward in broken or forwards:
        place = first_place(model, forward, nan_only=not broken)
        if place is None:
            continue
        said = f"{_loss(forward)}; first output that is not finite: {place}"
        if place.weight is not None:
            return said, "an earlier step or file: load(path_of_an_earlier_save, base, train=True)"
        return said, half if place.dtype == "float16" else lower
    if broken:
        return (
            f"{_loss(broken[0])}, though the output of every module is finite",
            "the labels, or the loss's own code: verify(model, batch) looks at them",
        )
    names = bad_gradients(model)
    loss = f"{_loss(forwards[-1])}, finite, but" if forwards else "the loss is not known, but"
    if clipped:
        where = "the gradients are not; which one began cannot be told after clipping (guard(trainer) can)"
        return f"{loss} {where}", lower
    total = sum(p.grad is not None for p in model.parameters())
    nearest = names[-1] if names else "?"
    said = f"{loss} {len(names)} of {total} gradients are not; nearest to the loss: {nearest}"
    return said, half if "float16" in nearest and "bfloat16" not in nearest else lower


def _loss(forward: Forward) -> str:
    return "loss is not known" if forward.loss is None else f"loss is {float(forward.loss):.4g}"
