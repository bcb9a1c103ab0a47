"""A model put back as it was, where wrapping it fails half-way."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_kit.types import Model


@contextmanager
def rollback(model: Model) -> Iterator[None]:
    """On an error, put back every module's class, attributes, children and hooks, and what each parameter requires.

    Values of tensors are not kept: nothing that is done inside may write into the base's own. Modules and tensors that
    were put into other's places are let go; those that were there are there again, the same objects.
    """
    modules = [(module, type(module), _attributes(module)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    settings = dict(vars(config)) if hasattr(config, "__dict__") else None
    try:
        yield
    except BaseException:
        for module, kind, attributes in modules:
            if type(module) is not kind:
                module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for parameter, required, gradient in flags:
            parameter.requires_grad = required
            parameter.grad = gradient
        if settings is not None:
            vars(config).clear()
            vars(config).update(settings)
        raise


def _attributes(module: Model) -> dict[str, Any]:
    """The module's attributes, with dictionaries, lists and sets (children, hooks) copied one level deep."""
    return {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value
        for name, value in module.__dict__.items()
    }
