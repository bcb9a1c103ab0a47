"""In place and while loading give the same bits; what stays plain stays plain; gradients survive an evaluation."""

import copy
import gc

import pytest
import tiny
import torch
import transformers
from references import int8_round_trip, nf4_round_trip

from lora_kit import adapt, param_groups
from lora_kit import quantization as bits
from lora_kit.base import heads_of
from lora_kit.memory.tracker import PeakBytes


def frozen(model):
    """Every tensor of the base: parameters by their path, and the constants of quantized ones."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found |= {
                f"{name}.absmax": state.absmax,
                f"{name}.nested": state.state2.absmax,
                f"{name}.offset": state.offset,
            }
        scb = getattr(parameter, "SCB", None)
        if scb is not None:
            found[f"{name}.SCB"] = scb
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_in_place_equals_loading(family, base, dtype, models):
    """The same weights, quantized in memory and while loading, are bit-identical, constants and all."""
    path = tiny.on_disk(family, models, dtype=dtype)
    loaded = adapt(path, "lora", quantization=base).unload()
    in_memory = type(loaded).from_pretrained(path)
    in_memory = adapt(in_memory, "lora", quantization=base).unload()
    a, b = frozen(loaded), frozen(in_memory)
    assert a.keys() == b.keys()
    quantized = [name for name in a if name.endswith((".absmax", ".SCB"))]
    assert len(quantized) >= 8
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_what_stays_plain(family, base):
    """Embeddings, output heads and task heads keep their dtype; everything else that is linear is quantized."""
    model = adapt(tiny.build(family), "lora", quantization=base).unload()
    plain = {name for name, p in model.named_parameters() if p.is_floating_point() and p.dim() == 2}
    kept = ("embed", "shared", "wte", "wpe", "lm_head", "classifier", "relative_attention_bias", ".wo.")
    assert all(any(word in name for word in kept) for name in plain), plain
    if family == "bert":
        assert "classifier.modules_to_save.default.weight" in plain or "classifier.weight" in plain


def test_nf4_is_nf4():
    """The weights after a round trip are those of the published 16 values and blocks of 64."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=False))
    weight = layer[0].weight.detach().clone()
    config = bits.resolve("4bit")
    config.bnb_4bit_use_double_quant = False  # the reference keeps its scales in float32
    bits.quantize_(layer, config, [])
    import bitsandbytes

    found = bitsandbytes.functional.dequantize_4bit(layer[0].weight.data, layer[0].weight.quant_state)
    torch.testing.assert_close(found, nf4_round_trip(weight), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, nf4_round_trip(weight, block=32), rtol=1e-6, atol=1e-6)


def test_int8_is_absmax_by_row():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    weight = layer[0].weight.detach().half().float()  # bitsandbytes reads 8-bit weights through float16
    bits.quantize_(layer, bits.resolve("8bit"), [])
    step = layer[0].weight.SCB.view(-1, 1) / 127
    difference = (layer[0].weight.data.float() * step - int8_round_trip(weight)).abs() / step
    # a value halfway between two steps may go either way
    assert difference.max() < 1.01 and (difference > 0.01).float().mean() < 0.005
    by_column = (layer[0].weight.data.float() * step - int8_round_trip(weight.T).T).abs() / step
    assert (by_column > 0.01).float().mean() > 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradients_after_an_evaluation(family):
    """Train, evaluate, train: the gradients are those of a model that was never evaluated."""
    batch = tiny.batch(family)

    def gradients(evaluate):
        torch.manual_seed(0)
        model = adapt(tiny.build(family), "lora", quantization="4bit")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(**batch)
            model.train()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for fresh, after in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(fresh, after)


def test_biases_do_not_move():
    """The cast that bitsandbytes makes at the first forward has been made before training."""
    model = adapt(tiny.build("bert"), "lora", quantization="4bit")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    model(**tiny.batch("bert")).loss.backward()
    torch.optim.AdamW(param_groups(model)).step()
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name


def test_peak_while_quantizing():
    """Never more than the 16-bit model and one layer, by live tensor bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = 256 * 512 * 2
    gc.collect()
    with PeakBytes("cpu", model.parameters()) as memory:
        bits.quantize_(model, bits.resolve("4bit"), heads_of(model))
    assert size < memory.peak <= size + layer, (memory.peak - size) / layer
    quantized, total = bits.quantized_bytes(model)
    assert quantized < 0.27 * size and total < 0.35 * size


def test_a_config_of_ones_own():
    """A BitsAndBytesConfig is obeyed, its skip list included, and not changed."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["down_proj"]
    )
    given = copy.deepcopy(config.to_dict())
    model = adapt(tiny.build("llama"), "lora", quantization=config).unload()
    assert config.to_dict() == given
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert model.model.layers[0].mlp.up_proj.weight.quant_type == "fp4"


def test_trainer_sees_a_quantized_model(models):
    """What transformers and PEFT look for on a model that was loaded quantized is there after quantizing in place."""
    loaded = adapt(tiny.on_disk("llama", models), "lora", quantization="8bit").get_base_model()
    in_place = adapt(tiny.build("llama"), "lora", quantization="8bit").get_base_model()
    for name in ("is_quantized", "is_loaded_in_8bit", "quantization_method"):
        assert getattr(in_place, name) == getattr(loaded, name)
    assert in_place.hf_quantizer.is_trainable
    assert in_place.config.quantization_config.load_in_8bit
