"""lora_kit: one call that makes a language model ready to fine-tune.

    from lora_kit import adapt
    model = adapt("Qwen/Qwen3-8B", "lora", quantization="4bit")

Importing this package changes nothing in the process and loads neither torch nor transformers; they come with the
first use of a name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_kit.adaptation import adapt as adapt
    from lora_kit.checks.guard import guard as guard
    from lora_kit.checks.report import Report as Report
    from lora_kit.checks.verify import verify as verify
    from lora_kit.comparison.matrix import compare as compare
    from lora_kit.errors import LoraKitError as LoraKitError
    from lora_kit.memory.plan import plan as plan
    from lora_kit.memory.result import MemoryPlan as MemoryPlan
    from lora_kit.methods import METHODS as METHODS
    from lora_kit.methods import Full as Full
    from lora_kit.methods import LoRA as LoRA
    from lora_kit.methods import Prefix as Prefix
    from lora_kit.storage.load import load as load
    from lora_kit.storage.merge import merge as merge
    from lora_kit.storage.save import save as save
    from lora_kit.training.defaults import param_groups as param_groups
    from lora_kit.training.defaults import training_defaults as training_defaults
    from lora_kit.training.finetune import finetune as finetune

__version__ = "0.1.0"

_HOMES = {
    "adapt": "lora_kit.adaptation",
    "LoRA": "lora_kit.methods",
    "Prefix": "lora_kit.methods",
    "Full": "lora_kit.methods",
    "METHODS": "lora_kit.methods",
    "plan": "lora_kit.memory.plan",
    "choose": "lora_kit.memory.auto",
    "MemoryPlan": "lora_kit.memory.result",
    "verify": "lora_kit.checks.verify",
    "guard": "lora_kit.checks.guard",
    "Report": "lora_kit.checks.report",
    "save": "lora_kit.storage.save",
    "load": "lora_kit.storage.load",
    "merge": "lora_kit.storage.merge",
    "param_groups": "lora_kit.training.defaults",
    "training_defaults": "lora_kit.training.defaults",
    "finetune": "lora_kit.training.finetune",
    "compare": "lora_kit.comparison.matrix",
    "LoraKitError": "lora_kit.errors",
}

__all__ = [
    "adapt",
    "LoRA",
    "Prefix",
    "Full",
    "METHODS",
    "plan",
    "MemoryPlan",
    "verify",
    "Report",
    "guard",
    "save",
    "load",
    "merge",
    "param_groups",
    "training_defaults",
    "finetune",
    "compare",
    "LoraKitError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_kit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
