"""adapt × save × load over methods, bases and families; and every refusal, with its text."""

import json
import os
import re
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from references import lora_linear

from lora_kit import METHODS, Full, LoRA, Prefix, adapt, load, param_groups, save
from lora_kit.errors import AlreadyAdaptedError, LoraKitError, OptionError, TargetError, UnsupportedError

CELLS = [
    (method, base)
    for method, kind in METHODS.items()
    for base in (None, "8bit", "4bit")
    if kind.quantizable or not base
]
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
}
ids = [f"{method}-{base or '16bit'}" for method, base in CELLS]


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def loss(model, batch):
    model.eval()  # without dropout
    with torch.no_grad():
        return model(**batch).loss.item()


def checkpoint(model):
    """Switch on the recomputation of activations, under its name of this transformers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def snapshot(model):
    """Name → copy of every tensor, quantized storage included."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model, batch, steps=2):
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("method", "base"), CELLS, ids=ids)
def test_train_save_load(family, method, base, models, tmp_path):
    """Two steps move what should move and nothing else; the files bring back the same logits, here and in PEFT."""
    path = tiny.on_disk(family, models)
    batch = tiny.batch(family)
    model = adapt(path, method, quantization=base)
    before = snapshot(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train(model, batch)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainable, (moved - trainable, trainable - moved)
    assert trainable, "nothing is trained"

    expected = logits(model, batch)
    folder = save(model, tmp_path / "saved")
    ours = load(folder, None if method == "full" else path, quantization=base)
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=1e-6)

    auto = getattr(transformers, AUTO[family])
    if method == "full":
        plain = auto.from_pretrained(folder)
    else:
        # our own load must agree with PEFT on a base that PEFT's users would load
        plain = peft.PeftModel.from_pretrained(adaptable_base(auto, path, base, family), folder)
    if method == "prefix":
        said = json.loads((folder / "lora_kit.json").read_text())["prefix"]["plain_peft"]
        assert (said == "equal") == (family == "llama")
        if said != "equal":
            # positions that PEFT would move, attention that it does not reach: it stops instead of computing otherwise
            with pytest.raises((RuntimeError, ValueError)):
                logits(plain, batch)
            return
    # a prefix in the cache and one in attention are not rounded in the same place
    close = {"prefix": {None: 1e-5, "4bit": 1e-5, "8bit": 2e-2}[base]}.get(method, 1e-6)
    torch.testing.assert_close(logits(plain, batch), expected, rtol=0, atol=close)


def adaptable_base(auto, path, base, family):
    config = {
        None: None,
        "8bit": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier", "lm_head"]),
        "4bit": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier", "lm_head"],
        ),
    }[base]
    model = auto.from_pretrained(path, **({"quantization_config": config} if config else {}))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # the packed kernel computes with other rounding
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("method", "base"), CELLS, ids=ids)
def test_a_loaded_model_is_adapted_in_place(family, method, base):
    """The object handed in is the one inside, trained the same way as from a path."""
    model = tiny.build(family)
    adapted = adapt(model, method, quantization=base)
    assert (adapted if method == "full" else adapted.get_base_model()) is model
    batch = tiny.batch(family)
    start = loss(adapted, batch)
    train(adapted, batch, steps=12)
    assert loss(adapted, batch) < start - 0.02


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(("method", "base"), [cell for cell in CELLS if cell[0] != "full"])
def test_training_goes_on_after_load(family, method, base, models, tmp_path):
    path = tiny.on_disk(family, models)
    batch = tiny.batch(family)
    model = adapt(path, method, quantization=base)
    train(model, batch, steps=1)
    folder = save(model, tmp_path / "saved")
    again = load(folder, path, train=True, quantization=base)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    start = loss(again, batch)
    train(again, batch, steps=6)
    assert loss(again, batch) < start


def test_lora_is_the_equation():
    """The adapted layer computes W x + (alpha / rank) B A x; a wrong scale is seen."""
    model = adapt(tiny.build("llama"), "lora", rank=4, alpha=6)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(2, 5, 64)
    expected = lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, 6 / 4)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    wrong = lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, 6 / 5)
    assert not torch.allclose(layer(x), wrong, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_starts_from_the_base(family):
    model = tiny.build(family)
    batch = tiny.batch(family)
    expected = logits(model, batch)
    assert torch.equal(logits(adapt(model, "lora"), batch), expected)


def test_prefix_starts_from_the_states_of_the_text(models):
    """The prefix is what the model's own cache holds after reading the text."""
    path = tiny.on_disk("llama", models)
    model = adapt(path, Prefix(num_virtual_tokens=5, init_text="w1 w2 w3 w4 w5"))
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([tiny.tokenizer()("w1 w2 w3 w4 w5")["input_ids"]])
    cache = base(ids, use_cache=True).past_key_values
    found = model.prompt_encoder["default"].embedding.weight.view(5, 2, 2, 2, 16)  # tokens, layers, k/v, heads, size
    for index, layer in enumerate(cache.layers):
        torch.testing.assert_close(found[:, index, 0].transpose(0, 1), layer.keys[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[:, index, 1].transpose(0, 1), layer.values[0], rtol=0, atol=1e-6)
    # and so the model goes on as if it had read it
    rest = torch.tensor([[20, 21, 22]])
    expected = base(torch.cat([ids, rest], 1)).logits[:, 5:]
    torch.testing.assert_close(logits(model, {"input_ids": rest}), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["random", "zero"])
def test_prefix_other_starts(init):
    model = adapt(tiny.build("llama"), "prefix", num_virtual_tokens=3, init=init)
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.shape == (3, 2 * 2 * 2 * 16)
    assert (weight.abs().sum() == 0) == (init == "zero")


def test_new_head_is_trained_and_saved_whatever_its_name(models, tmp_path):
    """A checkpoint without a head gets one that is trained whole, stays unquantized, and comes back in plain PEFT."""
    path = tmp_path / "backbone"
    tiny.build("bert").bert.save_pretrained(path)
    for base in (None, "8bit", "4bit"):
        model = adapt(str(path), "lora", task="classification", quantization=base, model_kwargs={"num_labels": 4})
        head = model.get_base_model().classifier
        assert type(head.modules_to_save["default"]) is torch.nn.Linear
        assert head.modules_to_save["default"].weight.requires_grad
        assert head.modules_to_save["default"].out_features == 4
        batch = tiny.batch("bert")
        train(model, batch)
        expected = logits(model, batch)
        folder = save(model, tmp_path / f"saved-{base}")
        again = load(folder, str(path), quantization=base)
        torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-6)


class HeadOfAnotherName(transformers.BertPreTrainedModel):
    """A classifier whose head PEFT would not find."""

    base_model_prefix = "bert"

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.verdict = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.verdict(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        loss = torch.nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


HeadOfAnotherName.__name__ = "BertForSequenceClassification"  # the task is read off the class


def test_head_of_another_name():
    model = adapt(HeadOfAnotherName(tiny.bert().config), "lora")
    assert model.peft_config["default"].modules_to_save[:1] == ["verdict"] or "verdict" in (
        model.peft_config["default"].modules_to_save
    )
    assert any("verdict" in name and p.requires_grad for name, p in model.named_parameters())


def test_sixteen_bit_base_stays_sixteen_bit():
    """Adapters and heads are float32, the frozen base keeps its dtype, and the head trains without autocast."""
    model = adapt(tiny.build("bert", dtype=torch.bfloat16), "lora")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    train(model, tiny.batch("bert"))


def test_full_trains_float32_and_says_so(capfd):
    model = adapt(tiny.build("llama", dtype=torch.bfloat16), "full")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "cast from bfloat16 to float32" in capfd.readouterr().err
    kept = adapt(tiny.build("llama", dtype=torch.bfloat16), Full(weights="keep"))
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert "round away" in capfd.readouterr().err


def test_report_is_one_line(capfd):
    adapt(tiny.build("bert"), "lora", quantization="4bit", rank=4)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lora_kit:")]
    assert len(lines) == 1
    assert re.search(
        r"lora \(r 4\): 13 of 13 linear layers \(100\.0 % of matmul weights\); trained whole: 'classifier'; "
        r"[\d,]+ of [\d,]+ parameters trainable \([\d.]+ %\); weights [\d.]+ MB, float32, [\d.]+ MB of them 4bit",
        lines[0],
    )


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=3, target_modules=["q_proj"]),
        peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_any_peft_config(config, tmp_path, models):
    path = tiny.on_disk("llama", models)
    given = dict(config.__dict__)
    model = adapt(path, config)
    assert config.__dict__ == given, "the caller's config was changed"
    batch = tiny.batch("llama")
    train(model, batch)
    expected = logits(model, batch)
    again = load(save(model, tmp_path / "saved"), path)
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-6)


def test_adapter_name(tmp_path, models):
    path = tiny.on_disk("llama", models)
    model = adapt(path, "lora", name="french")
    assert list(model.peft_config) == ["french"]
    train(model, tiny.batch("llama"))
    folder = save(model, tmp_path / "saved")
    assert (folder / "adapter_config.json").exists()
    torch.testing.assert_close(
        logits(load(folder, path), tiny.batch("llama")), logits(model, tiny.batch("llama")), rtol=0, atol=1e-6
    )


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(error, *phrases, model=None, **call):
    """The call raises the error with these phrases, before the model was touched."""
    model = tiny.build("llama") if model is None else model
    touch = model if isinstance(model, torch.nn.Module) else None
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in touch.named_parameters()} if touch else {}
    modules = [type(m) for m in touch.modules()] if touch else []
    method = call.pop("method", "lora")
    with pytest.raises(error) as caught:
        adapt(model, method, **call)
    assert isinstance(caught.value, LoraKitError)
    for phrase in phrases:
        assert phrase in str(caught.value), str(caught.value)
    if touch:
        assert [type(m) for m in touch.modules()] == modules
        for name, parameter in touch.named_parameters():
            assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert not hasattr(touch, "peft_config")


def test_unknown_method():
    refused(OptionError, "unknown method 'loar'", "full, lora, prefix", "Did you mean 'lora'?", method="loar")


def test_unknown_option():
    refused(OptionError, "unknown option 'rnk' for method 'lora'", "rank, alpha, dropout", "'rank'?", rnk=8)
    refused(OptionError, "unknown option 'rank' for method 'prefix'", "num_virtual_tokens", method="prefix", rank=8)


def test_names_of_other_libraries():
    refused(OptionError, "unknown option 'r'", "called 'rank'", r=8)
    refused(OptionError, "unknown option 'load_in_4bit'", "called quantization='4bit'", load_in_4bit=True)
    refused(OptionError, "target_modules=['q_proj']", target_modules="q_proj")


def test_device_that_is_not_there():
    refused(OptionError, "unknown device 'gpu'", "cuda:0", device="gpu")
    if not torch.cuda.is_available():
        refused(OptionError, "device='cuda', but this torch sees no CUDA device", device="cuda")


@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_a_head_that_transformers_quantized(base, models):
    """Loading a classifier quantized with transformers' defaults quantizes its head; that is said, not trained on."""
    config = transformers.BitsAndBytesConfig(**{f"load_in_{base}": True})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny.on_disk("bert", models), quantization_config=config
    )
    refused(UnsupportedError, f"the head 'classifier' is quantized ({base})", f"quantization='{base}'", model=model)


def test_options_beside_an_object():
    refused(OptionError, "options rank given beside LoRA", "inside the object", method=LoRA(), rank=8)
    refused(OptionError, "class LoRA", "LoRA()", method=LoRA)
    refused(OptionError, "method is a int", "peft.PeftConfig", method=3)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 8.0}, "rank must be an integer"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_impossible_values(options, phrase):
    refused(OptionError, phrase, **options)


def test_prefix_values():
    refused(OptionError, "num_virtual_tokens", method="prefix", num_virtual_tokens=0)
    refused(OptionError, "'text', 'random' or 'zero'", method="prefix", init="ones")
    refused(OptionError, "init_text needs init='text'", method="prefix", init="zero", init_text="w1")


def test_rank_larger_than_the_matrix():
    refused(OptionError, "rank 65 is larger than the matrix of", "accepted there: 1 to", rank=65)
    refused(OptionError, "rank 40", "'model.layers.0.self_attn.k_proj', 32 × 64", rank=40, target_modules=["k_proj"])


def test_target_that_matches_nothing():
    refused(
        TargetError,
        "target_modules names 'v_prj'",
        "Did you mean 'v_proj'?",
        "q_proj (2)",
        target_modules=["q_proj", "v_prj"],
    )
    refused(TargetError, "matches the path of no linear layer", target_modules=r".*\.query")
    refused(TargetError, "not a regular expression", target_modules="(")
    refused(TargetError, "'key_proj'", method=peft.LoraConfig(target_modules=["q_proj", "key_proj"]))
    refused(TargetError, "'lm_haed'", method=peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_haed"]))


def test_already_adapted():
    model = adapt(tiny.build("llama"), "lora", rank=2)
    before = snapshot(model)
    with pytest.raises(AlreadyAdaptedError, match=r"already carries an adapter \('default'\).*unload\(\)"):
        adapt(model, "lora")
    with pytest.raises(AlreadyAdaptedError):
        adapt(model.get_base_model(), "prefix")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_full_on_a_quantized_base(models):
    path = tiny.on_disk("llama", models)
    refused(
        UnsupportedError, "method 'full' with quantization='4bit'", "method='lora'", method="full", quantization="4bit"
    )
    quantized = adapt(path, "lora", quantization="4bit").unload()
    refused(UnsupportedError, "method 'full' on a 4bit base", "without quantization", model=quantized, method="full")
    refused(
        UnsupportedError, "quantization='8bit' asked", "already quantized (4bit)", model=quantized, quantization="8bit"
    )


def test_a_checkpoint_that_is_stored_quantized(models, tmp_path):
    """What its config says is known before its weights are loaded; LoRA trains on it as it is."""
    adapt(tiny.on_disk("llama", models), "lora", quantization="4bit").unload().save_pretrained(tmp_path / "stored")
    path = str(tmp_path / "stored")
    refused(UnsupportedError, "method 'full' on a 4bit base", model=path, method="full")
    refused(UnsupportedError, "quantization='8bit' asked", "already quantized (4bit)", model=path, quantization="8bit")
    model = adapt(path, "lora")
    assert model.lora_kit_record.quantization == "4bit"
    train(model, tiny.batch("llama"))


def test_unknown_quantization_and_task(models):
    refused(OptionError, "unknown quantization '4-bit'", "'8bit', '4bit'", "Did you mean '4bit'?", quantization="4-bit")
    refused(OptionError, "quantization is a int", quantization=4)
    refused(OptionError, "neither load_in_8bit", quantization=transformers.BitsAndBytesConfig())
    path = tiny.on_disk("llama", models)
    refused(OptionError, "unknown task 'chat'", "causal-lm", model=path, task="chat")
    refused(OptionError, "unknown dtype 'fp16'", "float16", model=path, dtype="fp16")


def test_a_config_that_checks_itself(tmp_path):
    """What transformers' own validation raises comes as one clear error."""
    path = Path(tiny.on_disk("llama", tmp_path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(OptionError, match=r"transformers refuses the config of .*not a multiple of the number of att"):
        adapt(str(path))


def test_what_is_no_model(tmp_path):
    refused(OptionError, "no model found for 'no/such-model'", model="no/such-model")
    refused(OptionError, "has no config.json", model=str(tmp_path))
    refused(OptionError, "model is a dict", model={})
    with torch.device("meta"):
        empty = tiny.llama()
    with pytest.raises(UnsupportedError, match="meta"):
        adapt(empty)


def test_a_backbone_needs_a_task(tmp_path):
    tiny.build("bert").bert.save_pretrained(tmp_path / "backbone")
    refused(OptionError, "BertModel without a head", "Pass task=", model=str(tmp_path / "backbone"))


def test_options_for_loading_beside_a_loaded_model():
    refused(
        OptionError, "task='causal-lm' is for a model that is still to be loaded", "Leave task out", task="causal-lm"
    )
    refused(OptionError, "dtype='bfloat16'", dtype="bfloat16")


def test_prefix_where_it_cannot_work():
    class NoAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

    refused(UnsupportedError, "prefix tuning needs a model of transformers", model=NoAttention(), method="prefix")


def test_a_prefix_from_a_peft_config_refuses_checkpointing():
    """It travels in the cache, which a checkpointed layer drops: an error at once, not a run that trains nothing."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=4)
    model = tiny.build("llama")
    checkpoint(model)
    refused(UnsupportedError, "travels in the key/value cache", "method='prefix'", model=model, method=config)
    model = adapt(tiny.build("llama"), config)
    for switch in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(model, switch):
            with pytest.raises(UnsupportedError, match="gradient checkpointing"):
                getattr(model, switch)()
    checkpoint(tiny.build("llama"))  # another instance of the class is not touched


def test_lora_with_checkpointing_before_or_after():
    """Gradients with checkpointing equal those without."""
    batch = tiny.batch("llama")
    grads = []
    for order in ("none", "before", "after"):
        model = tiny.build("llama")
        if order == "before":
            checkpoint(model)
        torch.manual_seed(3)
        model = adapt(model, "lora")
        if order == "after":
            checkpoint(model)
        train(model, batch, steps=1)
        model(**batch).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_a_module_of_ones_own():
    """LoRA works on any module with linear layers, in the user's own loop."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(32, 32), torch.nn.Linear(32, 20)

        def forward(self, x):
            return self.two(self.one(x).relu())

    model = adapt(Net(), "lora", rank=4)
    model(torch.randn(3, 32)).sum().backward()
    assert sum(p.requires_grad for p in model.parameters()) == 4


def test_a_compiled_model_is_refused():
    with pytest.raises(UnsupportedError, match="compiled"):
        adapt(torch.compile(tiny.build("llama")))


def test_environment_is_left_alone(models):
    before = dict(os.environ)
    adapt(tiny.on_disk("llama", models), "lora", quantization="4bit")
    assert dict(os.environ) == before
