"""8- and 4-bit bases by bitsandbytes: the config, and the conversion of a model that is already in memory.

What is quantized: every `nn.Linear` and `Conv1D` but the output head, heads that are trained whole, and what the
model's class keeps in float32 (T5's `wo`). It is the same whether the model is quantized while it is loaded or
afterwards, bit for bit.
"""

import re
from typing import TYPE_CHECKING, Any

from lora_kit.errors import MissingPackageError, OptionError, UnsupportedError, listing, nearest
from lora_kit.types import Model

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

WORDS = ("8bit", "4bit")


def resolve(quantization: Any) -> "BitsAndBytesConfig | None":
    """The config for `None`, `"8bit"`, `"4bit"` or a `BitsAndBytesConfig` (which is copied).

    `"4bit"` is NF4 with double quantization and bfloat16 compute (QLoRA, https://arxiv.org/abs/2305.14314), `"8bit"`
    is LLM.int8() with threshold 6.0 (https://arxiv.org/abs/2208.07339).
    """
    if quantization is None:
        return None
    if isinstance(quantization, str) and quantization not in WORDS:
        raise OptionError(
            f"unknown quantization {quantization!r}; accepted: None, {listing(map(repr, WORDS))} or a "
            f"transformers.BitsAndBytesConfig.{nearest(quantization, WORDS)}"
        )
    import copy
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(f"quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if not isinstance(quantization, BitsAndBytesConfig):
        raise OptionError(
            f"quantization is a {type(quantization).__name__}; accepted: None, {listing(map(repr, WORDS))} or a "
            "transformers.BitsAndBytesConfig."
        )
    if not (quantization.load_in_8bit or quantization.load_in_4bit):
        raise OptionError("the BitsAndBytesConfig asks for neither load_in_8bit=True nor load_in_4bit=True.")
    return copy.deepcopy(quantization)


def word(config: "BitsAndBytesConfig | None") -> str:
    """`"16bit"`, `"8bit"` or `"4bit"`."""
    if config is None:
        return "16bit"
    return "4bit" if config.load_in_4bit else "8bit"


def of(model: Model) -> str | None:
    """`"8bit"`, `"4bit"`, the name of another quantization, or None for plain weights."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8bit"
    names = {type(p).__name__ for p in model.parameters()}
    if "Params4bit" in names:
        return "4bit"
    if "Int8Params" in names:
        return "8bit"
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method)) if method is not None else None


def mark(skeleton: Model, stored: Any) -> None:
    """Note on a model without weights that its checkpoint is quantized, as its config's `quantization_config` says."""
    if not stored:
        return
    facts = stored if isinstance(stored, dict) else stored.to_dict()
    for flag in ("load_in_4bit", "load_in_8bit"):
        if facts.get(flag):
            setattr(skeleton, flag.replace("load_", "is_loaded_"), True)
    skeleton.quantization_method = facts.get("quant_method", "quantized")


def check(model: Model, config: "BitsAndBytesConfig | None") -> None:
    """Refuse to quantize what is quantized already."""
    now = of(model)
    if config is None or now is None:
        return
    raise UnsupportedError(
        f"quantization={word(config)!r} asked for a model that is already quantized ({now}). "
        "Leave quantization out to train on it as it is, or load the model without quantization."
    )


def refuse_quantized_heads(model: Model, heads: list[str]) -> None:
    """Raise if a head that must be trained is quantized, as transformers does to classifiers when it loads them."""
    for head in heads:
        if any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.get_submodule(head).parameters()):
            raise UnsupportedError(
                f"the head {head!r} is quantized ({of(model)}) and so cannot be trained. Load the model without "
                f"quantization and let adapt(..., quantization={of(model)!r}) do it: heads stay as they are."
            )


def choose(model: Model, heads: list[str]) -> dict[str, Model]:
    """Path → module for everything to quantize (the weights may be on `meta`)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from lora_kit import targets

    output = targets.output_embeddings(model)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    chosen = {}
    for path, module in model.named_modules():
        plain = type(module) in (nn.Linear, Conv1D)
        if not plain or module is output or targets.within(path, heads) or set(path.split(".")) & set(kept):
            continue
        chosen[path] = module
    if not chosen:
        raise UnsupportedError(f"{type(model).__name__} has no linear layer to quantize; leave quantization out.")
    return chosen


def for_loading(config: "BitsAndBytesConfig", skeleton: Model, heads: list[str]) -> "BitsAndBytesConfig":
    """The config with exactly the modules named that must stay as they are."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    chosen = choose(skeleton, heads)
    stay = [p for p, m in skeleton.named_modules() if isinstance(m, nn.Linear | Conv1D) and p not in chosen]
    # transformers reads these as regular expressions or endings; the anchors leave only the module itself
    own = list(config.llm_int8_skip_modules or [])
    config.llm_int8_skip_modules = own + [f"^{re.escape(path)}$" for path in stay]
    return config


def quantize_(model: Model, config: "BitsAndBytesConfig", heads: list[str]) -> Model:
    """Quantize a model in place, layer by layer: memory never exceeds the model plus one layer.

    Args:
        model: a model in memory, with plain weights.
        config: from `resolve`.
        heads: paths of modules that stay as they are.
    """
    from transformers.quantizers import AutoHfQuantizer

    skip = [re.compile(pattern) for pattern in config.llm_int8_skip_modules or ()]
    for path in list(choose(model, heads)):
        if any(pattern.match(path) or path.endswith(pattern.pattern) for pattern in skip):
            continue
        module = model.get_submodule(path)
        model.set_submodule(path, _quantized(module, config))
        del module
    # what transformers leaves behind when it quantizes while loading: PEFT and Trainer look for it
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    setattr(model, "is_loaded_in_4bit" if config.load_in_4bit else "is_loaded_in_8bit", True)
    if hasattr(model, "config"):
        model.config.quantization_config = config
    settle(model)
    return model


def _quantized(module: Model, config: "BitsAndBytesConfig") -> Model:
    """The quantized twin of one `nn.Linear` or `Conv1D`, on the same device."""
    import bitsandbytes as bnb
    import torch

    from lora_kit import targets

    out_features, in_features = targets.shape(module)
    weight = module.weight.data
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    has_bias = module.bias is not None
    with torch.device("meta"):
        if config.load_in_4bit:
            new = bnb.nn.Linear4bit(
                in_features,
                out_features,
                has_bias,
                config.bnb_4bit_compute_dtype,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
            )
        else:
            new = bnb.nn.Linear8bitLt(
                in_features,
                out_features,
                has_bias,
                has_fp16_weights=config.llm_int8_has_fp16_weight,
                threshold=config.llm_int8_threshold,
            )
    settings = dict(new.weight.__dict__)
    if config.load_in_4bit:
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings).to(weight.device)
    else:
        settings.pop("SCB", None)
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, **settings).to(weight.device)
    if has_bias:
        new.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
    new.source_cls = type(module)
    new.train(module.training)
    return new


def settle(model: Model) -> None:
    """Do now, on this instance, what bitsandbytes would do to 4-bit layers in the middle of training.

    Packing: on CPUs with AVX512-BF16 the weights are repacked at the first evaluation, and from then on a kernel
    without a gradient formula runs, in training too: gradients flow only around the quantized layers, without a
    warning. It is switched off. Biases: the first forward casts them to the compute dtype; they are cast here, so that
    training leaves every frozen tensor bit-identical.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None and module.compute_dtype is not None and not module.bias.is_meta:
            module.bias.data = module.bias.data.to(module.compute_dtype)


def quantized_bytes(model: Model) -> tuple[int, int]:
    """(bytes of quantized weights, bytes of all parameters)."""
    quantized = total = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size
        if type(parameter).__name__ in ("Params4bit", "Int8Params"):
            quantized += size
    return quantized, total
