"""Rows behind one another instead of padded: the same loss and gradients, or a refusal."""

import architectures
import lean_models as models
import pytest
import tiny
import torch

from lora_kit import adapt, finetune
from lora_kit.errors import OptionError
from lora_kit.training.batching import Collator, Packer, can_pack, has_rows_of_any_length

LENGTHS = (7, 1, 12, 4)


def rows(words=models.WORDS):
    draw = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        ids = torch.randint(2, words, (length,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :], "length": length})
    return found


def test_the_batch():
    batch = Packer()(rows())
    assert {key: tuple(value.shape) for key, value in batch.items() if key != "use_cache"} == {
        "input_ids": (1, 24),
        "labels": (1, 24),
        "position_ids": (1, 24),
    }
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0]
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1)
    assert starts.tolist() == [0, 7, 8, 20] and (batch["labels"][0, starts] == -100).all()


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_packed_is_padded_without_padding(architecture, method):
    model = models.adapted(architecture, lean=True, method=method)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # other shapes draw other masks
    if architecture == "mixtral":
        model.config.output_router_logits = False  # it counts padding among the tokens to balance
    assert can_pack(model)
    padded = models.step(model, Collator(0)(rows()))
    packed = models.step(model, Packer()(rows()))
    assert models.distance(packed, padded) < 2e-5


@pytest.mark.parametrize("name", ["bloom", "mamba", "mpt", "rwkv"])
def test_models_that_let_rows_run_together(name):
    assert not can_pack(adapt(architectures.recipe(name, "causal-lm").build(), "lora", rank=2))


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_other_kinds_of_models(family):
    assert not can_pack(adapt(tiny.build(family), "lora", rank=2))


def test_asking_leaves_the_model_as_it_was():
    model = models.adapted("llama", lean=True)
    model.train()
    state = torch.get_rng_state()
    assert can_pack(model) and model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not has_rows_of_any_length(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert has_rows_of_any_length(model)


def data(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [
        f'{{"prompt": "w{i} w{i + 1}", "completion": "{" ".join(f"w{i + k}" for k in range(i % 7 + 1))}"}}'
        for i in range(24)
    ]
    file.write_text("\n".join(lines))
    return file


def test_finetune_packs_where_it_is_asked_to(tmp_path):
    path = tiny.on_disk("llama", tmp_path)
    seen = []
    collate = Packer.__call__

    def watched(self, some):
        batch = collate(self, some)
        seen.append(batch["input_ids"].shape)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packer, "__call__", watched)
        losses = {
            packing: finetune(path, data(tmp_path), epochs=2, batch_size=8, packing=packing, rank=4).after["loss"]
            for packing in (None, False, True)
        }
    assert losses[None] == losses[False] and abs(losses[True] - losses[False]) < 0.2
    assert all(shape[0] == 1 for shape in seen) and len(seen) > 4


def test_finetune_refuses_to_pack_what_cannot_be_packed(tmp_path):
    model = adapt(architectures.recipe("bloom", "causal-lm").build(), "lora", rank=2)
    with pytest.raises(OptionError, match=r"packing=True: BloomForCausalLM does not keep packed rows apart"):
        finetune(model, data(tmp_path), tokenizer=tiny.tokenizer(), packing=True)
    with pytest.raises(OptionError, match=r"packing must be True, False or None, got 'yes'"):
        finetune(model, data(tmp_path), tokenizer=tiny.tokenizer(), packing="yes")
