"""8- and 4-bit bases by bitsandbytes: the config, and the conversion of a model that is already in memory.

What is quantized: every linear map (`structure.py`) and every stack of experts but the output head, heads that are
trained whole, routers, maps too small to gain, and what the model's class keeps in float32 (T5's `wo`) or reads around
the layer. It is the same whether the model is quantized while it is loaded or afterwards, bit for bit.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_kit import structure
from lora_kit.errors import MissingPackageError, OptionError, UnsupportedError, listing, nearest
from lora_kit.structure import Part
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch
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


def try_out(config: "BitsAndBytesConfig | None", device: str) -> None:
    """Quantize and unpack one small matrix on a device before gigabytes are loaded for it.

    Raises:
        UnsupportedError: bitsandbytes has no working kernels there.
    """
    if config is None:
        return
    try:
        _round_trip(word(config), device)
    except Exception as error:  # a missing library shows as whatever its loader raises
        import importlib.metadata

        import torch

        raise UnsupportedError(
            f"bitsandbytes {importlib.metadata.version('bitsandbytes')} cannot quantize to {word(config)} on {device}: "
            f"{' '.join(str(error).split())[:200]} (torch {torch.__version__}, CUDA {torch.version.cuda}). Nothing was "
            "loaded. pip install -U bitsandbytes, or leave quantization out."
        ) from None


@functools.lru_cache
def _round_trip(bits: str, device: str) -> None:
    import torch
    from bitsandbytes import functional

    matrix = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    if bits == "4bit":
        functional.dequantize_4bit(*functional.quantize_4bit(matrix, quant_type="nf4"))
    else:
        functional.int8_vectorwise_quant(matrix.to(torch.bfloat16 if matrix.is_cpu else torch.float16))


def refuse_quantized_heads(model: Model, heads: list[str]) -> None:
    """Raise if a head that must be trained is quantized, as transformers does to classifiers when it loads them."""
    for head in heads:
        if any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.get_submodule(head).parameters()):
            raise UnsupportedError(
                f"the head {head!r} is quantized ({of(model)}) and so cannot be trained. Load the model without "
                f"quantization and let adapt(..., quantization={of(model)!r}) do it: heads stay as they are."
            )


SMALLEST = 32
"""Maps with fewer inputs or outputs than this stay as they are: gates and the like, where nothing is gained."""


@dataclass(frozen=True)
class Choice:
    """What to quantize, and what stays and why."""

    linear: tuple[Part, ...]
    stacks: tuple[Part, ...]
    """Stacks of experts, and weights of layers with a forward of their own: packed where they are."""
    skipped: dict[str, str]
    """Full name of a weight → reason."""
    parts: tuple[Part, ...]

    def left_out(self) -> str:
        """`"3.1 % of matmul weights stay: 2 smaller than 32, 4 routers"`, or nothing."""
        staying = [p for p in self.parts if p.full_name in self.skipped]
        if not staying:
            return ""
        share = 100 * sum(p.entries for p in staying) / sum(p.entries for p in self.parts)
        counts = Counter(self.skipped[p.full_name] for p in staying)
        return f"{share:.1f} % of matmul weights stay: " + ", ".join(f"{n} {reason}" for reason, n in counts.items())


def choose(model: Model, heads: list[str], skip: Iterable[str] = ()) -> Choice:
    """What to quantize (the weights may be on `meta`); `skip` are patterns of a `BitsAndBytesConfig`."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(pattern) for pattern in skip]
    parts = tuple(p for p in structure.survey(model, heads) if p.reason not in (structure.OUTPUT, structure.HEAD))
    skipped: dict[str, str] = {}
    for part in parts:
        parent, _, leaf = part.path.rpartition(".")
        if part.kind == "other":
            skipped[part.full_name] = part.reason or ""
        elif type(part.module).__name__ == "Conv1d":
            skipped[part.full_name] = "convolutions of width 1"
        elif part.reason == structure.ROUTER:
            skipped[part.full_name] = part.reason
        elif set(part.path.split(".")) & kept:
            skipped[part.full_name] = "kept in float32 by the model's class"
        elif part.kind != "stack" and structure.reads_weight(model.get_submodule(parent), leaf, attributes=True):
            skipped[part.full_name] = structure.READ
        elif min(part.rows, part.columns) < SMALLEST:
            skipped[part.full_name] = f"smaller than {SMALLEST}"
        elif any(pattern.match(part.path) or part.path.endswith(pattern.pattern) for pattern in patterns):
            skipped[part.full_name] = "in llm_int8_skip_modules"
    left = [p for p in parts if p.full_name not in skipped]
    if not left:
        raise UnsupportedError(
            f"{type(model).__name__} has no linear layer to quantize that is at least {SMALLEST} × {SMALLEST}; "
            "leave quantization out."
        )
    return Choice(
        tuple(p for p in left if p.kind == "linear"), tuple(p for p in left if p.kind != "linear"), skipped, parts
    )


def quantize_(model: Model, config: "BitsAndBytesConfig", heads: list[str]) -> Model:
    """Quantize in place, layer by layer, what is not quantized yet: memory never exceeds the model plus one layer.

    Args:
        model: a model in memory, with plain weights.
        config: from `resolve`.
        heads: paths of modules that stay as they are.
    """
    from transformers.quantizers import AutoHfQuantizer

    from lora_kit import stacks

    structure.hold_still(model)
    choice = choose(model, heads, config.llm_int8_skip_modules or ())
    shared: dict[int, Model] = {}
    holders = Counter(id(p.weight) for p in choice.linear)
    todo = [(p.path, id(p.weight)) for p in choice.linear if not is_quantized(p.module)]
    stacked = [(p.module, p.parameter) for p in choice.stacks if not stacks.is_packed(p.module, p.parameter)]
    del choice  # it holds the modules, whose weights are to go one by one
    for path, weight in todo:
        module = model.get_submodule(path)
        new = _quantized(module, config, shared.get(weight))
        if holders[weight] > 1:
            shared.setdefault(weight, new)
        model.set_submodule(path, new)
        del module, new
    for owner, name in stacked:
        stacks.pack_(owner, name, config)
    if any(stacks.packed_names(module) for module in model.modules()) and hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(stacks.refuse_to_save, model)
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


def is_quantized(module: Model) -> bool:
    return any(cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__)


def _quantized(module: Model, config: "BitsAndBytesConfig", twin: Model = None) -> Model:
    """The quantized twin of one linear layer or `Conv1D`, on the same device.

    `twin` is a quantized layer whose weight was this one's too: its bytes are used again.
    """
    import bitsandbytes as bnb
    import torch

    new = empty_layer(module, config)
    if twin is None:
        new.weight = packed_weight(new, module.weight.data, config)
    elif config.load_in_4bit:
        new.weight = twin.weight
    else:
        held = twin.weight
        new.weight = bnb.nn.Int8Params(held.data, requires_grad=False, CB=held.CB, SCB=held.SCB)
    if module.bias is not None:
        new.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
    new.train(module.training)
    return new


def empty_layer(module: Model, config: "BitsAndBytesConfig") -> Model:
    """bitsandbytes' layer for a linear layer or `Conv1D`, on `meta`."""
    import bitsandbytes as bnb
    import torch

    out_features, in_features = structure.shape(module)
    has_bias = getattr(module, "bias", None) is not None
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
    new.source_cls = type(module)
    return new.requires_grad_(False)


def packed_weight(layer: Model, weight: "torch.Tensor", config: "BitsAndBytesConfig") -> "torch.nn.Parameter":
    """The quantized parameter of bitsandbytes' empty `layer`, from the plain weight of the layer it stands for."""
    import bitsandbytes as bnb

    if layer.source_cls.__name__ == "Conv1D":
        weight = weight.T
    if weight.is_meta:
        from lora_kit import weightless

        return weightless.four_bit(weight, config) if config.load_in_4bit else weightless.eight_bit(weight)
    settings = dict(layer.weight.__dict__)
    if config.load_in_4bit:
        return bnb.nn.Params4bit(weight, requires_grad=False, **settings).to(weight.device)
    settings.pop("SCB", None)
    return bnb.nn.Int8Params(weight.cpu(), requires_grad=False, **settings).to(weight.device)


def settle(model: Model) -> None:
    """Do now, on this instance, what bitsandbytes would do to quantized layers in the middle of training, or fail to.

    Packing: on CPUs with AVX512-BF16 4-bit weights are repacked at the first evaluation, and from then on a kernel
    without a gradient formula runs, in training too: gradients flow only around the quantized layers, without a
    warning. It is switched off. Biases: the first forward casts them to the compute dtype; they are cast here, so that
    training leaves every frozen tensor bit-identical. Shapes: the 8-bit product in evaluation knows inputs of up to
    three dimensions; more (latent attention has four) are flattened on the way in.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None and module.compute_dtype is not None and not module.bias.is_meta:
                module.bias.data = module.bias.data.to(module.compute_dtype)
        elif is_quantized(module) and hasattr(module, "state") and "lora_kit_flattens" not in module.__dict__:
            module.__dict__["lora_kit_flattens"] = None
            module.register_forward_pre_hook(_flatten)
            module.register_forward_hook(_unflatten, always_call=True)


def _flatten(module: Model, inputs: tuple) -> tuple | None:
    x = inputs[0]
    if x.dim() <= 3:
        return None
    module.__dict__["lora_kit_flattens"] = x.shape[:-1]
    return (x.flatten(0, -2), *inputs[1:])


def _unflatten(module: Model, inputs: tuple, output: Any) -> Any:
    lead = module.__dict__["lora_kit_flattens"]
    module.__dict__["lora_kit_flattens"] = None
    return output if lead is None or output is None else output.unflatten(0, lead)


def staying(model: Model, heads: list[str]) -> Choice:
    """What of the matmul weights of a quantized model is not quantized, and why."""
    from lora_kit import stacks

    parts = tuple(p for p in structure.survey(model, heads) if p.reason not in (structure.OUTPUT, structure.HEAD))
    plain = [p for p in parts if not (is_quantized(p.module) or stacks.is_packed(p.module, p.parameter))]
    try:
        reasons = choose(model, heads).skipped
    except UnsupportedError:
        reasons = {}
    skipped = {p.full_name: reasons.get(p.full_name, "as the model was loaded") for p in plain}
    return Choice((), (), skipped, parts)


def quantized_bytes(model: Model) -> tuple[int, int]:
    """(bytes of quantized weights, bytes of all parameters)."""
    quantized = total = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size
        if type(parameter).__name__ in ("Params4bit", "Int8Params") or not parameter.is_floating_point():
            quantized += size
    return quantized, total
