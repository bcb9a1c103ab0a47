"""Any PEFT config as it is, and the one place where PEFT wraps a model."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_kit.errors import OptionError, TargetError, UnsupportedError
from lora_kit.methods.method import Attached, Method, Rate
from lora_kit.types import Model

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Native(Method):
    """A `peft.PeftConfig` that the caller wrote; lora_kit adds the task and the heads where they are left open."""

    word: ClassVar[str] = "peft"
    paper: ClassVar[str] = "https://huggingface.co/docs/peft"
    summary: ClassVar[str] = "what the PEFT config says"
    mergeable: ClassVar[bool] = True
    quantizable: ClassVar[bool] = True
    rate: ClassVar[Rate] = Rate(1e-3, 0.3)
    language_rate: ClassVar[Rate] = Rate(1e-3, 0.3)
    head_factor: ClassVar[float] = 5.0
    weight_decay: ClassVar[float] = 0.0
    warmup: ClassVar[float] = 0.1

    config: Any
    """The config. It is copied, never changed."""

    @classmethod
    def wrap(cls, config: object) -> "Native":
        """Refuse what is no PEFT config."""
        from peft import PeftConfig

        if not isinstance(config, PeftConfig):
            raise OptionError(
                f"method is a {type(config).__name__}; accepted: a word ('lora', 'prefix', 'full'), an option object "
                "such as LoRA(rank=32), or any peft.PeftConfig."
            )
        return cls(config)

    @property
    def size(self) -> str:
        return str(self.config.peft_type.value).lower()

    def options(self) -> dict[str, Any]:
        # the config itself is written by PEFT, beside the manifest that these go into
        return {"config": type(self.config).__name__}

    def check(self, model: Model, heads: list[str]) -> None:
        from lora_kit import targets

        names = getattr(self.config, "target_modules", None)
        if names and names != "all-linear":
            targets.match(model, names)
        saved = getattr(self.config, "modules_to_save", None) or ()
        for module in saved:
            if not any(path == module or path.endswith(f".{module}") for path, _ in model.named_modules()):
                raise TargetError(
                    f"modules_to_save names {module!r}, which matches no module of {type(model).__name__}; "
                    "correct the name in the config."
                )
        if self.config.peft_type.value in IN_THE_CACHE:
            refuse_checkpointing(model)

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        from lora_kit import targets

        config = copy.deepcopy(self.config)
        if config.task_type is None:
            config.task_type = targets.peft_task(model, heads)
        if heads and hasattr(config, "modules_to_save"):
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads})
        if heads and not hasattr(config, "modules_to_save"):
            raise UnsupportedError(
                f"{type(config).__name__} has no modules_to_save, so the head {heads[0]!r} could be neither trained "
                "nor saved. Use method='lora'."
            )
        adapted = wrap(model, config, name)
        if config.peft_type.value in IN_THE_CACHE:
            refuse_later_checkpointing(model)
        return Attached(adapted, f"as {type(config).__name__} says")


# PEFT's types whose trained keys and values travel in the key/value cache
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
CHECKPOINTING = (
    "a prefix from a PEFT config travels in the key/value cache, which gradient checkpointing drops, so it would crash "
    "or train nothing. Switch checkpointing off, or use method='prefix', whose prefix works inside attention."
)


def refuse_checkpointing(model: Model) -> None:
    """Raise if the model recomputes its activations."""
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise UnsupportedError(CHECKPOINTING)


def refuse_later_checkpointing(model: Model) -> None:
    """Make `model.gradient_checkpointing_enable()`, which trainers call, raise from now on: this instance only."""
    for enable in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(model, enable):
            setattr(model, enable, _raise_checkpointing)


def _raise_checkpointing(*_args: object, **_kwargs: object) -> None:
    raise UnsupportedError(CHECKPOINTING)


def wrap(model: Model, config: Any, name: str, *, exactly: bool = False) -> Model:
    """`peft.get_peft_model`, with heads that train in float32 and without PEFT's transient warnings.

    A head in 16 bit would round its updates away, so the trained copy is float32 and casts its inputs. `exactly`:
    the config names full paths of this very model, which PEFT must take as they are.
    """
    import warnings
    from contextlib import nullcontext

    from peft import PeftModel, get_peft_model

    from lora_kit import probe, stacks, structure

    structure.hold_still(model)
    with warnings.catch_warnings(), stacks.shown(model), as_named(model) if exactly else nullcontext():
        # transformers deprecates an attribute that PEFT still reads on every call; nothing that a user could act on
        warnings.filterwarnings("ignore", category=FutureWarning, module="peft|transformers")
        # each layer gets the layout that it has, whatever the config says
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", module="peft")
        # PEFT looks among the modules alone for what a pattern of ranks names
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", module="peft")
        if config.is_prompt_learning and config.task_type is None:
            adapted = PeftModel(model, config, adapter_name=name)  # get_peft_model does it for the other methods only
        else:
            adapted = get_peft_model(model, config, adapter_name=name)
    stacks.adapt_parameters_(adapted)
    train_heads_in_float32(adapted, name)
    _keep_statistics(adapted)
    _train_tokens_in_float32(adapted, name)
    _let_inputs_be_changed_in_place(model)
    if not config.is_prompt_learning and not config.inference_mode and probe.stops_gradients(adapted):
        model.enable_input_require_grads()
    return adapted


def _let_inputs_be_changed_in_place(model: Model) -> None:
    """Have checkpointing work where a model adds to its embeddings in place (GIT), on this instance.

    For checkpointing transformers asks the output of the embeddings for a gradient, which makes it a leaf that nothing
    may be added to; a copy of it is none.
    """
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads = functools.partial(_enable_input_gradients, model)
    if getattr(model, "_require_grads_hooks", None):
        _copy_inputs(model)


def _enable_input_gradients(model: Model) -> None:
    type(model).enable_input_require_grads(model)
    _copy_inputs(model)


def _copy_inputs(model: Model) -> None:
    from lora_kit import probe

    # every model inside has its own, but some that hash their tokens (Canine)
    inside = [m for m in model.modules() if hasattr(m, "get_input_embeddings") and _says_its_embeddings(m)]
    for embeddings in {m.get_input_embeddings() for m in inside} - {None}:
        handle = embeddings.register_forward_hook(probe.copy_leaf)
        # where transformers' own disable_input_require_grads finds it
        getattr(model, "_require_grads_hooks", []).append(handle)


@contextmanager
def as_named(model: Model) -> Iterator[None]:
    """Keep PEFT from rewriting targets by the model's type, on this instance and for the time of one call.

    For some mixture-of-experts types PEFT sends every target called `gate_proj`, `up_proj` or `down_proj` to the
    experts, as adapters from before transformers 5 need it: dense layers and shared experts would go without. For
    some state-space types it refuses every `out_proj`. Both go by `config.model_type`.
    """
    own = vars(model.config) if hasattr(model, "config") else {}
    before = dict(own)
    own["model_type"] = ""
    # and, for a prefix, for the size of a vocabulary, which models that hash characters (Canine) do not have
    nameless = hasattr(model, "config") and not hasattr(_text_config(model), "vocab_size")
    if nameless:
        vars(_text_config(model))["vocab_size"] = -1
    # PEFT also asks every model for its input embeddings, which some (PP-FormulaNet) do not say
    silent = hasattr(model, "get_input_embeddings") and not _says_its_embeddings(model)
    if silent:
        model.__dict__["get_input_embeddings"] = functools.partial(_first_embeddings, model)
    try:
        yield
    finally:
        if silent:
            del model.__dict__["get_input_embeddings"]
        if nameless:
            del vars(_text_config(model))["vocab_size"]
        del own["model_type"]
        if "model_type" in before:
            own["model_type"] = before["model_type"]


def _text_config(model: Model) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _says_its_embeddings(model: Model) -> bool:
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return False
    return True


def _first_embeddings(model: Model) -> Model:
    from torch import nn

    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), nn.Identity())


def train_heads_in_float32(model: Model, name: str) -> None:
    """Cast the trained copies of `modules_to_save` to float32, in place, and their inputs on the way in."""
    import torch
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper) or name not in module.modules_to_save:
            continue
        head = module.modules_to_save[name]
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in head.parameters()):
            head.float()
            head.register_forward_pre_hook(_cast_inputs_to_float32)


def _keep_statistics(model: Model) -> None:
    """Keep frozen batch normalization in evaluation, whatever mode the model is put in.

    In training it would use each batch's own mean and variance and move the base's running ones, which no adapter's
    file holds: the loaded model would not be the one that was trained.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and module.track_running_stats and frozen:
            module.eval()
            module.__dict__["train"] = functools.partial(_stay, module)


def _stay(module: "nn.Module", mode: bool = True) -> "nn.Module":
    return module


def _train_tokens_in_float32(model: Model, name: str) -> None:
    """Cast the trained rows of embeddings to float32, in place; the layer rounds a copy to the embedding's dtype."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and name in module.trainable_tokens_delta:
            module.trainable_tokens_delta[name].data = module.trainable_tokens_delta[name].data.float()


def _cast_inputs_to_float32(module: "nn.Module", inputs: tuple) -> tuple:
    import torch

    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
