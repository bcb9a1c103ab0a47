"""A model from an id, a path or an object: its task, its dtype, its device, and heads that are new.

transformers' warning lists and progress bars are left alone; what lora_kit has to say comes in one line at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import quantization
from lora_kit.errors import AlreadyAdaptedError, OptionError, UnsupportedError, listing, nearest
from lora_kit.messages import say
from lora_kit.routing import SLOT
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PretrainedConfig

GENERATING = ("causal-lm", "seq2seq-lm", "image-text", "speech")
"""Tasks whose model predicts tokens: its output head is the language model's own."""

# task → (transformers' auto class, its table of class names)
TASKS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "question-answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    "image-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}


@dataclass
class Source:
    """What `adapt` was given, examined but not yet loaded."""

    skeleton: Model
    """The model itself, or its twin without weights (on `meta`) where it is still to be loaded."""
    task: str | None
    path: str | None = None
    """Hub id or folder to load from; None for an object."""
    config: "PretrainedConfig | None" = None
    dtype: "torch.dtype | str" = "auto"
    device: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    """After loading: tensors of the checkpoint that the model has no place for."""


def _tables() -> dict[str, set[str]]:
    from transformers.models.auto import modeling_auto

    def names(table: str) -> set[str]:
        values = getattr(modeling_auto, table).values()
        return {n for value in values for n in (value if isinstance(value, tuple | list) else (value,))}

    return {task: names(table) for task, (_, table) in TASKS.items()}


def task_of_class(names: list[str], *, encoder_decoder: bool = False) -> str | None:
    """The task that a class of one of these names is for, or None."""
    tables = _tables()
    # T5ForConditionalGeneration stands in more than one table; the config decides.
    order = ["seq2seq-lm", *TASKS] if encoder_decoder else list(TASKS)
    for name in names:
        for task in order:
            if name in tables[task]:
                return task
    return None


def task_of(model: Model) -> str | None:
    """The task that this model is for, by its class; None where transformers' tables do not know it."""
    config = getattr(model, "config", None)
    names = [cls.__name__ for cls in type(model).__mro__]
    return task_of_class(names, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))


def examine(
    model: Any,
    *,
    task: str | None,
    dtype: "torch.dtype | str",
    device: str | None,
    model_kwargs: dict[str, Any] | None,
) -> Source:
    """Find out what `model` is without loading any weight; refuse what cannot be worked with."""
    from torch import nn

    if task is not None and task not in TASKS:
        raise OptionError(f"unknown task {task!r}; accepted: {listing(TASKS)}.{nearest(task, TASKS)}")
    if isinstance(model, nn.Module):
        given = {"task": task, "dtype": None if dtype == "auto" else dtype, "model_kwargs": model_kwargs}
        for key, value in given.items():
            if value:
                raise OptionError(
                    f"{key}={value!r} is for a model that is still to be loaded, but a loaded "
                    f"{type(model).__name__} was given. Leave {key} out."
                )
        _check_device(device)
        return _examine_object(model, device)
    if not isinstance(model, str | Path):
        raise OptionError(
            f"model is a {type(model).__name__}; accepted: a hub id, the path of a folder, or a loaded torch.nn.Module."
        )
    _check_device(device)
    return _examine_path(str(model), task, torch_dtype(dtype), device, dict(model_kwargs or {}))


def torch_dtype(dtype: "torch.dtype | str") -> "torch.dtype | str":
    import torch

    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    accepted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in accepted:
        raise OptionError(f"unknown dtype {dtype!r}; accepted: auto, {listing(accepted)}.{nearest(dtype, accepted)}")
    return accepted[dtype]


def _check_device(device: str | None) -> None:
    import torch

    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise OptionError(f"unknown device {device!r}; accepted: cpu, cuda, cuda:0 and the like.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={device!r}, but this torch sees no CUDA device. Leave device out to use the CPU.")


def _examine_object(model: Model, device: str | None) -> Source:
    from peft.tuners.tuners_utils import BaseTunerLayer

    # an unloaded model may keep PEFT's config as a mere attribute (PEFT 0.18)
    carries = any(isinstance(m, BaseTunerLayer) or SLOT in vars(m) for m in model.modules())
    if hasattr(model, "get_base_model") or carries:
        names = listing(map(repr, getattr(model, "peft_config", ["?"])))
        raise AlreadyAdaptedError(
            f"this {type(model).__name__} already carries an adapter ({names}); "
            "a second one around it could not be saved. Train the one that is there, or take the base back first: "
            "model = model.unload()."
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            f"the model is compiled (a {type(model).__name__!r}); adapt the model first and call torch.compile on the "
            "result: torch.compile(adapt(model._orig_mod))."
        )
    devices = {str(p.device) for p in model.parameters()}
    if "meta" in devices:
        raise UnsupportedError("the model has parameters on the device 'meta', that is, without values; load it first.")
    if len(devices) > 1:
        raise UnsupportedError(
            f"the model is spread over the devices {listing(sorted(devices))}; load it on one, with "
            "device_map={'': 0} or without device_map."
        )
    return Source(model, task_of(model), device=device)


def _examine_path(
    path: str, task: str | None, dtype: "torch.dtype | str", device: str | None, model_kwargs: dict[str, Any]
) -> Source:
    import transformers

    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        if (Path(path) / "adapter_config.json").exists():
            raise AlreadyAdaptedError(
                f"{path} is an adapter, not a base model. To go on training it: load({path!r}, base=..., train=True)."
            )
        raise OptionError(f"the folder {path} has no config.json, so it is no model of transformers.")
    from_config = {
        k: v for k, v in model_kwargs.items() if k in ("revision", "subfolder", "token", "trust_remote_code")
    }
    # left open, transformers would ask at the terminal whether to run code that came with the model
    from_config.setdefault("trust_remote_code", False)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **from_config)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise OptionError(
                f"{path} comes with code of its own, which is not run unasked. If you trust it: "
                "model_kwargs={'trust_remote_code': True}."
            ) from None
        raise OptionError(f"no model found for {path!r}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # what transformers' configs raise when they check themselves is of no common kind
        raise OptionError(
            f"transformers refuses the config of {path!r}: {' '.join(str(error).split())[:300]}"
        ) from None
    names = config.architectures or []
    found = task_of_class(names, encoder_decoder=bool(config.is_encoder_decoder))
    task = task or found
    if task is None:
        raise OptionError(
            f"{path} is a {listing(names) or 'model'} without a head, so what to train it for is not known. "
            f"Pass task=, one of: {listing(TASKS)}."
        )
    for key in list(model_kwargs):
        # num_labels, id2label and the like belong to the config, and decide the shape of the head
        if hasattr(config, key) or key in ("num_labels", "id2label", "label2id"):
            setattr(config, key, model_kwargs.pop(key))
    extra = {k: v for k, v in model_kwargs.items() if k == "trust_remote_code"}
    try:
        skeleton = skeleton_of(config, task, **extra)
    except ValueError as error:
        raise OptionError(f"{path} cannot be built for task={task!r}: {str(error).splitlines()[0][:300]}") from None
    quantization.mark(skeleton, getattr(config, "quantization_config", None))
    return Source(skeleton, task, path, config, dtype, device, model_kwargs)


def skeleton_of(config: Any, task: str, **kwargs: Any) -> Model:
    """The model that a config describes, without weights (on `meta`)."""
    import torch

    with torch.device("meta"):
        return builder(config, task)(config, **kwargs)


def builder(config: Any, task: str) -> Any:
    """transformers' function that makes a model with new weights from this config."""
    chosen = _class_for(config, task)
    return getattr(chosen, "from_config", None) or chosen._from_config


def task_of_config(config: Any) -> str | None:
    """What a config's model is for: by the class that it names, else by the classes that transformers has for it."""
    import transformers

    named = task_of_class(config.architectures or [], encoder_decoder=bool(config.is_encoder_decoder))
    if named is not None:
        return named
    has = {task for task, (auto, _) in TASKS.items() if type(config) in getattr(transformers, auto)._model_mapping}
    if config.is_encoder_decoder and "seq2seq-lm" in has:
        return "seq2seq-lm"
    reads = type(config) in transformers.AutoModelForMaskedLM._model_mapping  # encoders have decoder classes too
    order = ("classification", "causal-lm") if reads else ("causal-lm", "classification")
    return next((task for task in (*order, *TASKS) if task in has), None)


def _class_for(config: Any, task: str) -> Any:
    """transformers' auto class for the task, or the class that the checkpoint names where the auto class does not know
    its config (Emu3's text model)."""
    import transformers

    auto = getattr(transformers, TASKS[task][0])
    if type(config) in auto._model_mapping or getattr(config, "auto_map", None):
        return auto
    named = [name for name in config.architectures or [] if hasattr(transformers, name)]
    return getattr(transformers, named[0]) if named else auto


def device_of(source: Source) -> str:
    """Where the model will be."""
    import torch

    if source.device is not None:
        return source.device
    if source.path is None:
        return str(next(source.skeleton.parameters()).device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(source: Source, config: "BitsAndBytesConfig | None", heads: list[str]) -> "tuple[Model, list[str]]":
    """The model, quantized if asked (all but `heads`), and the paths of modules without weights in the checkpoint."""

    if source.path is None:
        model = source.skeleton if source.device is None else source.skeleton.to(source.device)
        if config is not None:
            quantization.quantize_(model, config, heads)
        quantization.settle(model)
        return model, []
    device = device_of(source)
    kwargs: dict[str, Any] = dict(source.model_kwargs)
    if config is not None:
        from lora_kit import loading

        kwargs["quantization_config"] = loading.config_for(config, source.skeleton, heads)
        kwargs["device_map"] = {"": device}
    model, info = _class_for(source.config, source.task or "").from_pretrained(
        source.path,
        config=source.config,
        dtype=source.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    if config is None:
        model.to(device)
    if config is not None:
        # weights that layers share, which were tied after loading; and the marks of a quantized model
        quantization.quantize_(model, config, heads)
    quantization.settle(model)
    source.unexpected = sorted(info["unexpected_keys"])
    resized = {name: (found, wanted) for name, found, wanted in info["mismatched_keys"]}
    _refuse_resized_backbone(resized, heads_of(model), source.path)
    missing = sorted({name.rpartition(".")[0] for name in {*info["missing_keys"], *resized}})
    return model, missing


def _refuse_resized_backbone(resized: dict[str, tuple[Any, Any]], heads: list[str], path: str) -> None:
    """A head of another size (other labels) starts anew, and that is said; any other weight must fit."""
    for name, (found, wanted) in resized.items():
        head = next((head for head in heads if name.startswith(f"{head}.")), None)
        if head is None:
            raise UnsupportedError(
                f"{path}: {name} is {tuple(found)} in the checkpoint, {tuple(wanted)} in the model; the config does "
                "not belong to these weights."
            )
        say(f"head {head!r}: {name} is {tuple(found)} in the checkpoint, needed is {tuple(wanted)}; it starts anew")


def heads_of(model: Model, missing: list[str] | None = None) -> list[str]:
    """Paths of the modules to train whole: task heads, and whatever the checkpoint had no weights for.

    A head is known by its place: in a model for a task other than language modelling, everything beside the backbone.
    """
    from torch import nn
    from transformers import PreTrainedModel

    from lora_kit.structure import within

    backbone = getattr(model, "base_model_prefix", "")
    heads: list[str] = []
    task = task_of(model)
    if task is not None and task not in GENERATING:
        for name, child in model.named_children():
            # T5 for question answering has its encoder and decoder beside the head, and no backbone around them
            body = name == backbone if hasattr(model, backbone) else isinstance(child, PreTrainedModel | nn.Embedding)
            if not body and any(True for _ in child.parameters()):
                heads.append(name)
    for path in missing or []:
        if path and not within(path, heads):
            heads.append(path)
    # PEFT finds what is trained whole by the end of its path: a namesake deep inside comes along
    namesakes = [path for path, _ in model.named_modules() if path.endswith(tuple(heads)) and not within(path, heads)]
    return heads + [path for path in namesakes if not within(path, [p for p in namesakes if p != path])]


def checkpoint(model: Model) -> None:
    """Switch gradient checkpointing on, as Trainer does."""
    # the name since transformers 5.23, which warns of the older one
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        switch({"use_reentrant": False})
    except TypeError:
        switch(gradient_checkpointing_kwargs={"use_reentrant": False})


def head_for(labels: Sequence[str]) -> dict[str, Any]:
    """The `model_kwargs` that give a classifier one output a label."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def tokenizer_of(model: "nn.Module | str") -> Any:
    """The tokenizer that lies where the model came from, or None."""
    import transformers

    path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError):
        return None
