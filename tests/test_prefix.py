"""Prefix tuning of whole models: checkpointing, generation, packing, loops, files, and every refusal."""

import copy
import inspect
import io
import json
import pickle
from contextlib import nullcontext

import architectures
import peft
import pytest
import tiny
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lora_kit import Prefix, adapt, attention, load, param_groups, save, training_defaults
from lora_kit.errors import AdapterMismatchError, AlreadyAdaptedError, OptionError, UnsupportedError
from lora_kit.memory.tracker import PeakBytes, resident_tensors

FAMILIES = ("llama", "gpt2", "bert", "t5")


def weight(model):
    return model.prompt_encoder["default"].embedding.weight


def logits(model, **batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def gradient(model, batch):
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    model(**batch).loss.backward()
    return weight(model).grad.clone()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def checkpoint(model, **options):
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch(options or None)


# --- checkpointing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_checkpointing_changes_no_gradient(family, order, reentrant):
    batch = tiny.batch(family)
    expected = gradient(adapt(without_dropout(tiny.build(family)), "prefix", init="random"), batch)
    base = without_dropout(tiny.build(family))
    if order == "before":
        checkpoint(base, use_reentrant=reentrant)
    model = adapt(base, "prefix", init="random")
    if order == "after":
        checkpoint(model, use_reentrant=reentrant)
    with torch.no_grad():
        weight(model).copy_(weight(adapt(without_dropout(tiny.build(family)), "prefix", init="random")))
    found = gradient(model, batch)
    fresh = adapt(without_dropout(tiny.build(family)), "prefix", init="random")
    with torch.no_grad():
        weight(fresh).copy_(weight(model))
    expected = gradient(fresh, batch)
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# --- attention


@pytest.mark.parametrize("family", FAMILIES)
def test_every_implementation_gives_the_same(family):
    """Eager, sdpa and the one that is switched to after adapt; in a model that compares their names, too."""
    batch = tiny.batch(family)
    model = adapt(tiny.build(family), "prefix")
    expected = logits(model, **batch)
    without = logits(model.get_base_model(), **batch)
    model.get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, **batch), expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, **batch), expected, atol=1e-3)
    torch.testing.assert_close(without, expected)  # the base that was handed in is the one inside


def test_written_by_hand_and_by_the_interface_agree(monkeypatch):
    """A Llama whose attention is only watched, as an older model's is, computes what the interface gives."""
    from lora_kit import routing

    batch = tiny.batch("llama")
    base = tiny.build("llama")
    base.config.num_key_value_heads = 4
    base = without_dropout(transformers.LlamaForCausalLM(base.config))
    through = adapt(copy.deepcopy(base), "prefix")
    monkeypatch.setattr(routing, "_asks_by_name", lambda cls: False)
    for implementation in ("sdpa", "eager"):
        other = copy.deepcopy(base)
        other.set_attn_implementation(implementation)
        watched = adapt(other, "prefix")
        assert all(site.watched for site in attention.find(copy.deepcopy(base)).sites)
        weight(watched).data.copy_(weight(through))
        torch.testing.assert_close(logits(watched, **batch), logits(through, **batch), rtol=0, atol=1e-5)
        assert gradient(watched, batch).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_rows_each_see_the_prefix(family):
    """Two sequences in a row, told apart by their positions, give what each gives alone."""
    model = adapt(tiny.build(family), "prefix")
    ids = torch.randint(4, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    alone = torch.cat([logits(model, input_ids=part) for part in (ids[:, :5], ids[:, 5:])], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_seen(left):
    model = adapt(tiny.build("llama"), "prefix")
    ids = torch.randint(4, tiny.VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(0))
    expected = logits(model, input_ids=ids)
    padding = torch.zeros(1, 4, dtype=torch.long)
    parts = (padding, ids) if left else (ids, padding)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)][:: 1 if left else -1], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, input_ids=torch.cat(parts, 1), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[mask.bool()], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases_train_a_float32_prefix(dtype):
    model = adapt(tiny.build("llama", dtype=dtype), "prefix")
    assert weight(model).dtype == torch.float32
    found = gradient(model, tiny.batch("llama"))
    assert found.dtype == torch.float32 and found.isfinite().all() and found.any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_compile(family):
    """One graph without a break, and the same numbers."""
    model = adapt(tiny.build(family), "prefix")
    batch = tiny.batch(family)
    del batch["labels"]
    expected = logits(model, **batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-5)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(**batch).logits.square().mean().backward()
        gradients.append(weight(model).grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_holds_no_more_than_lora_s(family):
    """Peak of live bytes, weights and optimizer states included, at an odd shape."""
    peaks = {}
    for method in ("prefix", "lora"):
        model = adapt(tiny.build(family), method)
        batch = tiny.batch(family, rows=5, length=37)
        optimizer = torch.optim.AdamW(param_groups(model))
        for _ in range(2):
            with PeakBytes("cpu", resident_tensors(model, optimizer)) as memory:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        peaks[method] = memory.peak
    assert peaks["prefix"] <= peaks["lora"], peaks


# --- generation

MODELS = {
    "llama": "causal-lm",
    "gemma3_text": "causal-lm",  # a sliding window of 8
    "deepseek_v3": "causal-lm",  # keys and values of two widths
    "gpt2": "causal-lm",
    "t5": "seq2seq-lm",
    "qwen3_next": "causal-lm",  # linear attention in most layers
}
NEW = 8


def generating(architecture, bits):
    model = architectures.recipe(architecture, MODELS[architecture]).build()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model = adapt(model, "prefix", num_virtual_tokens=4, init="random", quantization=bits).eval()
    model.generation_config.eos_token_id = None  # all rows go on to the end
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return model, {"input_ids": ids * mask, "attention_mask": mask}


def step_by_step(model, inputs, sequences=None, choose=None):
    """Full forwards without a cache, token by token: (the sequences, the logits of each new token)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    both = model.config.is_encoder_decoder
    out = torch.full((2, 1), model.config.decoder_start_token_id) if both else ids
    start, found = out.shape[1], []
    for step in range(NEW):
        with torch.no_grad():
            if both:
                output = model(**inputs, decoder_input_ids=out, use_cache=False)
            else:
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                output = model(input_ids=out, attention_mask=mask, position_ids=positions, use_cache=False)
        found.append(output.logits[:, -1].float())
        if sequences is not None:
            chosen = sequences[:, start + step]
        else:
            chosen = choose(found[-1]) if choose else found[-1].argmax(-1)
        out = torch.cat([out, chosen[:, None]], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    return out, torch.stack(found, 1)


@pytest.mark.parametrize("bits", [None, "8bit", "4bit"], ids=["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("architecture", MODELS)
def test_generate_is_step_by_step(architecture, bits):
    """With a cache and left padding, every token's logits are those of a full forward over what came before."""
    model, inputs = generating(architecture, bits)
    out = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    sequences, expected = step_by_step(model, inputs, out.sequences)
    found = torch.stack(out.logits, 1).float()
    # 4-bit bases compute in bfloat16, rows of 8-bit products are rounded to 255 steps: a last bit that differs before
    # that may round elsewhere. The base alone is as far from itself (measured: 0.03 and 0.15)
    close = {None: 3e-4, "4bit": 0.03, "8bit": 0.15}[bits] * expected.std()
    assert (found - expected).abs().max() <= close
    chosen = expected.gather(2, sequences[:, -NEW:, None])[..., 0]
    assert (chosen >= expected.amax(2) - 2 * close).all()
    if bits is None:
        assert torch.equal(sequences, step_by_step(model, inputs)[0])
    if not model.config.is_encoder_decoder and hasattr(out.past_key_values, "get_seq_length"):
        assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1  # no prefix in there
    with model.disable_adapter():
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    assert (torch.stack(plain.logits, 1)[:, 0] - found[:, 0]).abs().max() > 2 * close


@pytest.mark.parametrize("architecture", MODELS)
def test_sampling_and_beams(architecture):
    model, inputs = generating(architecture, None)
    torch.manual_seed(3)
    drawn = model.generate(**inputs, max_new_tokens=NEW, do_sample=True, top_k=0)
    torch.manual_seed(3)
    expected, _ = step_by_step(model, inputs, choose=lambda x: torch.multinomial(x.softmax(-1), 1)[:, 0])
    assert torch.equal(drawn, expected)
    beams = [
        model.generate(**inputs, max_new_tokens=NEW, num_beams=3, use_cache=cache, do_sample=False)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_caches(architecture, cache):
    model, inputs = generating(architecture, None)
    expected, _ = step_by_step(model, inputs)
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, cache_implementation=cache)
    assert torch.equal(found, expected)


# --- the start


def test_roles_of_an_encoder_decoder():
    """All three attentions by default, or those that are named; each alone changes what the model says."""
    batch = tiny.batch("t5")
    expected = logits(tiny.build("t5"), **batch)
    sizes = {}
    for chosen in ("encoder", "decoder", "cross", None):
        model = adapt(tiny.build("t5"), "prefix", attention=chosen)
        sizes[chosen] = weight(model).shape[1]
        assert not torch.allclose(logits(model, **batch), expected, atol=1e-4), chosen
        assert gradient(model, batch).any(0).all(), chosen
    assert sizes[None] == sizes["encoder"] + sizes["decoder"] + sizes["cross"]
    with pytest.raises(OptionError, match="attention must be some of decoder, encoder, cross, got 'self'"):
        Prefix(attention="self")
    with pytest.raises(
        OptionError, match=r"attention=\('encoder',\) is for encoder-decoders; LlamaForCausalLM is none"
    ):
        adapt(tiny.build("llama"), "prefix", attention="encoder")


@pytest.mark.parametrize("init", ["text", "random", "zero"])
def test_starts(init):
    model = adapt(tiny.build("llama"), "prefix", num_virtual_tokens=6, init=init)
    assert bool(weight(model).any()) == (init != "zero")
    assert gradient(model, tiny.batch("llama")).any()


def test_a_text_shorter_than_the_prefix_goes_round():
    model = adapt(tiny.build("gpt2"), "prefix", num_virtual_tokens=5, init_text=(7, 8))
    other = adapt(tiny.build("gpt2"), "prefix", num_virtual_tokens=5, init_text=(7, 8, 7, 8, 7))
    assert torch.equal(weight(model), weight(other))


def test_reparametrization_is_folded_when_saved(models, tmp_path):
    path = tiny.on_disk("llama", models)
    batch = tiny.batch("llama")
    start = adapt(path, "prefix", num_virtual_tokens=5)
    model = adapt(path, "prefix", num_virtual_tokens=5, reparametrization=12)
    torch.testing.assert_close(logits(model, **batch), logits(start, **batch), rtol=0, atol=0)
    names = {name.rpartition("default.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"seeds", "inner.weight", "inner.bias"} < names and "embedding.weight" not in names
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    expected = logits(model, **batch)
    folder = save(model, tmp_path / "saved")
    again = load(folder, path, train=True)
    torch.testing.assert_close(logits(again, **batch), expected, rtol=0, atol=1e-5)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        "prompt_encoder.default.embedding.weight"
    }
    plain = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(path), folder)
    torch.testing.assert_close(logits(plain, **batch), expected, rtol=0, atol=1e-5)


# --- the object


def test_it_stays_peft_s_own_object():
    base = tiny.build("llama")
    cls, before = type(base), set(vars(type(base)))
    model = adapt(base, "prefix", name="one")
    assert type(model) is peft.PeftModelForCausalLM and model.get_base_model() is base
    assert model.peft_config["one"].peft_type == "PREFIX_TUNING" and set(vars(cls)) == before
    other = tiny.build("llama")
    batch = tiny.batch("llama")
    with model.disable_adapter():  # another instance, and this one without its prefix, are as they were
        assert torch.equal(logits(model, **batch), logits(other, **batch))
    assert not torch.allclose(logits(model, **batch), logits(other, **batch), atol=1e-3)


def test_two_prefixes_in_one_model():
    model = adapt(tiny.build("llama"), "prefix", num_virtual_tokens=4)
    batch = tiny.batch("llama")
    first = logits(model, **batch)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    model.add_adapter("second", config)
    torch.testing.assert_close(logits(model, **batch), first)
    model.set_adapter("second")
    second = logits(model, **batch)
    assert not torch.allclose(second, first, atol=1e-3)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, **batch), first)


def test_copies_are_models_of_their_own():
    model = adapt(tiny.build("gpt2"), "prefix")
    batch = tiny.batch("gpt2")
    expected = logits(model, **batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(logits(other, **batch), expected)
        weight(other).data.zero_()
        assert not torch.allclose(logits(other, **batch), expected, atol=1e-3)
    torch.testing.assert_close(logits(model, **batch), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_disabled_is_the_base(family):
    model = adapt(tiny.build(family), "prefix")
    batch = tiny.batch(family)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-1))
    model(**batch).loss.backward()
    optimizer.step()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **batch), logits(tiny.build(family), **batch))


@pytest.mark.parametrize("family", ["llama", "bert", "bloom"])
def test_unload_gives_the_base_back(family):
    """Before it, the base cannot be adapted to something else: the prefix would be in it, and in no file."""
    base, batch = (build(family), {"input_ids": torch.tensor([[5, 6, 7]])}) if family == "bloom" else (None, None)
    base, batch = base or tiny.build(family), batch or tiny.batch(family)
    expected = logits(base, **batch)
    before = {path: set(vars(module)) for path, module in base.named_modules()}
    model = adapt(base, "prefix")
    assert not torch.allclose(logits(model, **batch), expected, atol=1e-4)
    with pytest.raises(AlreadyAdaptedError, match=r"model = model\.unload\(\)"):
        adapt(base, "lora")
    assert model.unload() is base
    assert torch.equal(logits(base, **batch), expected)
    after = {path: set(vars(module)) for path, module in base.named_modules()}
    # PEFT's own traces on the model, and a way to switch checkpointing on that copies what the embeddings give
    assert {path for path in after if after[path] != before.get(path)} <= {""}
    adapt(base, "lora", rank=2)


# --- files


def test_what_plain_peft_wrote_goes_into_attention(models, tmp_path):
    """So it can be trained on with checkpointing; where PEFT's positions cannot be had, it stays PEFT's and says so."""
    for family, inside in (("llama", True), ("gpt2", False)):
        path = tiny.on_disk(family, models)
        base = transformers.AutoModelForCausalLM.from_pretrained(path)
        plain = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        plain.save_pretrained(tmp_path / family)
        batch = tiny.batch(family)
        model = load(tmp_path / family, path, train=True)
        torch.testing.assert_close(logits(model, **batch), logits(plain, **batch), rtol=0, atol=1e-5)
        with nullcontext() if inside else pytest.raises(UnsupportedError, match="travels in the key/value cache"):
            checkpoint(model)
            assert gradient(model, batch).any()


def test_a_refused_file_leaves_the_base_alone(models, tmp_path):
    folder = save(adapt(tiny.on_disk("llama", models), "prefix"), tmp_path / "saved")
    wrong = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=160, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **tiny.IDS
        )
    )
    batch = tiny.batch("llama")
    expected = logits(wrong, **batch)
    with pytest.raises(
        AdapterMismatchError,
        match=r"keys and values of \(4, 8\) and \(4, 8\).*were trained for \(2, 16\) and \(2, 16\)",
    ):
        load(folder, wrong)
    assert torch.equal(logits(wrong, **batch), expected)
    assert not any("lora_kit" in name for module in wrong.modules() for name in vars(module))
    assert type(wrong.model.layers[0].self_attn.config) is transformers.LlamaConfig


def test_the_manifest_says_what_plain_peft_makes_of_it(tmp_path):
    said = {
        "llama": "equal",
        "gpt2": "absolute positions",
        "bert": "absolute positions",
        "t5": "an encoder-decoder",
    }
    if "position_bias" not in inspect.signature(sdpa_attention_forward).parameters:
        said["t5"] = "attention written out by hand"  # as in transformers 5.0
    for family, words in said.items():
        folder = save(adapt(tiny.build(family), "prefix"), tmp_path / family)
        found = json.loads((folder / "lora_kit.json").read_text())["prefix"]
        assert words in found["plain_peft"]
        assert found["attention"] == (["cross", "decoder", "encoder"] if family == "t5" else ["decoder"])


# --- loops


def rows(count=24):
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, tiny.VOCABULARY, (9,), generator=draw).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 9] * count, "labels": ids})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(tmp_path, checkpointing):
    model = adapt(tiny.build("llama"), "prefix")
    before, start = weight(model).detach().clone(), model.get_base_model().lm_head.weight.detach().clone()
    fields = transformers.TrainingArguments.__dataclass_fields__
    switch = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=0,
        save_steps=6, logging_steps=1, **{switch: checkpointing}, **training_defaults(model),
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    assert not torch.equal(weight(model), before) and torch.equal(model.get_base_model().lm_head.weight, start)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    # a checkpoint that the trainer wrote by itself is the prefix
    again = load(tmp_path / "checkpoint-6", tiny.build("llama"))
    batch = tiny.batch("llama")
    torch.testing.assert_close(logits(again, **batch), logits(model, **batch), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_trl_sft_trainer(tmp_path):
    """Its defaults switch checkpointing on."""
    from datasets import Dataset

    trl = pytest.importorskip("trl")
    model = adapt(tiny.build("llama"), "prefix")
    before = weight(model).detach().clone()
    texts = Dataset.from_dict({"text": [" ".join(f"w{(7 * i + j) % 40}" for j in range(9)) for i in range(24)]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, **training_defaults(model),
    )  # fmt: skip
    assert arguments.gradient_checkpointing
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=tiny.tokenizer())
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not torch.equal(weight(model), before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, "8bit", "4bit"], ids=["16bit", "8bit", "4bit"])
def test_a_bare_loop(family, bits):
    model = adapt(tiny.build(family), "prefix", quantization=bits)
    checkpoint(model)
    batch = tiny.batch(family)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-2))
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


# --- refusals


def build(architecture, task="causal-lm"):
    return architectures.recipe(architecture, task).build()


@pytest.mark.parametrize(
    ("architecture", "task", "says"),
    [
        ("mamba", "causal-lm", "has no attention that a prefix could be put into"),
        ("rwkv", "causal-lm", "has no attention that a prefix could be put into"),
        ("reformer", "causal-lm", "approximates attention, or computes it in blocks"),
        ("longformer", "classification", "approximates attention, or computes it in blocks"),
    ],
)
def test_models_without_a_place_for_it(architecture, task, says):
    model = build(architecture, task)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=rf"(?s){says}.*Use method='lora'"):
        adapt(model, "prefix")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_checkpoint_without_attention_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    build("mamba").save_pretrained(tmp_path)
    monkeypatch.setattr("lora_kit.base.load", lambda *a, **k: pytest.fail("the weights were loaded"))
    with pytest.raises(UnsupportedError, match="has no attention"):
        adapt(str(tmp_path), "prefix")


def test_hybrids_say_how_many_layers_have_attention(capsys):
    adapt(build("qwen3_next"), "prefix")
    said = capsys.readouterr().err
    assert "in each of 1 attentions (1 layers have none)" in said


def test_wrong_values():
    for options, says in (
        ({"reparametrization": 0}, "reparametrization must be an integer of at least 1"),
        ({"prefix_projection": True}, "Here it is called 'reparametrization'"),
        ({"init_text": "w1"}, "no tokenizer is known"),
        ({"init_text": (1, 99999)}, "99999"),
        ({"init_text": ["w1", "w2"]}, r"one text or a list of token ids, got \('w1', 'w2'\)"),
    ):
        model = tiny.build("llama")
        with pytest.raises(OptionError, match=says):
            adapt(model, "prefix", **options)
        assert all(p.requires_grad for p in model.parameters())
