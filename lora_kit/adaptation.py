"""`adapt`: one call from a model to one that is ready to train.

resolve → check → load → quantize → attach → report, read top to bottom below. It does not train, and it wraps no
model in a class of its own: what comes back is PEFT's `PeftModel`, or for full fine-tuning the model itself.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import base, fingerprint
from lora_kit import quantization as bits
from lora_kit.errors import OptionError, UnsupportedError, listing
from lora_kit.messages import say
from lora_kit.methods import Method, resolve, word_of
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn

    # Any: the call returns PEFT's or transformers' own class, whose attributes the caller goes on to use
    AdaptedModel = Any


@dataclass(frozen=True)
class Record:
    """What was done to a model; `adapt` leaves it on the model as `model.lora_kit_record`."""

    method: str
    options: dict[str, Any]
    task: str | None
    base: str | None
    """Hub id or folder that the base came from."""
    base_dtype: str
    """Dtype of the base's weights before anything was changed, such as `"bfloat16"`."""
    quantization: str
    """`"16bit"`, `"8bit"` or `"4bit"`."""
    parameters: int
    """Number of parameters of the base, however they are stored."""
    name: str = "default"
    heads: tuple[str, ...] = field(default_factory=tuple)
    """Paths, in the base, of modules that are trained whole."""
    coverage: float | None = None
    """Share of the base's matmul weights that carries an adapter, 0 to 1; None where that was not counted."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Matmul weight of the base → why it carries no adapter."""
    unquantized: dict[str, str] = field(default_factory=dict)
    """Matmul weight of a quantized base → why it is not quantized."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method adds to the saved folder's manifest."""
    fingerprint: dict[str, Any] = field(default_factory=dict, repr=False)
    """What tells the base from any other: `"files"` and `"samples"`, see `lora_kit.fingerprint`."""


def adapt(
    model: "str | nn.Module",
    method: Any = "lora",
    *,
    quantization: Any = None,
    task: str | None = None,
    dtype: "torch.dtype | str" = "auto",
    device: str | None = None,
    lean: bool | str = True,
    name: str = "default",
    model_kwargs: dict[str, Any] | None = None,
    memory: str | int | None = None,
    **options: Any,
) -> "AdaptedModel":
    """Make a model ready to train by LoRA, prefix tuning or full fine-tuning. A loaded model is changed in place.

    One line on standard error says what will be trained. Everything that can be refused is refused before any weight
    is loaded or changed.

    Args:
        model: hub id, path of a folder, or a loaded `torch.nn.Module`.
        method: `"lora"`, `"prefix"`, `"full"`, an option object such as `LoRA(rank=32)`, or any `peft.PeftConfig`. Or
            `"auto"`: LoRA on the best base that `memory` has room for, with what else that takes; the line says why.
        quantization: None, `"8bit"`, `"4bit"` (NF4, double quantization, bfloat16 compute) or a `BitsAndBytesConfig`.
            Works while loading and, layer by layer, on a model in memory, with the same quantized weights. Embeddings,
            output head, task heads, routers and maps too small to gain stay as they are; the line says what and why.
        task: what the model is for: `"causal-lm"`, `"seq2seq-lm"`, `"classification"`, `"token-classification"`,
            `"question-answering"`, `"image-text"` or `"speech"`. None: what the checkpoint says. Only for an id or
            a path.
        dtype: dtype to load the weights in; `"auto"` is the checkpoint's own. Only for an id or a path.
        device: where to put the model. None: a model to be loaded goes to the GPU if there is one.
        lean: True for a training step that keeps less and computes the same (`lora_kit.lean.switch.enable`); False
            for PEFT's and transformers' own; `"low-memory"` to keep still less and compute the MLPs twice.
        name: name of the adapter.
        model_kwargs: passed on to `from_pretrained`, such as `{"num_labels": 3}`. Only for an id or a path.
        memory: for `"auto"`: the card's name, its size such as `"12GB"`, or bytes.
        options: fields of the method's option class, such as `rank=32`; for `"auto"` the run's `seq_len` (1024) and
            `batch_size` (1).

    Returns:
        PEFT's `PeftModel`, or for `"full"` the model itself, in training mode and with the right parameters trainable.

    Raises:
        OptionError: unknown word, option or value, a rank larger than a matrix.
        TargetError: a target module that matches nothing.
        UnsupportedError: a combination that cannot work, such as full fine-tuning of a 4-bit model.
        AlreadyAdaptedError: the model carries an adapter already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = adapt(LlamaForCausalLM(config), "lora", rank=4)
        >>> model.peft_config["default"].r
        4
    """
    from lora_kit.lean import switch

    checkpointing = False
    if method == "auto":
        quantization, lean, checkpointing = _chosen_for(
            memory,
            model,
            quantization,
            lean,
            task=task,
            dtype=dtype,
            device=device,
            model_kwargs=model_kwargs,
            **options,
        )
        method, options = "lora", {}
    elif memory is not None:
        raise OptionError(
            f"memory={memory!r} is for method='auto'; plan(model, {method!r}).fits(memory) tells for others."
        )
    chosen = resolve(method, options)
    switch.check(lean)
    quantized = resolve_quantization(quantization, chosen)

    source = base.examine(model, task=task, dtype=dtype, device=device, model_kwargs=model_kwargs)
    bits.check(source.skeleton, quantized)
    bits.try_out(quantized, base.device_of(source))
    heads = base.heads_of(source.skeleton)
    bits.refuse_quantized_heads(source.skeleton, heads)
    chosen.check(source.skeleton, heads)

    given_dtype = main_dtype(source.skeleton)
    # a model in memory is sampled before it is quantized
    samples = fingerprint.of_model(source.skeleton, tuple(heads)) if source.path is None else None
    loaded, missing = base.load(source, quantized, heads)
    heads = base.heads_of(loaded, missing)
    base_dtype = given_dtype if source.path is None else main_dtype(loaded)

    if samples is None:
        samples = fingerprint.of_model(loaded, tuple(heads))
    came_from = source.path or getattr(getattr(loaded, "config", None), "_name_or_path", "") or None

    parameters = count_parameters(loaded)
    staying = bits.staying(loaded, heads) if quantized is not None else None
    attached = chosen.attach(loaded, heads, name)
    record = Record(
        method=chosen.word,
        options=chosen.options(),
        task=base.task_of(loaded),
        base=came_from,
        base_dtype=base_dtype,
        quantization=bits.of(loaded) or "16bit",
        parameters=parameters,
        name=name,
        heads=tuple(heads),
        coverage=attached.share if chosen.word == "lora" else None,
        left_out=attached.left_out,
        facts=attached.facts,
        unquantized=staying.skipped if staying else {},
        fingerprint={
            "files": fingerprint.of_files(came_from, source.model_kwargs.get("revision")),
            "samples": samples,
        },
    )
    attached.model.lora_kit_record = record
    attached.model.train()
    if checkpointing:
        base.checkpoint(loaded)
        attached.model.enable_input_require_grads()
    switch.enable(attached.model, lean)
    say(report(attached.model, chosen, attached.coverage, record, staying.left_out() if staying else ""))
    return attached.model


def _chosen_for(
    memory: Any, model: Any, quantization: Any, lean: Any, *, device: Any, **rest: Any
) -> tuple[Any, bool | str, bool]:
    """(quantization, lean, checkpointing) for `"auto"`."""
    # by its public name: planning stands above adapting, and only this word asks for it
    import lora_kit

    if quantization is not None or lean is not True:
        raise OptionError("method 'auto' chooses quantization and lean itself; leave them out, or name a method.")
    loaded = not isinstance(model, str | Path)
    if loaded:
        rest["dtype"] = main_dtype(model)
    found = lora_kit.choose(
        model,
        memory,
        device="cpu" if device == "cpu" else "cuda",
        quantized=loaded and bits.of(model) is not None,
        **rest,
    )
    say(found.why)
    return found.quantization, found.lean, found.gradient_checkpointing


def resolve_quantization(word: Any, method: Method) -> Any:
    """The bitsandbytes config, after refusing a method that cannot train on one."""
    config = bits.resolve(word)
    if config is not None and not method.quantizable:
        raise UnsupportedError(
            f"method {method.word!r} with quantization={word!r}: quantized matrices hold integers and cannot be "
            "trained. Use method='lora' or 'prefix', or leave quantization out."
        )
    if config is not None:
        method.check_quantization(bits.word(config))
    return config


def report(model: Model, method: Method, coverage: str, record: Record, staying: str = "") -> str:
    """The one line: what is trained, how much of it, on what; `staying` is what quantization left as it was."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = [f"{method.word} ({method.size}): {coverage}"]
    if record.heads and method.word != "full":
        parts.append(f"trained whole: {listing(map(repr, record.heads), 4)}")
    parts.append(
        f"{trainable:,} of {record.parameters:,} parameters trainable ({100 * trainable / record.parameters:.2f} %)"
    )
    quantized, total = bits.quantized_bytes(model)
    weights = f"weights {total / 1e6:,.1f} MB, {record.base_dtype}"
    if quantized:
        weights += f", {quantized / 1e6:,.1f} MB of them {record.quantization}"
        weights += f" ({staying})" if staying else ""
    parts.append(weights)
    return "; ".join(parts)


def base_of(model: Model) -> Model:
    """The model inside PEFT's wrapping, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_parameters(model: Model, *, without: str | None = None) -> int:
    """Number of parameters, counting each 4-bit weight as one although two share a byte.

    `without` names an adapter inside the model that is left out of the count.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if without is not None and f".{without}." in name:
            continue
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total


def record_of(model: Model) -> Record:
    """The record that `adapt` left, or one read off a model that plain PEFT or transformers made."""
    found = getattr(model, "lora_kit_record", None)
    if isinstance(found, Record):
        return found
    config = model.peft_config if hasattr(model, "get_base_model") else None
    inner = base_of(model)
    word = "full"
    adapter = "default"
    if config:
        adapter = model.active_adapter
        word = word_of(config[adapter])
    return Record(
        method=word,
        options={},
        task=base.task_of(inner),
        base=getattr(getattr(inner, "config", None), "_name_or_path", "") or None,
        base_dtype=main_dtype(inner),
        quantization=bits.of(inner) or "16bit",
        parameters=count_parameters(inner, without=adapter if config else None),
        name=adapter,
        heads=tuple(base.heads_of(inner)),
    )


def main_dtype(model: Model) -> str:
    """The dtype that most of the floating-point weights have."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            key = str(parameter.dtype).removeprefix("torch.")
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    return max(sizes, key=lambda key: sizes[key]) if sizes else "float32"
