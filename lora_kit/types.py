"""Names for what type checkers cannot see through."""

from typing import Any, TypeAlias

# A `torch.nn.Module` of transformers or PEFT. Their attributes (config, peft_config, disable_adapter, …) differ by
# class and reach checkers as `Tensor | Module`, which would call for an ignore in every other line.
Model: TypeAlias = Any
