"""Files that others can read, refusals that leave nothing half done, merges whose drift is known."""

import json

import peft
import pytest
import tiny
import torch
import transformers

from lora_kit import adapt, load, merge, param_groups, save
from lora_kit.errors import AdapterMismatchError, CannotMergeError, OptionError, StorageError


def trained(path_or_model, method="lora", steps=3, **options):
    family = "bert" if "bert" in str(type(path_or_model)).lower() + str(path_or_model)[:200].lower() else "llama"
    model = adapt(path_or_model, method, **options)
    optimizer = torch.optim.AdamW(param_groups(model, lr=2e-2))
    for _ in range(steps):
        model(**tiny.batch(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def adapter(models, tmp_path):
    """(folder of a saved LoRA adapter, path of its base)"""
    path = tiny.on_disk("llama", models)
    return save(trained(path), tmp_path / "adapter"), path


def test_files_and_manifest(adapter):
    folder, path = adapter
    names = {file.name for file in folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lora_kit.json"}
    facts = json.loads((folder / "lora_kit.json").read_text())
    assert facts["method"] == "lora" and facts["base"] == path and facts["task"] == "causal-lm"
    assert facts["options"]["rank"] == 16
    assert set(facts["files"]) == names - {"lora_kit.json"}
    assert not list(folder.parent.glob(".*writing*")), "the staging folder was left behind"


def test_saving_leaves_other_files_and_the_model_alone(models, tmp_path):
    model = trained(tiny.on_disk("llama", models))
    (tmp_path / "mine.txt").write_text("mine")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    save(model, tmp_path)
    save(model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert not model.peft_config["default"].inference_mode


def test_plain_peft_folder_loads_here(models, tmp_path):
    """A folder that plain PEFT wrote has no manifest and loads all the same, to use and to go on training."""
    path = tiny.on_disk("llama", models)
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    plain = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    plain.save_pretrained(tmp_path)
    batch = tiny.batch("llama")
    torch.testing.assert_close(logits(load(tmp_path, path), batch), logits(plain, batch), rtol=0, atol=1e-5)
    again = load(tmp_path, path, train=True)
    assert again.prompt_encoder["default"].embedding.weight.requires_grad


def test_base_can_be_a_model_a_path_or_recorded(adapter):
    folder, path = adapter
    batch = tiny.batch("llama")
    expected = logits(load(folder, path), batch)
    assert torch.equal(logits(load(folder), batch), expected)
    own = transformers.AutoModelForCausalLM.from_pretrained(path)
    loaded = load(folder, own)
    assert loaded.get_base_model() is own
    assert torch.equal(logits(loaded, batch), expected)


def test_labels_come_back(models, tmp_path):
    path = tmp_path / "backbone"
    tiny.build("bert").bert.save_pretrained(path)
    names = {0: "bad", 1: "so-so", 2: "good", 3: "great"}
    model = adapt(str(path), task="classification", model_kwargs={"id2label": names})
    folder = save(model, tmp_path / "saved")
    again = load(folder, path)
    assert again.config.id2label == names and again.config.label2id["great"] == 3


def test_a_changed_file_is_refused(adapter):
    folder, path = adapter
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"adapter_model\.safetensors does not match its recorded SHA-256"):
        load(folder, path)
    file.unlink()
    with pytest.raises(StorageError, match=r"is missing, but lora_kit\.json lists it"):
        load(folder, path)


def test_a_truncated_file_without_a_manifest(adapter):
    folder, path = adapter
    (folder / "lora_kit.json").unlink()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"adapter_model\.safetensors cannot be read"):
        load(folder, path)


def test_an_adapter_of_another_base(adapter):
    """Names and shapes are checked before the first copy, and the base can be used for something else."""
    folder, _ = adapter
    config = tiny.llama().config
    config.num_hidden_layers = 1
    small = transformers.LlamaForCausalLM(config)
    before = {name: p.clone() for name, p in small.named_parameters()}
    with pytest.raises(AdapterMismatchError, match=r"14 of 14 tensors in .* fit this model; without a place here: "):
        load(folder, small, allow_other_base=True)
    assert {name for name, _ in small.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    adapt(small, "lora")

    config = tiny.llama().config
    config.intermediate_size = 96
    with pytest.raises(AdapterMismatchError, match="of another shape: "):
        load(folder, transformers.LlamaForCausalLM(config), allow_other_base=True)


def test_what_is_no_saved_model(tmp_path, adapter):
    folder, path = adapter
    with pytest.raises(StorageError, match="is no folder"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match=r"neither adapter_config\.json nor config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(OptionError, match="needs no base"):
        load(path, path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    (folder / "lora_kit.json").unlink()
    with pytest.raises(StorageError, match="pickled adapter"):
        load(folder, path)
    with pytest.raises(StorageError, match="is a file"):
        save(load(path), folder / "adapter_config.json")


def test_an_adapter_is_no_base(adapter):
    from lora_kit.errors import AlreadyAdaptedError

    with pytest.raises(AlreadyAdaptedError, match=r"is an adapter, not a base model.*train=True"):
        adapt(str(adapter[0]))


def test_full_model_round_trip(models, tmp_path):
    path = tiny.on_disk("llama", models)
    folder = save(trained(path, "full"), tmp_path / "full")
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    again = load(folder, train=True)
    assert all(p.requires_grad for p in again.parameters()) and again.training
    assert not any(p.requires_grad for p in load(folder).parameters())
    with pytest.raises(OptionError, match="quantized weights cannot be trained"):
        load(folder, train=True, quantization="4bit")
    load(folder, quantization="4bit")


# --- merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("given", ["model", "folder"])
def test_merge_equals_the_adapter(given, dora, models, tmp_path):
    """The merged model is plain transformers' and gives the adapter's logits; the adapted model is untouched."""
    path = tiny.on_disk("llama", models)
    model = trained(path, dora=dora)
    batch = tiny.batch("llama")
    expected = logits(model, batch)
    source = model if given == "model" else save(model, tmp_path / "adapter")
    report = merge(source, tmp_path / "merged", **({} if given == "model" else {"base": path}))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=2e-5)
    assert report.dtype == "float32" and report.drift < 1e-5 < report.effect
    assert torch.equal(logits(model, batch), expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_merge_into_sixteen_bit_rounds_once_and_measures(models, tmp_path, capfd):
    path = tiny.on_disk("llama", models, dtype=torch.bfloat16)
    model = trained(path)
    report = merge(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16 and report.dtype == "bfloat16"
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
    expected = (layer.base_layer.weight.float() + delta).bfloat16()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected)
    assert 0 < report.drift < 0.2 * report.effect
    assert "of the adapter's effect" in capfd.readouterr().err


@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_merge_goes_to_the_sixteen_bit_base(base, models, tmp_path):
    """An adapter trained on a quantized base is added to the 16-bit weights, not to the quantized ones."""
    path = tiny.on_disk("llama", models)
    model = trained(path, quantization=base)
    merge(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(path)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
    torch.testing.assert_close(
        merged.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight + delta
    )
    assert not hasattr(merged.config, "quantization_config")


def test_merge_keeps_the_trained_head(models, tmp_path):
    path = tiny.on_disk("bert", models)
    model = adapt(path, "lora", quantization="4bit")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].bias.add_(7)
    merge(model, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    head = model.get_base_model().classifier.modules_to_save["default"]
    torch.testing.assert_close(merged.classifier.bias, head.bias)


def test_going_on_with_a_16_bit_model_trains_float32(models, tmp_path):
    path = tiny.on_disk("llama", models, dtype=torch.bfloat16)
    assert {p.dtype for p in load(path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(path, train=True).parameters()} == {torch.float32}
    kept = save(adapt(path, "full", weights="keep"), tmp_path)
    assert {p.dtype for p in load(kept, train=True).parameters()} == {torch.bfloat16}


def test_a_whole_model_that_does_not_fit_its_config(models, tmp_path):
    folder = tmp_path / "whole"
    tiny.build("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for change, pattern in (
        ({"num_hidden_layers": 1}, r"no place for 9 tensors \(model\.layers\.1"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000, and the files beside it have 21 tensors"),
        ({"vocab_size": 10**9}, r"describes 128,\d+,\d+,?\d* parameters, the files beside it have"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, r"cannot make a model of"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(StorageError, match=pattern):
            load(folder)


def test_merge_of_a_full_model_goes_back_to_the_base_dtype(models, tmp_path):
    path = tiny.on_disk("llama", models, dtype=torch.bfloat16)
    report = merge(trained(path, "full"), tmp_path / "merged")
    assert report.dtype == "bfloat16" and report.effect is None and report.drift > 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_merge_refusals(models, tmp_path):
    path = tiny.on_disk("llama", models)
    prefix = trained(path, "prefix")
    for source in (prefix, save(prefix, tmp_path / "prefix")):
        with pytest.raises(CannotMergeError, match=r"a prefix cannot be merged.*load"):
            merge(source, tmp_path / "merged")
    homeless = trained(tiny.build("llama"), quantization="4bit")
    with pytest.raises(CannotMergeError, match=r"base is in 4bit and its 16-bit weights are not at hand.*base="):
        merge(homeless, tmp_path / "merged")
    merge(homeless, tmp_path / "merged", base=tiny.build("llama"))
    quantized = adapt(path, "lora", quantization="4bit").unload()
    with pytest.raises(CannotMergeError, match="the base given is in 4bit"):
        merge(homeless, tmp_path / "merged", base=quantized)
