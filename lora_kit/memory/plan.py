"""`plan`: the memory of a training run before a single weight is downloaded."""

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import base
from lora_kit import quantization as bits
from lora_kit.adaptation import resolve_quantization
from lora_kit.errors import LoraKitError, OptionError, UnsupportedError, listing, nearest
from lora_kit.memory.collector import uncollected
from lora_kit.memory.result import MemoryPlan, world_of
from lora_kit.messages import quiet
from lora_kit.methods import resolve

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from lora_kit.memory.blueprint import Axis, Blueprint
    from lora_kit.memory.ledger import Moment
    from lora_kit.memory.step import Step


REVERSIBLE = ("reformer",)
"""Models whose layers compute their input again from their output."""


@uncollected()
def plan(
    model: "str | Path | PretrainedConfig | nn.Module",
    method: Any = "lora",
    *,
    quantization: Any = None,
    task: str | None = None,
    batch_size: int = 1,
    seq_len: int = 1024,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    dtype: "torch.dtype | str" = "auto",
    autocast: "torch.dtype | str | None" = None,
    lean: bool | str = True,
    padding: bool = False,
    accumulation: int = 1,
    clip: float | None = 1.0,
    keep_outputs: bool = False,
    use_cache: bool = False,
    device: str = "cuda",
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> MemoryPlan:
    """Predict the memory of a training step from the model's config alone: nothing is downloaded but that.

    The installed code of torch, transformers, PEFT and bitsandbytes runs one step on tensors without memory, through
    the functions that `adapt` goes through. On the CPU the result is the bytes of all live tensors; for CUDA it is what
    torch's allocator would count, as far as that can be known without one (see the README for what was measured).

    Args:
        model: hub id, path, config, or a loaded model (whose config is read).
        method: as in `adapt`.
        quantization: None, `"8bit"`, `"4bit"` or a `BitsAndBytesConfig`.
        task: as in `adapt`; for an encoder-decoder, input and target have `seq_len` tokens each.
        batch_size: rows of a micro-batch.
        seq_len: tokens of a row.
        gradient_checkpointing: whether layers are run again in the backward pass.
        optimizer: `"adamw"` (torch's, fused; with `weights="stochastic"` lora_kit's), `"adamw_foreach"`,
            `"adamw_loop"`, `"sgd"`, `"adamw_8bit"` or `"paged_adamw_8bit"` (its states are counted as if they were on
            the card), `"adamw_stochastic"` (lora_kit's).
        dtype: dtype of the weights; `"auto"` is the config's.
        autocast: dtype that products run in, such as `"bfloat16"`. None: no autocast.
        lean: as in `adapt`.
        padding: whether rows are padded, so that attention gets a mask.
        accumulation: micro-batches for each step of the optimizer.
        clip: largest norm of the gradient, or None.
        keep_outputs: whether the loop holds the model's outputs until the step's end; Trainer does not.
        use_cache: whether the forward fills a key/value cache; Trainer switches it off.
        device: `"cuda"` or `"cpu"`: where the run will be, not where it is planned.
        model_kwargs: as in `adapt`, such as `{"num_labels": 3}` or `{"trust_remote_code": True}`.
        options: fields of the method's option class.

    Returns:
        A `MemoryPlan`: print it, ask it `fits("12GB")`, or `fit("RTX 4090")` for the largest sequence.

    Raises:
        OptionError: an unknown word, option or value, a sequence longer than the model's positions.
        UnsupportedError: a combination that cannot work, or a model whose step cannot be simulated.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> found = plan(config, "lora", rank=4, seq_len=16, device="cpu")
        >>> found.peak == sum(found.breakdown.values())
        True
    """
    from lora_kit.lean import switch
    from lora_kit.memory.blueprint import Blueprint, axes_of
    from lora_kit.memory.step import Step, optimizer_for

    try:
        chosen = resolve(method, options)
    except OptionError as error:
        # what looks like an option of the method may be an argument of the plan, misspelt
        hints = [nearest(key, inspect.signature(plan).parameters) for key in options]
        raise OptionError(f"{error}{next((hint for hint in hints if hint), '')}") from None
    switch.check(lean)
    quantized = resolve_quantization(quantization, chosen)
    if device not in ("cuda", "cpu"):
        raise OptionError(
            f"plan: unknown device {device!r}; accepted: cuda, cpu.{nearest(str(device), ('cuda', 'cpu'))}"
        )
    optimizer = optimizer_for(chosen, optimizer)
    cast: Any = None if autocast is None else base.torch_dtype(autocast)
    step = Step(batch_size, seq_len, padding, optimizer, cast, clip, accumulation, keep_outputs, use_cache)
    if "8bit" in optimizer and importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError(f"plan: optimizer={optimizer!r} needs bitsandbytes: pip install bitsandbytes")
    name, config, task = _described(model, task, model_kwargs)
    if config.model_type in REVERSIBLE:
        raise UnsupportedError(
            f"plan does not know {config.model_type}: its layers run inside an autograd function of its own, and what "
            "they keep is not seen in a simulation. Measure a step: adapt(...) and torch.cuda.max_memory_allocated()."
        )
    config = copy.deepcopy(config)
    if task == "classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders look for the last token before the padding; `finetune` sets the tokenizer's
    _check_length(config, seq_len)
    weights: Any = base.torch_dtype(dtype)
    if weights == "auto":
        weights = base.torch_dtype(getattr(config, "dtype", None) or "float32")
    trusted = {k: v for k, v in (model_kwargs or {}).items() if k == "trust_remote_code"}
    blueprint = Blueprint(
        config, task, weights, chosen, quantized, bool(gradient_checkpointing), tuple(trusted.items())
    )
    skeleton = blueprint.skeleton()
    bits.check(skeleton, quantized)
    chosen.check(skeleton, base.heads_of(skeleton))
    settings = {
        "model": name,
        "method": chosen.word,
        "size": chosen.size,
        "quantization": bits.word(quantized),
        "task": task,
        "dtype": str(blueprint.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "gradient_checkpointing": bool(gradient_checkpointing),
        "optimizer": optimizer,
        "autocast": None if cast is None else str(cast).removeprefix("torch."),
        "lean": lean,
        "padding": padding,
        "accumulation": accumulation,
        "device": device,
    }
    return made(blueprint, axes_of(blueprint), step, settings)


def made(blueprint: "Blueprint", axes: "tuple[Axis, ...]", step: "Step", settings: dict[str, Any]) -> MemoryPlan:
    """The plan of what is described already."""
    from lora_kit.memory import cuda
    from lora_kit.memory.simulate import at_depth

    world = world_of(settings["device"])
    try:
        with quiet("bitsandbytes.autograd._functions", "torch._subclasses.fake_tensor"):
            trace = at_depth(blueprint, axes, step, settings["lean"], world=world)
    except LoraKitError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"a step of {settings['model']} could not be simulated: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. It may look at values that only a real run has; measure one: "
            "adapt(...) and torch.cuda.max_memory_allocated()."
        ) from error
    phase, moment = trace.peak
    resident = sum(trace.resident.values())
    phases = _by_phase(trace.moments) | {
        "between steps": resident,
        "loading": _loading(blueprint, trace.resident.get("weights", 0)),
    }
    moving = moment.bytes - resident
    reserved = moment.bytes, moment.bytes
    needed = moment.bytes
    if world is cuda.CUDA:
        low = round(moment.bytes * (1 + cuda.FRAGMENTS))
        reserved = low, max(low, round(moment.bytes + trace.slack * moving))
        needed = reserved[0] + cuda.CONTEXT
    return MemoryPlan(
        moment.bytes,
        reserved,
        needed,
        f"{_spoken(phase)}, {moment.operation.removeprefix('aten::')}",
        {kind: count for kind, count in moment.kinds.items() if count},
        phases,
        settings,
        _blueprint=blueprint,
        _axes=axes,
        _step=step,
    )


def _described(model: Any, task: str | None, model_kwargs: dict[str, Any] | None) -> tuple[str, Any, str]:
    """(name, config, task)."""
    from torch import nn
    from transformers import PretrainedConfig

    if isinstance(model, PretrainedConfig):
        found = task or base.task_of_config(model)
        if found not in base.TASKS:
            raise OptionError(
                f"unknown task {found!r} for this {type(model).__name__}; accepted: {listing(base.TASKS)}."
            )
        return model.name_or_path or type(model).__name__, model, found
    if isinstance(model, nn.Module):
        source = base.examine(model, task=task, dtype="auto", device=None, model_kwargs=model_kwargs)
        if source.task is None or not hasattr(model, "config"):
            raise UnsupportedError(f"plan needs a model of transformers; {type(model).__name__} is none.")
        inner: Any = model.config
        return inner.name_or_path or type(model).__name__, inner, source.task
    source = base.examine(model, task=task, dtype="auto", device=None, model_kwargs=model_kwargs)
    return str(model), source.config, str(source.task)


def positions(config: Any) -> int | None:
    """How many tokens a model can number; None where nothing bounds them."""
    inner = config.get_text_config()
    most = getattr(inner, "max_position_embeddings", None) or getattr(inner, "n_positions", None)
    relative = getattr(inner, "model_type", "") in ("t5", "mt5", "umt5")
    return most if isinstance(most, int) and most > 0 and not relative else None


def _check_length(config: Any, seq_len: int) -> None:
    most = positions(config)
    if most is not None and seq_len > most:
        inner = config.get_text_config()
        rotary = getattr(inner, "rope_parameters", None) or getattr(inner, "rope_theta", None)
        more = " or raise it in the config (rope scaling)" if rotary else ""
        raise OptionError(
            f"plan: seq_len={seq_len} is longer than the model's {most} positions; use at most {most}{more}."
        )


def _loading(blueprint: "Blueprint", weights: int) -> int:
    """Most bytes while the weights come in: all of them, and the matrix that is just being quantized."""
    skeleton = blueprint.skeleton()
    if blueprint.bits is None:
        return sum(p.numel() * p.element_size() for p in skeleton.parameters())
    chosen = bits.choose(skeleton, base.heads_of(skeleton), blueprint.bits.llm_int8_skip_modules or ())
    return weights + max(p.weight.numel() * p.weight.element_size() for p in (*chosen.linear, *chosen.stacks))


_SPOKEN = {
    "log": "before gradients are freed",
    "forward": "forward",
    "head": "the loss",
    "backward": "backward",
    "clip": "clipping",
    "optimizer": "optimizer",
}


def _by_phase(moments: "dict[Any, Moment]") -> dict[str, int]:
    found: dict[str, int] = {}
    for (phase, _, _), moment in moments.items():
        if phase and phase[0] in _SPOKEN:
            name = _SPOKEN[phase[0]]
            found[name] = max(found.get(name, 0), moment.bytes)
    return found


def _spoken(phase: tuple[Any, ...]) -> str:
    if len(phase) == 4:
        name, path, end, number = phase
        place = {("first", 0): "first", ("last", 0): "last"}.get((end, number), f"{number + 1}. {end}")
        place = f"{number + 1}." if not isinstance(end, str) else place
        return f"{_SPOKEN[name]}, {place} layer of {path}"
    return _SPOKEN.get(phase[0], str(phase[0])) if phase[0] != "backward" else "the start of the backward pass"
