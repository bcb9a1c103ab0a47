"""A model with a prefix in its attention: PEFT's `PeftModel`, whose prefix works inside each layer, not in the cache.

The numbers are PEFT's own parameter, `prompt_encoder.<name>.embedding.weight` of shape (virtual tokens, everything),
site after site, keys before values. What is set on the instance handed in: for each attention module its `config` (a
view that names our function) or, where attention is written out by hand, its `forward`; on PEFT's object `forward`,
`generate` and `disable_adapter`, which would put the prefix into the cache.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_kit.attention import SLOT, Found, Routed, Site, register
from lora_kit.types import Model

if TYPE_CHECKING:
    from torch import Tensor


class Slot:
    """The prefix of one site, read from whichever adapter is active at the moment of the call."""

    def __init__(self, owner: Model, site: Site, start: int):
        self.owner, self.site, self.start = owner, site, start
        self._turns: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}

    def states(self) -> "tuple[Tensor, Tensor] | None":
        """Keys and values (*heads, virtual tokens, width); None while adapters are disabled."""
        if self.owner._adapters_disabled:
            return None
        columns = columns_of(self.owner.prompt_encoder[self.owner.active_adapter], self.start, self.site.size)
        tokens = columns.shape[0]
        width = self.site.size - _numbers(self.site.value_shape)
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

    def run(self, inner: Any, kind: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """transformers' attention function with the prefix; called in its stead."""
        from lora_kit.lean.prefix_attention import attend

        found = self.states()
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
            module.config = Routed(module.config)
            setattr(module, SLOT, Slot(adapted, site, start))
            continue
        if not hasattr(module, SLOT):
            setattr(module, SLOT, Slots(vars(module).get("forward")))
            module.forward = functools.partial(watched_forward, module)
        getattr(module, SLOT).slots[site.call] = Slot(adapted, site, start)
    adapted.forward = functools.partial(_forward, adapted)
    adapted.disable_adapter = functools.partial(_disabled, adapted)
    if hasattr(base, "generate"):
        adapted.generate = functools.partial(_generate, adapted)
    _reach_the_first_layer(base)


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


def _forward(adapted: Model, *args: Any, **kwargs: Any) -> Any:
    kwargs = {key: value for key, value in kwargs.items() if key not in adapted.special_peft_forward_args}
    return adapted.get_base_model()(*args, **kwargs)


def _generate(adapted: Model, *args: Any, **kwargs: Any) -> Any:
    return adapted.get_base_model().generate(*args, **kwargs)


@contextmanager
def _disabled(adapted: Model) -> Iterator[None]:
    before = adapted._adapters_disabled
    adapted._adapters_disabled = True
    try:
        yield
    finally:
        adapted._adapters_disabled = before


def _reach_the_first_layer(base: Model) -> None:
    """Let reentrant checkpointing, which only follows inputs with a gradient, be switched on after this."""
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(type(base), name):
            setattr(base, name, functools.partial(_enable_checkpointing, base, name))


def _enable_checkpointing(base: Model, name: str, *args: Any, **kwargs: Any) -> None:
    getattr(type(base), name)(base, *args, **kwargs)
    given = [*args, *kwargs.values()]
    if any(isinstance(options, dict) and options.get("use_reentrant") for options in given):
        base.enable_input_require_grads()


def unreadable(model: Model, found: Found, sites: tuple[Site, ...]) -> str | None:
    """Why plain PEFT cannot use a prefix for these sites with the same result; None if it can."""
    import inspect

    from lora_kit import structure

    config: Any = model.config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(inner, "num_hidden_layers", None)
    forwards = [module.forward for module in (model, getattr(model, "base_model", model))]
    if any(site.watched for site in sites):
        return "attention written out by hand"
    if any(site.role != "decoder" for site in sites) or getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if len({(site.key_shape, site.value_shape) for site in sites}) > 1 or sites[0].key_shape != sites[0].value_shape:
        return "keys and values of several shapes"
    if len(sites) != layers or getattr(inner, "num_kv_shared_layers", 0):
        return f"{len(sites)} attentions in {layers} layers"
    if found.moved:
        return "absolute positions, which PEFT moves"
    if any(site.window for site in sites) or getattr(inner, "attention_chunk_size", None):
        return "a window, out of which PEFT's prefix slides"
    if not any("past_key_values" in inspect.signature(forward).parameters for forward in forwards):
        return "a forward without a cache"
    if structure.Towers(model).several:
        return "several towers"
    return None


def config_for(task: Any, sites: tuple[Site, ...], tokens: int, heads: list[str], reason: str | None) -> Any:
    """PEFT's config. Where PEFT could not use the prefix (`reason`), it states a layout that PEFT cannot put in.

    That layout is one layer with one head as wide as everything: plain PEFT stops at the first forward instead of
    computing something else.
    """
    from peft import PrefixTuningConfig

    total = starts(sites)[-1]
    if reason is None:
        layout = {"num_layers": len(sites), "num_attention_heads": sites[0].key_shape[0]}
        layout["token_dim"] = sites[0].size // 2
    else:
        layout = {"num_layers": 1, "num_attention_heads": 1, "token_dim": -(-total // 2)}
    return PrefixTuningConfig(
        task_type=task,
        num_virtual_tokens=tokens,
        num_transformer_submodules=1,
        encoder_hidden_size=layout["token_dim"],
        modules_to_save=list(heads) or None,
        **layout,
    )


def wrap(model: Model, config: Any, sites: tuple[Site, ...], name: str) -> Model:
    """`peft.get_peft_model` with a prefix of this layout, and the prefix in attention. In place."""
    import copy

    from peft import PrefixEncoder

    from lora_kit.methods import native

    layout = copy.deepcopy(config)
    model.requires_grad_(False)
    with _unchecked(model):
        adapted = native.wrap(model, config, name, exactly=True)
    # PEFT fits the sizes to what it reads in the model's config
    for field in ("num_layers", "num_attention_heads", "token_dim", "encoder_hidden_size"):
        setattr(adapted.peft_config[name], field, getattr(layout, field))
    adapted.prompt_encoder[name] = PrefixEncoder(adapted.peft_config[name]).to(adapted.device)
    install(adapted, sites)
    if any(_is_reentrant(module) for module in model.modules()):
        model.enable_input_require_grads()
    return adapted


def _is_reentrant(module: Model) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant"))


def reparametrize(adapted: Model, name: str, sites: tuple[Site, ...], width: int) -> None:
    """Train the prefix through a two-layer network from here on, starting from what it holds now. In place."""
    from lora_kit.methods.reparametrized import Reparametrized

    encoder = adapted.prompt_encoder[name]
    adapted.prompt_encoder[name] = Reparametrized(encoder.embedding, starts(sites), width).to(adapted.device)


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


def _numbers(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
