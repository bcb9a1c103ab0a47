"""Stacks of expert matrices, adapted and packed, against plain torch and against PEFT's own wrapper."""

import contextlib
import copy
import gc
import warnings

import architectures
import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from references import adapted_stack, int8_round_trip, nf4_round_trip

from lora_kit import adapt, load, merge, save, stacks
from lora_kit import quantization as bits
from lora_kit.errors import CannotMergeError, StorageError
from lora_kit.memory.tracker import PeakBytes

EXPERTS = ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "qwen2_moe"]


def build(architecture, task="causal-lm"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return architectures.recipe(architecture, task).build()


def batch(rows=3, length=11):
    """Odd shape, padding on both sides."""
    ids = torch.randint(60, 120, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def stir(model):
    """Adapters that do something: B starts at zero."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def gradients(model, weights=None):
    """(weighted sum of logits, gradient of every trained tensor): each logit pulls with another weight."""
    model.zero_grad()
    logits = model(**batch()).logits
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    total = (logits * pull).sum()
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def as_peft_has_them(model):
    """The slow twin: PEFT's own parametrization in place of ours."""
    for module in model.modules():
        if type(module) is stacks.AdaptedParameter:
            module.__class__ = ParamWrapper
    return model


@pytest.mark.parametrize("architecture", EXPERTS)
def test_against_pefts_own_wrapper(architecture):
    """Loss and every gradient, in float64, to 1e-10."""
    base = build(architecture).double()
    base.config._experts_implementation = "eager"  # the grouped product knows no float64
    model = stir(adapt(base, rank=4)).double().eval()
    assert any(type(m) is stacks.AdaptedParameter for m in model.modules())
    total, ours = gradients(model)
    slow_total, theirs = gradients(as_peft_has_them(model))
    torch.testing.assert_close(total, slow_total, rtol=1e-10, atol=1e-10)
    assert ours.keys() == theirs.keys() and any("experts" in n or "linear" in n for n in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_against_plain_torch(architecture):
    model = stir(adapt(build(architecture), rank=4))
    checked = 0
    for layer in model.modules():
        if not isinstance(layer, stacks.AdaptedParameter):
            continue
        weight = layer.get_base_layer()._parameters[layer.parameter_name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        out_first = layer._out_comes_first()  # PEFT from 0.19 on tells the layouts apart
        assert not out_first or architecture == "mixtral"
        wanted = adapted_stack(weight, a, b, 2.0, out_first=out_first)
        torch.testing.assert_close(layer._sum(weight, "default"), wanted, rtol=1e-6, atol=1e-6)
        wrong = adapted_stack(weight, a, b.roll(1, 1), 2.0, out_first=out_first)
        assert not torch.allclose(layer._sum(weight, "default"), wrong, rtol=1e-6, atol=1e-6)
        checked += 1
    assert checked == 4


@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_packed_values(base):
    """What stands in for a stack is its round trip through the published formats."""
    model = build("mixtral")
    owner = model.model.layers[0].mlp.experts
    weight = owner.gate_up_proj.detach().clone()
    config = bits.resolve(base)
    config.bnb_4bit_use_double_quant = False  # the reference keeps its scales in float32
    stacks.pack_(owner, "gate_up_proj", config)
    found = stacks.dense(owner, "gate_up_proj")
    wanted = nf4_round_trip(weight) if base == "4bit" else int8_round_trip(weight.flatten(0, 1)).view_as(weight)
    assert found.shape == weight.shape and found.dtype == weight.dtype and not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert owner._parameters["gate_up_proj"].numel() * 2 <= weight.numel() * (2 if base == "8bit" else 1)


@pytest.mark.parametrize("base", ["8bit", "4bit"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2_moe", "bert"])
def test_train_evaluate_train(architecture, base):
    """The gradients after an evaluation are those of plain float32 layers with the dequantized weights."""
    config = bits.resolve(base)
    config.bnb_4bit_compute_dtype = torch.float32
    model = stir(adapt(build(architecture), rank=4, quantization=config)).eval()  # without dropout
    first, before = gradients(model)
    with torch.no_grad():
        model(**batch())
    total, after = gradients(model)
    assert torch.equal(first, total) and all(torch.equal(before[name], after[name]) for name in before)

    if base == "8bit":  # its products are made of integers: no float32 twin agrees closely
        return
    twin = stir(adapt(dequantized(model, build(architecture)), rank=4)).eval()
    reference_total, reference = gradients(twin)
    assert reference.keys() == after.keys()
    torch.testing.assert_close(total, reference_total, rtol=1e-5, atol=1e-4)
    scale = max(g.abs().max() for g in reference.values())
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5 * scale, msg=name)

    # a wrong weight in one layer is seen
    with torch.no_grad():
        next(p for n, p in twin.named_parameters() if "base_layer" in n and p.dim() > 1).mul_(1.05)
    _, wrong = gradients(twin)
    apart = max((wrong[name] - reference[name]).abs().max() for name in wrong)
    assert apart > 1e-5 * scale


def dequantized(adapted, plain):
    """`plain` with the weights of a quantized model, as float32."""
    import bitsandbytes

    # the innermost module stands for its wrappers
    layers = {path.replace(".base_layer", ""): m for path, m in adapted.get_base_model().named_modules()}
    with torch.no_grad():
        for path, module in plain.named_modules():
            layer = layers[path]
            for name in module._parameters:
                target, source = module._parameters[name], layer._parameters.get(name)
                if target is None or source is None:
                    continue
                if stacks.is_packed(layer, name):
                    target.copy_(stacks.dense(layer, name))
                elif hasattr(source, "quant_state"):
                    value = bitsandbytes.functional.dequantize_4bit(source.data, source.quant_state)
                    target.copy_(value.T if type(module).__name__ == "Conv1D" else value)
                else:
                    target.copy_(source)
    return plain


@pytest.mark.parametrize("base", ["8bit", "4bit"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "falcon", "zamba", "deepseek_v3"])
def test_in_place_equals_loading(architecture, base, tmp_path):
    """Stacks (one file a matrix on disk), subclasses and shared weights come out bit for bit the same."""
    model = build(architecture)
    model.save_pretrained(tmp_path)
    loaded = adapt(str(tmp_path), rank=4, quantization=base).unload()
    in_memory = adapt(type(model).from_pretrained(tmp_path), rank=4, quantization=base).unload()
    a, b = dict(loaded.named_parameters()), dict(in_memory.named_parameters())
    assert a.keys() == b.keys()
    assert sum(not p.is_floating_point() for p in a.values()) >= 6
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    for one, other in zip(loaded.modules(), in_memory.modules(), strict=True):
        for name in one.__dict__.get("lora_kit_packed", {}):
            assert torch.equal(stacks.dense(one, name), stacks.dense(other, name))
    logits = [m.eval()(**batch()).logits for m in (loaded, in_memory)]
    assert torch.equal(*logits)
    assert loaded.config.quantization_config.quant_method == "bitsandbytes"


def moe(layers=3):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_peak_while_quantizing_experts(base):
    """Never more than the 16-bit model and one layer, by live tensor bytes."""
    model = moe()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = 4 * 3 * 128 * 256 * 2
    gc.collect()
    with PeakBytes("cpu", model.parameters()) as memory:
        bits.quantize_(model, bits.resolve(base), [])
    assert size <= memory.peak <= size + layer, (memory.peak - size) / layer
    quantized, total = bits.quantized_bytes(model)
    assert total < (0.35 if base == "4bit" else 0.6) * size and quantized > 0.9 * 0.25 * size


def test_peak_while_loading_in_4_bit(tmp_path, monkeypatch):
    """The 16-bit model is never whole in memory."""
    moe(layers=6).save_pretrained(tmp_path)
    size = sum(p.numel() * p.element_size() for p in moe(layers=6).parameters())
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where allocations are counted
    gc.collect()
    with PeakBytes("cpu", []) as memory:
        adapt(str(tmp_path), rank=4, quantization="4bit", target_modules=["q_proj"])
    assert 0.25 * size < memory.peak < 0.75 * size, memory.peak / size


@pytest.mark.parametrize("lean_step", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("base", [None, "8bit", "4bit"])
def test_dense_stacks_are_not_kept_for_the_backward_pass(base, adapted, lean_step, monkeypatch):
    """A step on more layers needs their packed stacks more, not their dense ones; and the gradients are the same."""

    def step(kept):
        torch.manual_seed(0)
        model = moe(layers=5).float()
        targets = None if adapted else ["q_proj"]
        model = stir(adapt(model, rank=4, quantization=base, target_modules=targets, lean=lean_step)).train()
        with monkeypatch.context() as patch:
            if kept:
                patch.setattr(stacks, "not_kept", lambda *_: contextlib.nullcontext())
            gc.collect()
            with PeakBytes("cpu", [*model.parameters(), *model.buffers()]) as memory:
                _, found = gradients(model)
        return memory.peak, {name: gradient.clone() for name, gradient in found.items()}

    lean, gradient = step(kept=False)
    plain, wanted = step(kept=True)
    stack = 4 * 3 * 128 * 256 * 4
    # the lean step makes no sum of weight and update at all
    layers = 5 if (adapted and not lean_step) or base else 0
    assert lean <= plain - (layers - 2) * stack, (plain - lean) / stack
    for name in wanted:
        torch.testing.assert_close(gradient[name], wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def test_8_bit_inputs_of_four_dimensions():
    """Latent attention feeds (batch, heads, seq, hidden); the result is that of the rows one after the other."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    bits.quantize_(model, bits.resolve("8bit"), [])
    x = torch.randn(2, 3, 5, 64)
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(model(x), model(x.view(30, 64)).view(2, 3, 5, 48), rtol=0, atol=0)


def trained(model, steps=3, rate=2e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen2_moe", "mixtral", "gpt_oss"])
def test_plain_peft_reads_the_files(architecture, tmp_path):
    """Also where PEFT would send a dense layer's name to the experts."""
    model = trained(adapt(build(architecture), rank=4))
    expected = model(**batch()).logits
    save(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(build(architecture), tmp_path).eval()
    torch.testing.assert_close(plain(**batch()).logits, expected, rtol=0, atol=1e-5)
    ours = load(tmp_path, build(architecture))
    torch.testing.assert_close(ours(**batch()).logits, expected, rtol=0, atol=1e-6)
    kinds = [{(type(m).__module__, type(m).__name__) for m in some.modules()} for some in (ours, model)]
    assert kinds[0] == kinds[1], "linear layers stay modules"
    again = load(tmp_path, build(architecture), train=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("architecture", ["zamba", "zamba2"])
def test_one_adapter_a_shared_weight(architecture, tmp_path):
    """Layers that share a weight share its adapter, are saved in full, and are merged once."""
    model = trained(adapt(build(architecture), rank=4))
    shared = {}
    for module in model.modules():
        if hasattr(module, "lora_A"):
            shared.setdefault(module.get_base_layer().weight.data_ptr(), []).append(module)
    groups = [layers for layers in shared.values() if len(layers) > 1]
    assert groups and all(m.lora_A["default"] is layers[0].lora_A["default"] for layers in groups for m in layers)
    expected = model(**batch()).logits.detach()
    save(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter", build(architecture), train=True)
    torch.testing.assert_close(again.eval()(**batch()).logits, expected, rtol=0, atol=1e-6)
    assert sum(p.requires_grad for p in again.parameters()) == sum(p.requires_grad for p in model.parameters())
    merged = merge(model, tmp_path / "merged")
    assert merged.drift < 1e-5
    whole = type(build(architecture)).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(whole(**batch()).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(**batch()).logits, expected, rtol=0, atol=1e-4)


def test_a_merge_that_cannot_be_right(tmp_path):
    """PEFT gives layers with one weight an adapter each: no merged weight fits both."""
    base = build("zamba")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    stir(model).save_pretrained(tmp_path / "theirs")
    adapted = load(tmp_path / "theirs", build("zamba"))
    with pytest.raises(CannotMergeError, match="share one weight in the base but carry different adapters"):
        merge(adapted, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_no_merge_into_packed_experts():
    model = adapt(build("mixtral"), rank=4, quantization="4bit", target_modules=["down_proj"])
    with pytest.raises(CannotMergeError, match=r"'down_proj' is quantized.*lora_kit\.merge"):
        model.merge_and_unload()


def test_a_quantized_moe_merges_into_its_16_bit_base(tmp_path):
    path = tmp_path / "base"
    build("mixtral").save_pretrained(path)
    model = trained(adapt(str(path), rank=4, quantization="4bit"))
    result = merge(model, tmp_path / "merged")
    assert result.drift < 1e-5 < result.effect


@pytest.mark.parametrize("base", [None, "8bit", "4bit"])
def test_copies_are_whole(base):
    """A deep copy computes the same and is independent: shared adapters, packed stacks and hooks come along."""
    for architecture in ("mixtral", "zamba"):
        model = stir(adapt(build(architecture), rank=4, quantization=base)).eval()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            expected = model(**batch()).logits
            assert torch.equal(twin(**batch()).logits, expected)
            for name, parameter in twin.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
            assert not torch.equal(twin(**batch()).logits, expected)
            assert torch.equal(model(**batch()).logits, expected)
        assert len(list(twin.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("base", [None, "8bit", "4bit"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_checkpointing_changes_no_gradient(architecture, base):
    """The recomputation stops early, by an exception; what stood in for the stacks is taken away all the same."""
    model = stir(adapt(build(architecture), rank=4, quantization=base)).train()
    total, plain = gradients(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again, recomputed = gradients(model)
    assert torch.equal(total, again)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)
    for module in model.modules():
        assert not {"gate_up_proj", "down_proj"} & set(vars(module)), "a dense stack was left in memory"


def test_quantized_experts_have_no_file(tmp_path):
    """transformers would write the bytes without what it takes to read them."""
    model = adapt(build("mixtral"), rank=4, quantization="4bit")
    with pytest.raises(StorageError, match=r"holds quantized experts.*lora_kit\.save"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    save(model, tmp_path / "adapter")


def test_experts_that_a_checkpoint_holds_quantized(capsys):
    """gpt-oss in MXFP4: what cannot carry an adapter is named, with its share."""
    model = build("gpt_oss")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            count, rows, columns = getattr(experts, name).shape
            delattr(experts, name)
            blocks = torch.zeros(count, rows, columns // 32, 16, dtype=torch.uint8)
            experts.register_parameter(f"{name}_blocks", torch.nn.Parameter(blocks, requires_grad=False))
    adapt(model, rank=4)
    assert "4 left out: experts in a quantized format that takes no adapter (8" in capsys.readouterr().err


def test_batch_statistics_stay_the_bases():
    """Frozen batch normalization neither moves nor switches over when the model is put in training mode."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(16, 32)
            self.norm = torch.nn.BatchNorm1d(32)
            self.last = torch.nn.Linear(32, 16)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    base = Small()
    x = torch.randn(9, 16)
    expected = copy.deepcopy(base).eval()(x)
    model = adapt(base, rank=4).train()
    torch.testing.assert_close(model(x), expected)
    assert model.base_model.model.norm.num_batches_tracked == 0 and not model.base_model.model.norm.training
    assert model.base_model.model.training


def test_endings_catch_nothing_else():
    """A path that ends like a chosen one is not adapted along with it."""

    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x)

    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)
            self.inner = Router()

        def forward(self, x):
            return self.inner(self.layer(x))

    model = adapt(Nested(), rank=4)
    assert [n for n, _ in model.named_parameters() if "lora_A" in n] == ["base_model.model.layer.lora_A.default.weight"]
