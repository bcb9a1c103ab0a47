"""The lean step, on and off, for one model instance.

What is changed is the class of single module instances, to a subclass of the same name (`instances`): no parameter, no
key of the state dict, no other model. The methods that take over are in `layers`.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_kit.errors import OptionError, listing
from lora_kit.lean import layers, recognition
from lora_kit.lean.instances import original_class, restore, swap

MODES = (True, False, "low-memory")


@dataclass(frozen=True)
class Report:
    """What a lean step replaces in a model, and what it leaves."""

    linear: tuple[str, ...] = ()
    """LoRA layers that run as one operation."""
    stacks: tuple[str, ...] = ()
    """Expert stacks whose update stays apart from the weight."""
    left: dict[str, str] = field(default_factory=dict)
    """LoRA layers with PEFT's own forward → why."""
    gated: tuple[str, ...] = ()
    """Gated MLPs that keep gate and up, or their input alone."""
    recomputed: bool = False
    """Whether it is their input alone."""
    activations: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    """Attention with dropout, for as long as it is on a CPU."""
    loss: str | None = None
    """Path of the output head whose logits wait."""

    def __str__(self) -> str:
        gated = "gated MLPs" + (" (recomputed)" if self.recomputed else "")
        counts = {
            "LoRA layers": self.linear,
            "expert stacks": self.stacks,
            gated: self.gated,
            "activations": self.activations,
            "norms": self.norms,
            "attentions with dropout": self.attention,
        }
        parts = [f"{len(paths)} {what}" for what, paths in counts.items() if paths]
        parts += ["loss in chunks"] * (self.loss is not None)
        said = "lean step: " + (", ".join(parts) or "nothing to replace")
        for reason in dict.fromkeys(self.left.values()):
            paths = [path for path, why in self.left.items() if why == reason]
            said += f"; left to PEFT ({reason}): {listing(paths, 2)}"
        return said


def enable(model: nn.Module, mode: bool | str = True, *, z_loss: float = 0.0) -> Report:
    """Make the training step of this model lean, in place; the numbers stay those of the modules' own forwards.

    LoRA layers keep one 16-bit input between them; gated MLPs keep gate and up; RMS norms their 16-bit input;
    activations their input; attention with dropout on a CPU its weights once; the loss is computed a few rows at a
    time. In evaluation, under `torch.compile`, and wherever a part is not what it was (another adapter active, a hook
    set), the modules' own forwards run.

    Args:
        model: as `adapt` or PEFT returned it, or transformers' own.
        mode: True, or `"low-memory"`: gated MLPs keep their input alone and compute gate and up twice.
        z_loss: factor of `(log Σ exp z)²` in the training loss, 0 for none.

    Raises:
        OptionError: a mode that does not exist, or something that is no model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lora_kit import adapt
        >>> from lora_kit.lean.switch import disable, enable
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = adapt(LlamaForCausalLM(config), "lora", rank=4, lean=False)
        >>> print(enable(model))
        lean step: 14 LoRA layers, 2 gated MLPs, 5 norms, loss in chunks
        >>> disable(model)
    """
    check(mode)
    if not isinstance(model, nn.Module):
        raise OptionError(f"enable takes a loaded model, got {model!r}; adapt(...) loads one and makes it lean.")
    disable(model)
    if mode is False:
        return Report()
    base = _base(model)
    linear, stacks, left = _loras(base)
    gates = recognition.gates(base)
    norms = recognition.norms(base)
    in_gates = {f"{path}.{gate.act}" for path, gate in gates.items()}
    attention = recognition.attentions(base)
    acts = [path for path in recognition.activations(base) if path not in in_gates]
    for path in linear:
        swap(base.get_submodule(path), layers.LeanLora)
    for path in stacks:
        vars(base.get_submodule(path))[layers.SETTINGS] = True
    for path, gate in gates.items():
        _settle(base.get_submodule(path), layers.LeanGatedMLP, (gate, mode == "low-memory"))
    for path, norm in norms.items():
        _settle(base.get_submodule(path), layers.LeanRMSNorm, norm)
    for path in acts:
        swap(base.get_submodule(path), layers.LeanActivation)
    for path in attention:
        swap(base.get_submodule(path), layers.LeanAttention)
    return Report(
        tuple(linear),
        tuple(stacks),
        left,
        tuple(gates),
        mode == "low-memory",
        tuple(acts),
        tuple(norms),
        tuple(attention),
        _loss(base, z_loss),
    )


def disable(model: nn.Module) -> None:
    """Give every module of this model its own forward back, in place."""
    for module in model.modules():
        restore(module)
        vars(module).pop(layers.SETTINGS, None)


def check(mode: object) -> None:
    """Raise an `OptionError` for a mode that does not exist."""
    if not any(mode is known or (isinstance(mode, str) and mode == known) for known in MODES):
        raise OptionError(f"lean must be one of {listing(map(repr, MODES))}, got {mode!r}.")


def _base(model: Any) -> Any:
    """The model inside PEFT's wrapping, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _settle(module: nn.Module, mixin: type, settings: Any) -> None:
    vars(module)[layers.SETTINGS] = settings
    swap(module, mixin)


def _loras(base: nn.Module) -> tuple[list[str], list[str], dict[str, str]]:
    """Paths of LoRA layers to replace, of adapted stacks; and of those to leave, with the reason."""
    from peft.tuners.lora import bnb, layer

    known = {layer.Linear, getattr(bnb, "Linear4bit", None), getattr(bnb, "Linear8bitLt", None)}
    linear, stacks, left = [], [], {}
    for path, module in base.named_modules():
        if not isinstance(module, layer.LoraLayer):
            continue
        if isinstance(module, layer.ParamWrapper) and type(module) is not layer.ParamWrapper:  # ours, see `stacks`
            stacks.append(path)
            continue
        reason = f"{type(module).__name__} layers" if original_class(module) not in known else layers.why_not(module)
        if reason is None:
            linear.append(path)
        else:
            left[path] = reason
    return linear, stacks, left


def _loss(base: Any, z_loss: float) -> str | None:
    """Have the output head wait for its loss; its path, or None for a model without."""
    try:
        head = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if head is None or "labels" not in inspect.signature(type(base).forward).parameters:
        return None
    path = next((path for path, module in base.named_modules() if module is head), None)
    if path is None or not (hasattr(head, "out_features") or hasattr(head, "weight")):
        return None
    _settle(head, layers.LeanHead, z_loss)
    swap(base, layers.LeanModel)
    return path
