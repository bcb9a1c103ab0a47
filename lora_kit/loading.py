"""Quantizing while a checkpoint is read: what transformers' loader does not know by itself.

transformers replaces `nn.Linear` and `Conv1D` by their names. Here the list is `quantization.choose`'s, subclasses and
stacks of experts included, and each weight is packed as soon as it is read: memory holds the packed model and one
weight.

The two quantizers are registered with transformers under names of their own (`lora_kit_4bit`, `lora_kit_8bit`), which
is transformers' way for others to bring one; nothing that is there is replaced.
"""

import copy
from collections import Counter
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from lora_kit import quantization, stacks
from lora_kit.types import Model


def config_for(config: Any, skeleton: Model, heads: list[str]) -> Any:
    """A copy of the bitsandbytes config that makes `from_pretrained` quantize what `quantization.choose` names."""
    choice = quantization.choose(skeleton, heads, config.llm_int8_skip_modules or ())
    holders = Counter(id(p.weight) for p in choice.linear)
    ours = copy.deepcopy(config)
    ours.quant_method = "lora_kit_4bit" if config.load_in_4bit else "lora_kit_8bit"
    # a weight that several layers share is tied after loading, and quantized then
    ours.lora_kit_linear = {p.path for p in choice.linear if holders[id(p.weight)] == 1}
    ours.lora_kit_stacks = {p.full_name for p in choice.stacks}
    return ours


class _Quantize(ConversionOps):
    """What is done to a weight between disk and model."""

    def __init__(self, quantizer: Any):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Model = None, **kwargs: Any) -> dict[str, Any]:
        config = self.quantizer.quantization_config
        made: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            if name in config.lora_kit_stacks:
                shape = (tuple(weight.shape), weight.dtype)
                made[name], scale = stacks.packed_form(weight, config)
                # transformers starts buffers that no file holds anew after loading: the scales wait until then
                self.quantizer.packed[name] = (stacks.Packed(*shape, 4 if config.load_in_4bit else 8), scale)
            else:
                made[name] = quantization.packed_weight(module, weight, config)
            module._is_hf_initialized = True
        return made


class _Walk:
    """The three places where transformers' bitsandbytes quantizers go by their own list, and here by ours."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Model, **kwargs: Any) -> None:
        self.packed: dict[str, tuple[stacks.Packed, torch.Tensor | None]] = {}
        config = self.quantization_config
        for path in config.lora_kit_linear:
            model.set_submodule(path, quantization.empty_layer(model.get_submodule(path), config))

    def param_needs_quantization(self, model: Model, param_name: str, **kwargs: Any) -> bool:
        config = self.quantization_config
        path, _, leaf = param_name.rpartition(".")
        return param_name in config.lora_kit_stacks or (leaf == "weight" and path in config.lora_kit_linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        for name, (packed, scale) in self.packed.items():
            path, _, leaf = name.rpartition(".")
            stacks.register(model.get_submodule(path), leaf, packed, scale)
        return model


class Quantizer4bit(_Walk, Bnb4BitHfQuantizer):
    """NF4 or FP4."""


class Quantizer8bit(_Walk, Bnb8BitHfQuantizer):
    """LLM.int8()."""


for _name, _class in {"lora_kit_4bit": Quantizer4bit, "lora_kit_8bit": Quantizer8bit}.items():
    if _name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_name)(_class)
