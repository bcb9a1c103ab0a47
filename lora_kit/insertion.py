"""A model with a prefix in its attention: PEFT's `PeftModel`, whose prefix works inside each layer, not in the cache.

The numbers are PEFT's own parameter, `prompt_encoder.<name>.embedding.weight` of shape (virtual tokens, everything),
site after site, keys before values. What is set on the instance handed in: for each attention module its `config` (a
view that names our function) or, where attention is written out by hand, its `forward`; on PEFT's object `forward`,
`generate` and `disable_adapter`, which would put the prefix into the cache, and `unload`, which PEFT has for others.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_kit.attention import Found, Site
from lora_kit.routing import SLOT, inner_functions, register, routed
from lora_kit.types import Model

if TYPE_CHECKING:
    from torch import Tensor


class Slot:
    """The prefix of one site, read from whichever adapter is active at the moment of the call."""

    def __init__(self, owner: Model, site: Site, start: int, inner: dict[str, Any] | None = None):
        self.owner, self.site, self.start = owner, site, start
        self.inner = inner or {}
        """transformers' attention functions by name, as this module's class would choose them."""
        self._turns: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}

    def states(self) -> "tuple[Tensor, Tensor] | None":
        """Keys and values (*heads, virtual tokens, width); None while adapters are disabled."""
        if self.owner._adapters_disabled:
            return None
        columns = columns_of(self.owner.prompt_encoder[self.owner.active_adapter], self.start, self.site.size)
        tokens = columns.shape[0]
        width = math.prod(self.site.key_shape)
        keys = columns[:, :width].reshape(tokens, *self.site.key_shape).movedim(0, -2)
        values = columns[:, width:].reshape(tokens, *self.site.value_shape).movedim(0, -2)
        if self.site.turn is not None:
            from lora_kit.lean.prefix_attention import turned

            keys = turned(keys, *self._turn(tokens, columns), self.site.turn[1])
        return keys, values

    def _turn(self, tokens: int, like: "Tensor") -> "tuple[Tensor, Tensor]":
        """The rotation by `-tokens` positions: PEFT's prefix stands at 0, 1, … and the text after it, ours before 0."""
        import torch

        key = tokens, like.device
        if key not in self._turns and self.site.turn is not None:
            angles = -tokens * torch.tensor(self.site.turn[0], dtype=torch.float64, device=like.device)
            self._turns[key] = angles.cos().float(), angles.sin().float()
        return self._turns[key]

    def run(self, kind: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """transformers' attention function with the prefix; called in its stead."""
        from lora_kit.lean.prefix_attention import attend

        inner, found = self.inner[kind], self.states()
        if found is None:
            return inner(module, query, key, value, mask, **kwargs)
        return attend(inner, module, query, key, value, mask, *found, kind=kind, **kwargs)


class Slots:
    """The prefixes of a module whose attention is written out by hand, by the order in which they are needed."""

    def __init__(self, forward: Any):
        self.forward = forward
        self.slots: dict[int, Slot] = {}

    def states(self, call: int) -> "tuple[Tensor, Tensor, float] | None":
        found = self.slots[call].states() if call in self.slots else None
        return None if found is None else (*found, self.slots[call].site.scale)


def watched_forward(module: Model, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, watched by one that adds the prefix."""
    from lora_kit.lean.watched import Watch

    slots: Slots = getattr(module, SLOT)
    forward = slots.forward or functools.partial(type(module).forward, module)
    with Watch(slots.states):
        return forward(*args, **kwargs)


def starts(sites: tuple[Site, ...]) -> list[int]:
    """Where the numbers of each site begin, and after them how many there are."""
    found = [0]
    for site in sites:
        found.append(found[-1] + site.size)
    return found


def columns_of(encoder: Model, start: int, size: int) -> "Tensor":
    """Columns `start` to `start + size` of the prefix, (virtual tokens, size)."""
    if hasattr(encoder, "columns"):
        return encoder.columns(start, size)
    return encoder.embedding.weight[:, start : start + size]


def install(adapted: Model, sites: tuple[Site, ...]) -> None:
    """Put the prefixes of a `PeftModel` into its attention, in place."""
    base = adapted.get_base_model()
    register()
    for site, start in zip(sites, starts(sites), strict=False):
        module = base.get_submodule(site.path)
        if not site.watched:
            module.config = routed(module)
            setattr(module, SLOT, Slot(adapted, site, start, inner_functions(type(module))))
            continue
        if not hasattr(module, SLOT):
            setattr(module, SLOT, Slots(vars(module).get("forward")))
            module.forward = functools.partial(watched_forward, module)
        getattr(module, SLOT).slots[site.call] = Slot(adapted, site, start)
    adapted.forward = functools.partial(_forward, adapted)
    adapted.disable_adapter = functools.partial(_disabled, adapted)
    adapted.unload = functools.partial(unload, adapted)
    if hasattr(base, "generate"):
        adapted.generate = functools.partial(_generate, adapted)


def remove(adapted: Model) -> None:
    """Undo `install` on the base, so that it can be used for something else."""
    for module in adapted.get_base_model().modules():
        slot = vars(module).pop(SLOT, None)
        if isinstance(slot, Slots):
            del module.forward
            if slot.forward is not None:
                module.forward = slot.forward
        elif slot is not None:
            module.config = module.config.real


def unload(adapted: Model) -> Model:
    """Take the prefix and the trained heads off again; returns the base as it was handed in, whose weights are frozen.

    As `unload` of PEFT's other methods; on PEFT's object it is there as a method.
    """
    from peft.utils import ModulesToSaveWrapper

    from lora_kit.lean import switch

    base = adapted.get_base_model()
    switch.disable(base)
    remove(adapted)
    for path, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, module.original_module)
    return base


def attend_in_full(model: Model) -> None:
    """Have BigBird attend to everything from the start, in place; it exchanges modules when it changes its mind."""
    for module in list(model.modules()):
        if hasattr(module, "set_attention_type") and getattr(module, "attention_type", "") != "original_full":
            module.set_attention_type("original_full")


def _forward(adapted: Model, *args: Any, **kwargs: Any) -> Any:
    kwargs = {key: value for key, value in kwargs.items() if key not in adapted.special_peft_forward_args}
    return adapted.get_base_model()(*args, **kwargs)


def _generate(adapted: Model, *args: Any, **kwargs: Any) -> Any:
    return adapted.get_base_model().generate(*args, **kwargs)


@contextmanager
def _disabled(adapted: Model) -> Iterator[None]:
    """The base alone, its heads as they were before training."""
    from peft.utils import ModulesToSaveWrapper

    before = adapted._adapters_disabled
    heads = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    adapted._adapters_disabled = True
    for head in heads:
        head.enable_adapters(False)
    try:
        yield
    finally:
        adapted._adapters_disabled = before
        for head in heads:
            head.enable_adapters(not before)


def facts(sites: tuple[Site, ...], reason: str | None) -> dict[str, Any]:
    """What a saved folder's manifest says of the prefix; `reason` as from `unreadable`."""
    return {
        "attention": sorted({site.role for site in sites}),
        "shapes": [[list(site.key_shape), list(site.value_shape)] for site in sites],
        "plain_peft": reason or "equal",
    }


def unreadable(model: Model, found: Found, sites: tuple[Site, ...]) -> str | None:
    """Why plain PEFT cannot use a prefix for these sites with the same result; None if it can."""
    import inspect

    from lora_kit import structure

    config: Any = model.config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(inner, "num_hidden_layers", None)
    backbone: Any = getattr(model, "base_model", model)
    forwards = [inspect.signature(module.forward) for module in (model, backbone)]
    if any(site.watched for site in sites):
        return "attention written out by hand"
    if any(site.role != "decoder" for site in sites) or getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if len({(site.key_shape, site.value_shape) for site in sites}) > 1 or sites[0].key_shape != sites[0].value_shape:
        return "keys and values of several shapes"
    if any(site.repeated for site in sites):
        return "layers that attend several times"
    if len(sites) != layers or bool(getattr(inner, "num_kv_shared_layers", 0)):
        return f"{len(sites)} attentions in {layers} layers"
    if found.moved:
        return "absolute positions, which PEFT moves"
    if any(site.window for site in sites) or hasattr(inner, "attention_chunk_size"):
        return "a window, out of which PEFT's prefix slides"
    if not any("past_key_values" in forward.parameters for forward in forwards):
        return "a forward without a cache"
    if structure.Towers(model).several:
        return "several towers"
    return None


def config_for(task: Any, sites: tuple[Site, ...], tokens: int, heads: list[str], reason: str | None) -> Any:
    """PEFT's config. Where PEFT could not use the prefix (`reason`), it states a layout that PEFT cannot put in.

    Plain PEFT then stops at the first forward instead of computing something else.
    """
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(
        task_type=task, num_virtual_tokens=tokens, num_transformer_submodules=1, modules_to_save=list(heads) or None
    )
    flatten(config, starts(sites)[-1])
    if reason is None:
        config.num_layers, config.num_attention_heads = len(sites), sites[0].key_shape[0]
        config.token_dim = config.encoder_hidden_size = sites[0].size // 2
    return config


def wrap(
    model: Model, config: Any, sites: tuple[Site, ...], name: str, peft_wrap: Callable[[Model, Any, str], Model]
) -> tuple[Model, bool]:
    """`peft_wrap` (`methods.native.wrap`) with a prefix of this layout, put into attention, in place.

    Returns the model, and whether PEFT reads the same sizes out of the model's own config, as it does when it loads.
    """
    import copy

    from peft import PrefixEncoder

    wanted = copy.deepcopy(config)
    model.requires_grad_(False)
    with _unchecked(model):
        adapted = peft_wrap(model, config, name)
    fitted = adapted.peft_config[name]
    same = True
    for field in ("num_layers", "num_attention_heads", "token_dim", "encoder_hidden_size"):
        same &= getattr(fitted, field) == getattr(wanted, field)
        setattr(fitted, field, getattr(wanted, field))
    adapted.prompt_encoder[name] = PrefixEncoder(fitted).to(adapted.device)
    install(adapted, sites)
    return adapted, same


def agrees(adapted: Model) -> bool:
    """Whether PEFT's own forward, with the prefix in the cache, computes what the model does with it in attention.

    Asked of a small batch. "The same" is a tenth of what the prefix changes, which any rounding is far below, and in
    float32 a thousandth.
    """
    import torch

    from lora_kit import probe

    base = adapted.get_base_model()
    with probe.trial(base), torch.no_grad():
        for inputs in probe.trial_inputs(base):
            try:
                ours = _logits(adapted(**inputs))
            except Exception:  # the next inputs may be liked better
                continue
            try:
                with adapted.disable_adapter():
                    without = _logits(base(**inputs))
                    theirs = _logits(type(adapted).forward(adapted, **inputs))
            except Exception:  # whatever a model raises whose cache takes no prefix
                return False
            exact = all(p.dtype == torch.float32 for p in base.parameters())
            return bool((ours - theirs).abs().max() <= (1e-3 if exact else 0.1) * (ours - without).abs().max())
    return False


def _logits(output: Any) -> "Tensor":
    return (output.logits if hasattr(output, "logits") else output[0]).float()


def flatten(config: Any, total: int) -> None:
    """State, in place, a layout that PEFT cannot put in: one layer with one head as wide as everything."""
    config.num_layers = config.num_attention_heads = 1
    config.token_dim = config.encoder_hidden_size = -(-total // 2)


def undo(adapted: Model) -> None:
    """Give the model back to PEFT: its prefix travels in the cache from here on."""
    remove(adapted)
    for name in ("forward", "generate", "disable_adapter", "unload"):
        if name in vars(adapted):
            delattr(adapted, name)


@contextmanager
def _unchecked(model: Model) -> Iterator[None]:
    """Hide that checkpointing is on from PEFT, whose own prefix does not survive it."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True
