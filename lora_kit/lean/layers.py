"""How the modules of one model run in a lean step: the methods that `switch` puts before those of their classes.

Each of them asks, at every call, whether what it would do is what the module would have done: the adapter is a plain
one, nothing hangs on the parts that would be passed by, weights lie here in full. If not, the module's own forward
runs. Under `torch.compile` all own forwards run; the compiler decides there what is kept.
"""

import functools
import inspect
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kit.lean.device import is_plain, kind_of
from lora_kit.lean.dropped_attention import Instead
from lora_kit.lean.elementwise import gated, product
from lora_kit.lean.instances import original_class
from lora_kit.lean.linear_loss import Head
from lora_kit.lean.logits import Logits
from lora_kit.lean.lora_linear import Map, Source, can_redraw, lora_linear
from lora_kit.lean.recomputed import recomputed
from lora_kit.lean.rms_norm import rms_norm

# these methods are put before those of a module's class
_Before: Any = nn.Module if TYPE_CHECKING else object

_SOURCE = "_lora_kit_source"
SETTINGS = "_lora_kit_lean"
"""What a module's method has to know, on the instance."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _whole(weight: Any) -> bool:
    """Whether all of a weight lies here (or is simulated): not sharded, not offloaded, not gathered while it runs."""
    return is_plain(weight) and not weight.is_meta and not hasattr(weight, "ds_id")


def _bare(module: nn.Module) -> bool:
    """Whether calling the module is nothing but its class's forward (and hooks of ours, which change no value)."""
    own = vars(module)
    return "forward" not in own and all(_ours(hook) for hooks in _HOOKS if own[hooks] for hook in own[hooks].values())


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("lora_kit.")


# ---- LoRA


def map_of(base: Any) -> Map | None:
    """The frozen linear map that this module is; None if it is none that we know, or is trained."""
    weight = getattr(base, "weight", None)
    if weight is None or weight.requires_grad or not _bare(base):
        return None
    kind = type(base).__name__
    if kind == "Linear4bit" and getattr(weight, "quant_state", None) is not None:
        return Map(base, functools.partial(_pull_4bit, base))
    if kind == "Linear8bitLt" and not base.state.has_fp16_weights:
        return Map(base, functools.partial(_pull_8bit, base))
    if not _whole(weight):
        return None
    if type(base).forward is nn.Linear.forward:
        return Map(base, functools.partial(_pull, base))
    if kind == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils":
        return Map(base, functools.partial(_pull_transposed, base))
    return None


def _pull(base: Any, dy: Tensor) -> Tensor:
    return dy @ base.weight.to(dy.dtype)


def _pull_transposed(base: Any, dy: Tensor) -> Tensor:
    return dy @ base.weight.to(dy.dtype).t()


def _pull_4bit(base: Any, dy: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    low = dy if base.compute_dtype is None else dy.to(base.compute_dtype)
    return (low @ dequantize_4bit(base.weight.data, base.weight.quant_state).to(low.dtype)).to(dy.dtype)


def _pull_8bit(base: Any, dy: Tensor) -> Tensor:
    codes, scales = base.state.CB, base.state.SCB
    if codes is None:
        codes, scales = base.weight.CB, base.weight.SCB
    return dy @ codes.to(dy.dtype, copy=True).mul_(scales.unsqueeze(1).mul(1 / 127))


@dataclass(frozen=True)
class _Adapter:
    """The one active adapter of a layer."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    scale: float
    base: Map


def _adapter(layer: Any) -> _Adapter | str:
    """The layer's adapter, or why the layer keeps PEFT's forward for now."""
    if layer.merged:
        return "merged"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not all(type(part) is nn.Linear and _bare(part) and _whole(part.weight) for part in (a, b)):
        return "an adapter that is wrapped, hooked or sharded"
    base = map_of(layer.base_layer)
    if base is None:
        return f"{type(layer.base_layer).__name__} that is wrapped, hooked, sharded, trained or of an unknown kind"
    if type(dropout) not in (nn.Dropout, nn.Identity) or not _bare(dropout):
        return f"dropout of its own kind ({type(dropout).__name__})"
    if getattr(dropout, "p", 0.0) and not can_redraw(a.weight.device):
        return f"dropout on {a.weight.device.type}, whose random state cannot be read"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "PEFT's input casting was switched off"
    return _Adapter(a, b, dropout, layer.scaling[name], base)


def why_not(layer: Any) -> str | None:
    """Why this LoRA layer of PEFT keeps PEFT's forward for now; None if it does not."""
    found = _adapter(layer)
    return found if isinstance(found, str) else None


class LeanLora(_Before):
    """For PEFT's LoRA layers."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = self.training or torch.is_grad_enabled()
        if args or kwargs or not wanted or self.disable_adapters or _compiling():
            return super().forward(x, *args, **kwargs)
        found = _adapter(self)
        if isinstance(found, str):
            return super().forward(x)
        bias = getattr(self.base_layer, "bias", None)
        return lora_linear(
            x,
            found.a.weight,
            found.b.weight,
            found.base,
            found.scale,
            dropout=getattr(found.dropout, "p", 0.0) if found.dropout.training else 0.0,
            bias=bias if bias is not None and bias.requires_grad else None,
            lora_bias=found.b.bias,
            source=_source(x),
        )


# ---- activations and gated MLPs


def _made_from(h: Tensor, source: Source) -> Tensor:
    """Note on a tensor how it can be made again, for the layer that it goes to."""
    setattr(h, _SOURCE, (source, h._version))
    return h


def _source(x: Tensor) -> Source | None:
    """How to make x again, unless it was changed in place since."""
    source, version = getattr(x, _SOURCE, (None, 0))
    return source if source is not None and x._version == version else None


class LeanActivation(_Before):
    """For modules that apply a function entry by entry."""

    def forward(self: Any, f: Tensor) -> Tensor:
        own = super().forward
        if not (torch.is_grad_enabled() and f.requires_grad) or _compiling():
            return own(f)
        return _made_from(*recomputed(own, f, (), random=False))


class LeanGatedMLP(_Before):
    """For `down(act(gate(x)) · up(x))`; its settings are a `Gate` of `recognition`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or _compiling() or not torch.is_grad_enabled():
            return super().forward(x, *args, **kwargs)
        gate, recompute = vars(self)[SETTINGS]  # torch 2.8's compiler cannot follow `vars`
        act, down = getattr(self, gate.act), getattr(self, gate.down)
        maps = [getattr(self, name) for name in gate.into]
        parameters = tuple(p for m in maps for p in m.parameters() if p.requires_grad)
        if not x.requires_grad and not parameters:
            return super().forward(x)
        if recompute:
            random = any(isinstance(m, nn.Dropout) and m.p and m.training for part in maps for m in part.modules())

            def inner(x: Tensor) -> Tensor:
                g, u = gate.halves(maps, x)
                return gated(g, u, act)

            h, source = recomputed(inner, x, parameters, random=random)
            return down(_made_from(h, source))
        g, u = gate.halves(maps, x)
        return down(_made_from(gated(g, u, act), Source(functools.partial(product, act), (g, u))))


# ---- attention


class LeanAttention:
    """For modules that compute attention with dropout."""

    @staticmethod
    def wrapped(cls: Any) -> dict[str, Any]:
        @functools.wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.training or not torch.is_grad_enabled() or _compiling():
                return cls.forward(self, *args, **kwargs)
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is None or kind_of(first) != "cpu":
                return cls.forward(self, *args, **kwargs)
            with Instead():
                return cls.forward(self, *args, **kwargs)

        return {"forward": forward}


# ---- RMSNorm


class LeanRMSNorm(_Before):
    """For RMS normalization with a frozen weight; its settings are a `Norm` of `recognition`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = x.element_size() > 2
        if args or kwargs or wide or not torch.is_grad_enabled() or not x.requires_grad or _compiling():
            return super().forward(x, *args, **kwargs)
        if self.weight.requires_grad or not _whole(self.weight):
            return super().forward(x)
        norm = vars(self)[SETTINGS]
        eps = getattr(self, norm.eps)
        return rms_norm(x, self.weight, eps, from_one=norm.from_one, rounds_first=norm.rounds_first)


# ---- the loss

_asked: Any = threading.local()


def _waited_for(head: nn.Module) -> bool:
    """Whether a model is at this moment computing a training loss from the logits of this head."""
    return getattr(_asked, "head", None) is head


class LeanHead(_Before):
    """For the output head of a language model: logits that wait, while its model computes a training loss."""

    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _waited_for(self) or args or kwargs or not self.can_wait(hidden):
            return super().forward(hidden, *args, **kwargs)
        return Logits.of(hidden, self.as_head(hidden.device.type))

    def can_wait(self: Any, hidden: Tensor) -> bool:
        if not _bare(self):
            return False
        weights = list(self.parameters())
        trained = any(p.requires_grad for p in weights)
        return (hidden.requires_grad or trained) and all(p.is_floating_point() and _whole(p) for p in weights)

    def as_head(self: Any, device: str) -> Head:
        own = super().forward
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def run(rows: Tensor) -> Tensor:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                return own(rows)

        parameters = tuple(p for p in self.parameters() if p.requires_grad)
        z_loss = vars(self)[SETTINGS]
        plain = not parameters and original_class(self) is nn.Linear
        if not plain:
            vocabulary = self.out_features if hasattr(self, "out_features") else self.weight.shape[0]
            return Head(run, vocabulary, parameters=parameters, dtype=dtype, z_loss=z_loss)
        return Head(run, self.out_features, self.weight, self.bias, dtype=dtype, z_loss=z_loss)


class LeanModel:
    """For the model that the head belongs to: says when labels are given, so that only a loss needs the logits."""

    @staticmethod
    def wrapped(cls: Any) -> dict[str, Any]:
        """The forward of a class, with its signature, which trainers read."""
        place = list(inspect.signature(cls.forward).parameters).index("labels") - 1

        @functools.wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            labels = kwargs.get("labels", args[place] if len(args) > place else None)
            if labels is None or not self.training or not torch.is_grad_enabled() or _compiling():
                return cls.forward(self, *args, **kwargs)
            before = getattr(_asked, "head", None)
            _asked.head = self.get_output_embeddings()
            try:
                return cls.forward(self, *args, **kwargs)
            finally:
                _asked.head = before

        return {"forward": forward}
