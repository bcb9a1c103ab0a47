"""The way into transformers' attention interface, on the instances that are handed in alone.

Modules ask their config which attention function to call. `Routed` is a view of that config which names ours, `route`,
registered once beside transformers' own; it calls the one that the config really names.
"""

import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_kit.types import Model

if TYPE_CHECKING:
    from lora_kit.watching import Look

NAME = "lora_kit_prefix"
SLOT = "lora_kit_prefix"
"""Where a module has what stands in front of its attention."""


class Routed:
    """A module's config that names our attention function, with the one that was chosen inside its name.

    Everything else is read from the config itself, at every access: what is changed there later holds here too.
    """

    def __init__(self, real: Any, compared: frozenset[str] = frozenset()):
        self.real = real
        # made here rather than at each access, where torch.compile could not follow
        self.names = {kind: Alike(kind) if kind in compared else f"{NAME}|{kind}" for kind in _kinds()}

    @property
    def _attn_implementation(self) -> str:
        return self.names[self.real._attn_implementation]

    def __getattr__(self, name: str) -> Any:
        if name in ("real", "names") or name.startswith("__"):  # asked for while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.real, name)


class Alike(str):
    """Our function's name for modules that also compare it with one they know: equal to the one inside, too.

    torch.compile cannot follow it into the registry and breaks its graph there.
    """

    names: tuple[str, str]

    def __new__(cls, kind: str) -> "Alike":
        made = super().__new__(cls, f"{NAME}|{kind}")
        made.names = kind, f"{NAME}|{kind}"
        return made

    def __getnewargs__(self) -> tuple[str]:
        return (self.names[0],)

    def __eq__(self, other: object) -> bool:
        return other in self.names

    def __ne__(self, other: object) -> bool:
        return other not in self.names

    __hash__ = str.__hash__


class AsItIs:
    """A module whose config names the function inside: flash attention reads its kernel's name from there."""

    def __init__(self, module: Model):
        self.module = module
        self.config = module.config.real

    def __getattr__(self, name: str) -> Any:
        if name == "module" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)


def register() -> None:
    """Name our function in transformers' registry, once for each that it may stand in front of; replaces nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for kind in _kinds():
        if f"{NAME}|{kind}" not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(f"{NAME}|{kind}", functools.partial(route, kind))


def _kinds() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ["eager", *(kind for kind in ALL_ATTENTION_FUNCTIONS.valid_keys() if not kind.startswith((NAME, "paged|")))]


def route(kind: str, module: Model, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """The attention function `kind`, with the prefix of this module."""
    slot = getattr(module, SLOT)
    if "flash" in kind:
        module = AsItIs(module)
    return slot.run(kind, module, query, key, value, attention_mask, **kwargs)


def inner_functions(cls: type) -> dict[str, Any]:
    """transformers' functions by name, as this class would choose them; `eager` is each model file's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[str, Any] = {}
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        names = getattr(inspect.unwrap(forward), "__globals__", {}) if forward else {}
        interface = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        eager = next((names[name] for name in names if name.endswith("eager_attention_forward")), None)
        for kind in _kinds():
            function = eager if kind == "eager" else interface.get(kind)
            if function is not None:
                found.setdefault(kind, function)
    return found


def routed(module: Model) -> Routed:
    """The view of its config that a module of the interface gets."""
    return Routed(module.config, _compared(type(module)))


def routable(model: Model) -> Iterator[tuple[str, Model]]:
    """Modules that choose their attention function by name, from the interface."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is None or isinstance(module, PreTrainedModel) or isinstance(config, Routed):
            continue
        if hasattr(config, "_attn_implementation") and _asks_by_name(type(module)):
            yield path, module


def _asks_by_name(cls: type) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _source(cls)


def _compared(cls: type) -> frozenset[str]:
    """The names that the class compares its function's name with."""
    source = _source(cls)
    after = re.findall(r"_attn_implementation\s*(?:==|!=|in\b|not in\b)(.*)", source)
    names = {kind for text in after for kind in re.findall(r"[\"'](\w+)[\"']", text)}
    # in transformers 5.0 this is how a function is taken from the registry, and must not find the name to be eager's
    guarded = re.search(r"_attn_implementation != .eager.:\s+attention_interface", source)
    return frozenset(names - {"eager"} if guarded else names)


@functools.cache
def _source(cls: type) -> str:
    """The text of a class and of those that it is made from, up to torch's."""
    found = ""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            break
        try:
            found += inspect.getsource(base)
        except (OSError, TypeError):  # made at run time
            continue
    return found


@contextmanager
def around(looking: "Look", model: Model) -> Iterator[None]:
    """Show `looking` every module as it is entered and left, and every call through the attention interface."""
    register()
    hooks = []
    known = [(path, module, module.config) for path, module in routable(model)]
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(functools.partial(looking.enter, path)))
        hooks.append(module.register_forward_hook(looking.leave, always_call=True))
    try:
        for path, module, _config in known:
            module.config = routed(module)
            setattr(module, SLOT, Looking(looking, path))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for _path, module, config in known:
            module.config = config
            delattr(module, SLOT)


@dataclass
class Looking:
    """Stands where a prefix will be, and notes what comes by."""

    look: "Look"
    path: str

    def run(self, kind: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        from lora_kit.watching import Seen

        seen = Seen(self.path, 0, False, key.detach(), value.detach(), window=kwargs.get("sliding_window"))
        self.look.seen.append(seen)
        self.look.muted += 1
        inner = inner_functions(type(getattr(module, "module", module)))[kind]
        try:
            output, *rest = inner(module, query, key, value, mask, **kwargs)
            return self.look.marked(seen, output), *rest
        finally:
            self.look.muted -= 1
