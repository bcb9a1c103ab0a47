"""What goes wrong for people who fine-tune, one test each: here it comes out right, or in one clear error.

Named after the failures that users of today's tools report. `refused` keeps every message, and the last test asks of
each that it says what happened, the number or name that proves it, and the line to write instead.

Out of reach here, or in part: 28, a base whose only weights are pickles is read by transformers, what is tested is the
planned peak of loading; 39 and 40, a missing CUDA library and a second device are simulated, since there is no GPU; 41
and 42, vLLM and llama.cpp are not run, their rules are from their sources.
"""

import json
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_kit import LoRA, adapt, finetune, guard, load, merge, param_groups, plan, save, verify
from lora_kit.base import checkpoint
from lora_kit.errors import (
    AdapterMismatchError,
    AlreadyAdaptedError,
    CannotMergeError,
    LoraKitError,
    NonFiniteError,
    OptionError,
    OutOfMemoryError,
    ResumeError,
    StorageError,
    TargetError,
    UnsupportedError,
    WrongBaseError,
)
from lora_kit.storage import manifest
from lora_kit.storage.serving import check_serving
from lora_kit.training import data
from lora_kit.training.batching import Collator

ROOT = Path(__file__).parents[1]
MESSAGES = {}
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
RUN = {"epochs": 1, "batch_size": 4, "max_length": 16, "test_rows": 2, "save_every": 2, "rank": 2}
RUN["training_arguments"] = {"disable_tqdm": True}


def questions(count):
    return Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(count)])


def questions_read():
    return data.read(questions(8), test=None, train_rows=None, test_rows=1, seed=0)


@contextmanager
def refused(kind, pattern, request_name):
    """The block must raise this error with this text; the message is kept for the last test."""
    with pytest.raises(kind, match=pattern) as caught:
        yield
    assert isinstance(caught.value, LoraKitError)
    MESSAGES[f"{request_name} {len(MESSAGES)}"] = str(caught.value)


@pytest.fixture
def clearly(request):
    return lambda kind, pattern: refused(kind, pattern, request.node.name)


def train(model, batch, steps=3, lr=2e-2):
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr))
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.fixture
def saved(models, tmp_path):
    """(folder of a trained adapter, path of its base, a batch, the adapter's logits)"""
    path = tiny.on_disk("llama", models)
    batch = tiny.batch("llama")
    model = train(adapt(path, rank=4), batch)
    return save(model, tmp_path / "adapter"), path, batch, logits(model, batch)


def rewrite(folder, change=None, config=None, keep_manifest=False):
    """Change an adapter's tensors or config as another tool would, without our manifest."""
    if change is not None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    if config is not None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if not keep_manifest:
        (folder / "lora_kit.json").unlink(missing_ok=True)


# --- wrong or silent results ------------------------------------------------------------------------------------------


def test_01_an_adapter_loaded_onto_nothing(saved, clearly):
    """A renamed part of every key: refused with the `rename` that mends it, which then gives the adapter's logits."""
    folder, path, batch, expected = saved
    rewrite(folder, lambda t: {k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()})
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with clearly(AdapterMismatchError, r"0 of 28 tensors .* rename=\{'language_model\.': ''\}.*Nothing was loaded"):
        load(folder, base)
    assert {n: type(m) for n, m in base.named_modules()} == {
        n: type(m) for n, m in tiny.build("llama").named_modules()
    } and all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert torch.equal(logits(load(folder, base, rename={"language_model.": ""}), batch), expected)
    with clearly(OptionError, r"rename: none of 28 tensors has 'languagemodel\.'"):
        load(folder, path, rename={"languagemodel.": ""})


def test_01_a_refused_load_leaves_a_base_unquantized(saved, clearly):
    """Quantizing cannot be taken back, so what does not fit is found before."""
    folder, _, _, _ = saved
    config = tiny.llama().config
    config.num_hidden_layers = 1
    small = transformers.LlamaForCausalLM(config)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with clearly(AdapterMismatchError, r"14 of 14 tensors .*without a place here"):
        load(folder, small, quantization="4bit", allow_other_base=True)
    assert {name: type(value) for name, value in small.named_parameters()} == dict.fromkeys(before, torch.nn.Parameter)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    fitting = load(folder, tiny.build("llama"), quantization="4bit")
    assert sum(type(p).__name__ == "Params4bit" for p in fitting.parameters()) == 14


def test_01_half_a_file_does_not_fit(saved, clearly):
    folder, path, _, _ = saved
    rewrite(folder, lambda t: {k: v for k, v in t.items() if ".1." not in k})
    with clearly(AdapterMismatchError, r"14 of 28 tensors .*missing: .*layers\.1"):
        load(folder, path)


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_02_an_adapter_of_another_base(saved, tmp_path, quantization, clearly):
    """Told apart by files at any number of bits, by values in memory; copies and other dtypes are the same base."""
    folder, path, _, _ = saved
    other = tiny.build("llama", seed=7)
    other.save_pretrained(tmp_path / "other")
    with clearly(WrongBaseError, r"was trained on .*fingerprints are \w{8} and \w{8}.*allow_other_base=True"):
        load(folder, tmp_path / "other", quantization=quantization)
    with clearly(WrongBaseError, r"\d+ of 21 sampled tensors differ"):
        load(folder, other)
    moved = load(folder, tmp_path / "other", quantization=quantization, allow_other_base=True)
    load(save(moved, tmp_path / "again"), tmp_path / "other", quantization=quantization)
    copy = tmp_path / "moved"
    transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(copy, max_shard_size="100KB")
    load(folder, copy, quantization=quantization)
    load(folder, path, quantization=quantization, dtype="bfloat16")


def test_02_a_fine_tuned_base_is_another(saved, tmp_path, clearly, capfd):
    """A change of one matrix shows in the files at 4 bit; where nothing can tell, that is said and not "ok"."""
    folder, path, _, _ = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    model.save_pretrained(tmp_path / "tuned")
    with clearly(WrongBaseError, "fingerprints"):
        load(folder, tmp_path / "tuned", quantization="4bit")
    homeless = transformers.AutoModelForCausalLM.from_pretrained(path)
    homeless.config._name_or_path = ""
    capfd.readouterr()
    quantized = adapt(homeless, quantization="4bit").unload()
    load(folder, quantized)
    assert "cannot tell whether" in capfd.readouterr().err


def test_03_nan_is_neither_saved_nor_loaded(saved, clearly):
    folder, path, batch, expected = saved
    model = load(folder, path, train=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = torch.nan
    with clearly(StorageError, r"nothing was saved: .* NaN or infinite values in 1 of 28 tensors"):
        save(model, folder)
    assert torch.equal(logits(load(folder, path), batch), expected), "the good save is still there"

    def spoil(tensors):
        tensors[next(iter(tensors))][0, 0] = torch.inf
        return tensors

    rewrite(folder, spoil)
    with clearly(StorageError, "NaN or infinite values in 1 of 28 tensors"):
        load(folder, path)


def test_03_nan_stops_before_the_step(models, tmp_path, clearly):
    """In Trainer, where it is logged as "loss 0": no step is taken, the module is named, the last good state saved."""
    path = tiny.on_disk("llama", models)
    rows = questions(24)
    weights = {}

    class Poison(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                weights.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
                model.get_base_model().model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan

    with clearly(NonFiniteError, r"step 4: loss is nan; .*layers\.1\.mlp\.up_proj.*not taken.*saved in"):
        finetune(path, rows, output=tmp_path, callbacks=[Poison()], **RUN)
    stopped = load_file(tmp_path / "stopped" / "adapter_model.safetensors")
    assert len(stopped) == len(weights) == 28
    assert all(torch.equal(stopped[name.replace(".default", "")], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"'v_prj'.*Did you mean 'v_proj'"),
        ({"rank": 4096, "target_modules": ["q_proj"]}, r"rank.*4,?096"),
        ({"alpha": 0}, r"alpha must be above 0"),
        ({"layers_to_transform": [0, 99]}, r"unknown option 'layers_to_transform'"),
    ],
)
def test_04_targets_that_are_partly_wrong(options, pattern, clearly):
    with clearly((TargetError, OptionError), pattern):
        adapt(tiny.build("llama"), **options)


def test_04_the_coverage_is_said(capfd):
    adapt(tiny.build("llama"), target_modules=["q_proj"])
    assert re.search(r"2 of 14 linear layers \([\d.]+ % of matmul weights\)", capfd.readouterr().err)


def test_05_a_vision_tower_is_left_alone():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    for where, towers in ((None, {"language_model"}), ("vision", {"vision_tower", "multi_modal_projector"})):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=63))
        adapted = adapt(model, rank=2, **({} if where is None else {"where": where}))
        found = {n for n, p in adapted.named_parameters() if p.requires_grad}
        assert found and all(any(tower in name for tower in towers) for name in found)


@pytest.mark.parametrize("head", ["classifier", "my_head"])
def test_06_a_new_head_is_trained_and_saved(tmp_path, head):
    """Whatever it is called, and without any task type."""

    class Classifier(transformers.BertForSequenceClassification):
        pass

    model = tiny.build("bert")
    if head != "classifier":
        Classifier.forward = _classify
        model.__class__ = Classifier
        setattr(model, head, model.classifier)
        del model.classifier
    batch = tiny.batch("bert")
    adapted = train(adapt(model, rank=2), batch)
    assert any(head in name and p.requires_grad for name, p in adapted.named_parameters())
    folder = save(adapted, tmp_path)
    assert any(head in name for name in load_file(folder / "adapter_model.safetensors"))


def _classify(model, input_ids, attention_mask=None, labels=None, **others):
    found = model.my_head(model.bert(input_ids, attention_mask).pooler_output)
    loss = None if labels is None else torch.nn.functional.cross_entropy(found, labels)
    return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=found)


def test_07_a_4_bit_base_is_not_merged_into(models, tmp_path, clearly):
    path = tiny.on_disk("llama", models)
    batch = tiny.batch("llama")
    model = train(adapt(path, rank=4, quantization="4bit"), batch)
    result = merge(model, tmp_path / "merged")
    assert result.share < 1e-4 and not hasattr(
        transformers.AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config"
    )
    object.__setattr__(model.lora_kit_record, "base", None)
    with clearly(CannotMergeError, r"the base is in 4bit and its 16-bit weights are not at hand.*base="):
        merge(model, tmp_path / "again")


def test_08_a_small_update_is_not_rounded_away_unseen(models, tmp_path, clearly):
    """Added in float32, rounded once; what that costs is measured by layer and in logits, and above 10 % refused."""
    path = tiny.on_disk("llama", models, dtype=torch.bfloat16)
    model = train(adapt(path, rank=4), tiny.batch("llama"), steps=1, lr=2e-4)
    with clearly(CannotMergeError, r"would change the logits by \d+ % .*bound of 10 %.*dtype='float32'"):
        merge(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    result = merge(model, tmp_path / "merged", dtype="float32")
    assert result.share < 1e-3 and result.dtype == "float32"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32
    large = merge(train(model, tiny.batch("llama"), steps=20), tmp_path / "large")
    assert large.share < 0.1 and large.lost and all(0 < share < 1 for share in large.lost.values())
    assert "of a layer's update" in str(large)


def test_09_full_fine_tuning_of_bfloat16_moves_the_weights(models):
    """20 steps at 1e-5: float32 masters lose nothing; what transformers does by default loses most."""
    lost = {}
    for weights in ("float32", "keep"):
        model = adapt(tiny.on_disk("llama", models, dtype=torch.bfloat16), "full", weights=weights)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        had = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
        for _ in range(20):
            model(**tiny.batch("llama")).loss.backward()
            for name, p in model.named_parameters():
                had[name] |= p.grad != 0
            optimizer.step()
            optimizer.zero_grad()
        still = sum(int(((p == before[n]) & had[n]).sum()) for n, p in model.named_parameters())
        lost[weights] = still / sum(int(mask.sum()) for mask in had.values())
    assert lost["float32"] < 0.01 < 0.5 < lost["keep"]


@pytest.mark.parametrize("how", ["option", "model"])
def test_10_full_on_a_quantized_base(how, clearly):
    with clearly(UnsupportedError, r"4bit.*method='lora'"):
        if how == "option":
            adapt(tiny.build("llama"), "full", quantization="4bit")
        else:
            adapt(adapt(tiny.build("llama"), quantization="4bit").unload(), "full")


def test_11_nothing_is_trainable(saved, clearly):
    folder, path, batch, _ = saved
    with clearly(UnsupportedError, r"nothing in this model is trainable.*train=True"):
        param_groups(load(folder, path))
    train(load(folder, path, train=True), batch)


def findings(model, batch, **options):
    """Name → what `verify` found of what it warned of or failed; each with its remedy, kept for the last test."""
    report = verify(model, batch, **options)
    for check in (*report.warned, *report.failed):
        MESSAGES[f"verify {check.name} {len(MESSAGES)}"] = f"{check.name}: {check.found}. {check.remedy}."
    return {check.name: f"{check.found} {check.remedy}" for check in (*report.warned, *report.failed)}


def test_12_the_end_of_text_is_learnt():
    """Padding that is the end token: our collator keeps the end a target; a batch that lost it is found."""
    collator = Collator(padding=3)
    batch = collator(
        [{"input_ids": [2, 7, 8, 3], "labels": [-100, 7, 8, 3]}, {"input_ids": [2, 9, 3], "labels": [2, 9, 3]}]
    )
    assert [row[row != -100][-1].item() for row in batch["labels"]] == [3, 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    model = adapt(tiny.build("llama"))
    model.config.pad_token_id = 3
    lost = {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == 3, -100)}
    assert "masked_fill" in findings(model, lost)["end of text"]
    assert "end of text" not in findings(model, batch)


def test_13_a_text_begins_once():
    """Chat templates that begin with the start token: it is not put in front again; a batch with two is found."""
    tokenizer = tiny.tokenizer()
    rows, _ = data.tokenize(
        data.read(Dataset.from_list([{"messages": CHAT}] * 4), test=None, train_rows=None, test_rows=1, seed=0),
        tokenizer,
        task="causal-lm",
        max_length=32,
    )
    assert all(row["input_ids"].count(2) == 1 and row["input_ids"][0] == 2 for row in rows)
    ids = torch.tensor([[2, 2, 7, 8, 3]])
    assert (
        "start with the start token 2 twice"
        in findings(adapt(tiny.build("llama")), {"input_ids": ids, "labels": ids})["start of text"]
    )


def test_14_what_is_in_the_loss():
    """Prompts are outside of it; a row without any label is found; a micro-batch without one is passed over."""
    rows, _ = data.tokenize(questions_read(), tiny.tokenizer(), task="causal-lm", max_length=32)
    assert all(0 < sum(label != -100 for label in row["labels"]) < len(row["labels"]) for row in rows)
    model, batch = adapt(tiny.build("llama")), tiny.batch("llama")
    batch["labels"][1] = -100
    assert "row 1 of 3 has no token to learn" in findings(model, batch)["labels"]
    batch["labels"][:] = -100
    optimizer = torch.optim.AdamW(param_groups(model))
    with guard(model, optimizer) as step:
        assert step(batch).isnan() and all(p.grad is None for p in model.parameters())
        assert step(tiny.batch("llama")).isfinite()


def test_15_24_lack_of_memory_changes_nothing(capfd, clearly):
    """Rows of unequal length that do not fit run in parts: the same gradient, weighted by labelled tokens."""
    model, batch = adapt(tiny.build("llama"), rank=4), tiny.batch("llama", rows=5)
    for row in range(5):
        batch["labels"][row, : 2 * row] = -100
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    most = [2]

    def full(module, args):
        if args[0].shape[0] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(full)
    optimizer = torch.optim.AdamW(param_groups(model))
    with guard(model, optimizer) as step:
        step(batch)
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        away = sum((found[n] - g).norm() ** 2 for n, g in expected.items()) / sum(
            g.norm() ** 2 for g in expected.values()
        )
        assert float(away) ** 0.5 < 1e-5
        assert "out of memory at micro-batch 5 (longest sequence 11)" in capfd.readouterr().err
        most[0] = 0
        with clearly(OutOfMemoryError, r"out of memory with .*longest sequence.*free on cpu.*max_length below"):
            step(batch)


def test_16_the_scale_is_the_files(saved, tmp_path):
    """There is nothing to edit in a script: alpha comes back with the adapter."""
    folder, path, _, _ = saved
    again = load(folder, path, train=True)
    assert (
        again.peft_config["default"].lora_alpha
        == json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    )
    with pytest.raises(TypeError):
        load(folder, path, alpha=64)


def test_17_adapt_twice(clearly):
    model = adapt(tiny.build("llama"), rank=2)
    for again in (model, model.get_base_model()):
        with clearly(AlreadyAdaptedError, r"already carries an adapter.*unload\(\)"):
            adapt(again, rank=2)
    adapt(model.unload(), rank=2)


def test_18_the_base_is_changed_in_place_and_can_be_asked():
    assert "changed in place" in " ".join(adapt.__doc__.split())
    base, batch = tiny.build("llama"), tiny.batch("llama")
    expected = logits(base, batch)
    model = train(adapt(base, rank=2), batch)
    assert not torch.allclose(logits(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


def test_19_resized_and_edited_embeddings_come_back(models, tmp_path, capfd):
    """Only the rows that differ from the base's files are stored, and the base is resized for them."""
    path = tiny.on_disk("llama", models)
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    base.resize_token_embeddings(tiny.VOCABULARY + 6, mean_resizing=False)
    with torch.no_grad():
        base.model.embed_tokens.weight[7] += 1
    batch = tiny.batch("llama")
    batch["input_ids"][0, :3] = torch.tensor([7, tiny.VOCABULARY, tiny.VOCABULARY + 5])
    model = train(adapt(base, rank=2), batch)
    expected = logits(model, batch)
    folder = save(model, tmp_path / "adapter")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 120_000, "not the whole matrices"
    capfd.readouterr()
    assert torch.equal(logits(load(folder, path), batch), expected)
    assert "7 rows of model.embed_tokens.weight" in capfd.readouterr().err
    plain = save(train(adapt(path, rank=2), tiny.batch("llama")), tmp_path / "plain")
    assert not (plain / "changed_rows.safetensors").exists()


def test_20_tied_embeddings_are_untied_by_a_merge(models, tmp_path):
    """LoRA on a tied output head: the merge must not change the input embeddings with it."""
    config = tiny.llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    original = base.model.embed_tokens.weight.detach().clone()
    batch = tiny.batch("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied targets
        model = train(adapt(base, rank=4, target_modules=["q_proj", "lm_head"]), batch, steps=10)
        expected = logits(model, batch)
        result = merge(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert result.share < 1e-3
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-4)
    assert torch.equal(merged.model.embed_tokens.weight, original)
    assert not torch.equal(merged.lm_head.weight, original)


def test_21_names_are_without_the_compilers(models, tmp_path, clearly):
    """A compiled part of the model: what is saved fits the base as it is."""
    path = tiny.on_disk("llama", models)
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    with clearly(UnsupportedError, r"is compiled .*adapt the model first"):
        adapt(torch.compile(base))
    base.model = torch.compile(base.model, backend="eager")
    model = adapt(base, rank=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    folder = save(model, tmp_path)
    assert not any("_orig_mod" in name for name in load_file(folder / "adapter_model.safetensors"))
    again = load(folder, path)
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = get_peft_model_state_dict(again, save_embedding_layers=False)
    assert len(held) == len(found) == 28
    assert all(torch.equal(found[name.replace("._orig_mod", "")], value) for name, value in held.items())


def test_22_float16_bases_train_float32_tensors(models):
    for method in ("lora", "prefix", "full"):
        model = adapt(tiny.on_disk("llama", models, dtype=torch.float16), method)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, method


def test_23_a_prefix_works_with_checkpointing_and_is_trained_on(models, tmp_path):
    path, batch = tiny.on_disk("llama", models), tiny.batch("llama")
    gradients = []
    for order in ("never", "before", "after"):
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(path)
        if order == "before":
            checkpoint(base)
        model = adapt(base, "prefix", num_virtual_tokens=4)
        if order == "after":
            checkpoint(base)
        model(**batch).loss.backward()
        gradients.append(model.prompt_encoder["default"].embedding.weight.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    again = load(save(model, tmp_path), path, train=True)
    train(again, batch)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_25_the_memory_is_known_before_anything_is_loaded(models):
    found = plan(tiny.on_disk("llama", models), "lora", batch_size=2, seq_len=64, device="cpu")
    assert found.peak > found.breakdown["weights"] > 0 and found.phases["loading"] > 0


def test_26_logits_are_never_whole(models):
    """The peak of a step hardly grows with the vocabulary's logits; PEFT's does by several copies."""
    sizes = {}
    for lean in (True, False):
        found = plan(_wide(), "lora", batch_size=1, seq_len=512, device="cpu", lean=lean)
        sizes[lean] = found.peak - found.breakdown["weights"]
    logits_bytes = 512 * 32_000 * 4
    assert sizes[False] - sizes[True] > 2 * logits_bytes
    assert sizes[True] < logits_bytes


def _wide():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_27_nothing_is_upcast_behind_the_users_back(models, quantization):
    model = adapt(tiny.on_disk("llama", models, dtype=torch.bfloat16), quantization=quantization)
    inner = model.get_base_model()
    assert inner.model.embed_tokens.weight.dtype == inner.lm_head.weight.dtype == torch.bfloat16
    assert inner.model.norm.weight.dtype == torch.bfloat16


def test_28_the_loading_peak_is_planned(models):
    path = tiny.on_disk("llama", models)
    sixteen, four = (plan(path, quantization=q, seq_len=16, device="cpu").phases["loading"] for q in (None, "4bit"))
    assert 0 < four <= sixteen


# --- reliability ------------------------------------------------------------------------------------------------------


def test_29_30_kill_9_while_saving_and_training(tmp_path):
    """The benchmark, in short: nothing unreadable, mixed or lost; runs that go on end with the very same weights."""
    command = [sys.executable, ROOT / "benchmarks" / "crash.py", "--kills", "15", "--training-kills", "4"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in (tmp_path / "counts.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["part"]] = row
    saves, training = found["saves"], found["training"]
    assert saves["kills"] == 15
    assert not any(saves[key] for key in ("unreadable", "mixed", "lost", "mixed for others"))
    assert training["kills"] >= 4 and training["failed resumes"] == 0 and training["other weights"] == 0
    for name, text in found["full disk"].items():
        if name.startswith(("tmpfs", "the same", "files of")):
            assert "NOT" not in text and ("is as it was" in text or "not run" in text), text
    order = found["order"]
    if "order" not in order:
        assert order["files flushed before the switch"] == "4 of 4"
        assert order["staging folder flushed before the switch"]
        assert order["folder flushed before anything else is changed"]
        assert order["removed or replaced before the switch"] == 0


def test_31_damage_is_refused(tmp_path):
    """The benchmark, in short: lengths, bits, and mutated configs, headers and manifests."""
    command = [sys.executable, ROOT / "benchmarks" / "damage.py", "--step", "37", "--mutations", "700", "--seed", "5"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (tmp_path / "counts.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (
            row["cases"] >= (70 if row["part"] == "whole" else 300)
            and not row["other errors"]
            and not row["no file named"]
            and not row["model changed"]
        )
        assert row["largest growth MB"] < 200
        assert row["part"] in ("mutated", "whole") or row["accepted"] == 0, row


def test_31_the_message_names_the_file(saved, clearly):
    folder, path, _, _ = saved
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with clearly(StorageError, r"adapter_model\.safetensors does not match its recorded SHA-256 .*Nothing was loaded"):
        load(folder, path)


def test_32_a_resume_that_is_none(models, tmp_path, clearly):
    rows, path = questions(24), tiny.on_disk("llama", models)
    finetune(path, rows, output=tmp_path, **RUN)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["step-4", "step-6"]
    with clearly(ResumeError, r"other settings \(alpha was 4, is 64.*load\(path, base, train=True\)"):
        _with_alpha(tmp_path, 4)
        finetune(path, rows, output=tmp_path, resume=True, **RUN, alpha=64)
    plain = save(load(tmp_path, path, train=True), tmp_path / "plain")
    with clearly(ResumeError, r"has no optimizer state .*load\(path, base, train=True\)"):
        finetune(path, rows, output=tmp_path, resume=str(plain), **RUN)
    with clearly(OptionError, r"resume=True: checkpoints lie below output, which is None"):
        finetune(path, rows, resume=True, **RUN)
    with clearly(OptionError, r"save_every must be above 0, got 0"):
        finetune(path, rows, output=tmp_path, **{**RUN, "save_every": 0})


def _with_alpha(folder, alpha):
    """Put the alpha that was chosen by default into the checkpoints' manifests, as a run with alpha= would."""
    for root in (folder / "checkpoints").iterdir():
        facts = manifest.parse(root)
        facts["options"]["alpha"] = alpha
        manifest.write(root, {k: v for k, v in facts.items() if k not in ("format", "versions", "files", "sha256")})


def test_32_a_damaged_checkpoint_is_passed_over(models, tmp_path, capfd):
    rows, path = questions(24), tiny.on_disk("llama", models)
    whole = finetune(path, rows, output=tmp_path, **RUN)
    state = tmp_path / "checkpoints" / "step-6" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    capfd.readouterr()
    again = finetune(path, rows, output=tmp_path, resume=True, **RUN)
    said = capfd.readouterr().err
    assert "step-6 is damaged" in said and "going on from step-4" in said
    held, expected = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(held[name], value) for name, value in expected.items())


# --- security ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config .* imports a module"),
        ({"target_modules": "(.*a|.*b|.*c)*(.+)+x"}, "takes more than|matches none"),
        ({"r": 10**9}, r"r = 1000000000, and no tensor beside it is larger than 4"),
        ({"layer_replication": [[0, 10**9]]}, r"makes 1,000,000,000 layers"),
    ],
)
def test_33_a_config_cannot_run_or_fetch_anything(saved, fields, pattern, clearly):
    folder, path, _, _ = saved
    rewrite(folder, config=fields)
    with clearly(StorageError, pattern):
        load(folder, path)


def test_33_the_code_of_a_base_that_a_file_names_is_not_run(saved, tmp_path, clearly):
    folder, _, _, _ = saved
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(
        json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        )
    )
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    rewrite(folder, config={"base_model_name_or_path": str(evil)})
    with clearly(OptionError, "comes with code of its own"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_34_pickles_are_not_opened(saved, clearly):
    folder, path, _, _ = saved
    rewrite(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with clearly(StorageError, r"pickled adapter \(adapter_model\.bin, [\d,]+ bytes\).*save_file"):
        load(folder, path)


# --- usability and versions -------------------------------------------------------------------------------------------


def test_35_which_modules(clearly):
    with clearly(TargetError, r"'query_key_value'.*q_proj"):
        adapt(tiny.build("llama"), target_modules=["query_key_value"])


def test_36_a_learning_rate_far_off_is_found(capfd):
    model = adapt(tiny.build("llama"))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5))
    assert "1e-05" in findings(model, tiny.batch("llama"), optimizer=optimizer)["learning rate"]
    with guard(model, optimizer) as step:
        step(tiny.batch("llama"))
        optimizer.step()
    assert re.search(r"learning rate 1e-05 is \d+ times below", capfd.readouterr().err)


def test_36_which_learning_rate():
    lora, full = (param_groups(adapt(tiny.build("llama"), word))[0]["lr"] for word in ("lora", "full"))
    assert lora > full > 0 and LoRA.learning_rate(8_000_000_000, "causal-lm") == pytest.approx(1.7e-4, rel=0.1)


@pytest.mark.parametrize("value", [True, 3, "x"])
def test_37_an_unknown_field_that_says_something(saved, value, clearly):
    folder, path, batch, expected = saved
    rewrite(folder, config={"use_newest_trick": None, "another": []})
    assert torch.equal(logits(load(folder, path), batch), expected)
    rewrite(folder, config={"use_newest_trick": value})
    with clearly(StorageError, r"'use_newest_trick' = .* does not know .*pip install -U peft"):
        load(folder, path)


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit", "torch_dtype", "task_type"])
def test_38_words_of_other_versions(option, clearly):
    with clearly(OptionError, f"unknown option '{option}'.*Here it is called"):
        adapt(tiny.build("llama"), **{option: True})


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_39_bitsandbytes_that_does_not_work(models, bits, monkeypatch, clearly):
    """Found out with one small matrix, before anything is loaded."""
    import bitsandbytes

    from lora_kit import base, quantization

    def broken(*args, **kwargs):
        raise RuntimeError("libbitsandbytes_cuda130.so: cannot open shared object file")

    for name in ("quantize_4bit", "int8_vectorwise_quant"):
        monkeypatch.setattr(bitsandbytes.functional, name, broken)
    monkeypatch.setattr(base, "load", None)
    quantization._round_trip.cache_clear()
    with clearly(UnsupportedError, rf"cannot quantize to {bits} on cpu: libbitsandbytes.*pip install -U bitsandbytes"):
        adapt(tiny.on_disk("llama", models), quantization=bits)
    quantization._round_trip.cache_clear()


def test_40_a_model_on_several_devices(clearly):
    model = tiny.build("llama")
    model.lm_head.to("meta")
    with clearly(UnsupportedError, r"'meta'.*load it first"):
        adapt(model)


# --- saving and serving -----------------------------------------------------------------------------------------------


def test_41_42_who_serves_it(models, tmp_path, clearly):
    path = tiny.on_disk("llama", models)
    lora = check_serving(save(adapt(path, rank=24), tmp_path / "lora"))
    assert not lora.vllm and not lora.llama_cpp and "--max-lora-rank 32" in str(lora)
    dora = check_serving(save(adapt(path, rank=4, dora=True), tmp_path / "dora"))
    assert "DoRA" in dora.vllm and "DoRA" in dora.llama_cpp and "merge(" in str(dora)
    rslora = check_serving(save(adapt(path, rank=4, rslora=True), tmp_path / "rslora"))
    assert not rslora.vllm and "rsLoRA" in rslora.llama_cpp[0]
    backbone = tmp_path / "backbone"
    tiny.build("bert").bert.save_pretrained(backbone)
    head = check_serving(
        save(adapt(str(backbone), task="classification", model_kwargs={"num_labels": 3}), tmp_path / "head")
    )
    assert "trained whole" in head.vllm[0] and "classifier" in head.llama_cpp[0]
    prefix = check_serving(save(adapt(path, "prefix"), tmp_path / "prefix"))
    assert "PREFIX_TUNING" in prefix.vllm[0] and "merge(" not in str(prefix)
    with clearly(StorageError, r"has no adapter_config\.json"):
        check_serving(path)


@pytest.mark.parametrize(
    "method", ["lora", "prefix", "full", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])]
)
def test_43_one_load_for_every_method(models, tmp_path, method):
    path, batch = tiny.on_disk("llama", models), tiny.batch("llama")
    model = train(adapt(path, method), batch)
    expected = logits(model, batch)
    base = () if method == "full" else (path,)
    folder = save(model, tmp_path / "saved")
    assert torch.equal(logits(load(folder, *base), batch), expected)
    train(load(folder, *base, train=True), batch)


# --- all messages -----------------------------------------------------------------------------------------------------


def test_every_message_says_what_happened_the_proof_and_the_line_to_write():
    if len(MESSAGES) < 40:
        pytest.skip("the tests above have to run before this one")
    wrong = []
    for name, text in MESSAGES.items():
        whole = len(text) > 50 and text[-1] in ".)"
        # the proof: a number, or the very name that was given
        proof = re.search(r"\d|'[^']+'", text)
        # the fix: a call, a keyword, a command, or a word of what to do
        fix = re.search(r"\w+\(|\w+=|pip install|: null|accepted:|[Ll]eave|load it|merge\b|Did you mean", text)
        if not (whole and proof and fix):
            wrong.append(f"{name}: {text}")
    assert not wrong, "\n".join(wrong)
