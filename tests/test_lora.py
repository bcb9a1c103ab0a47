"""The variants of LoRA: each formula, each file, each refusal."""

import json

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file

from lora_kit import LoRA, adapt, load, merge, param_groups, save
from lora_kit.errors import OptionError, UnsupportedError


def stir(model):
    """Adapters that do something."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def logits(model, family="llama"):
    with torch.no_grad():
        return model.eval()(**tiny.batch(family)).logits


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 9), (True, 12 / 3)])
def test_scale(rslora, scale):
    """alpha / rank, or alpha / √rank (rsLoRA)."""
    torch.manual_seed(0)
    model = stir(adapt(tiny.build("llama"), rank=9, alpha=12, rslora=rslora))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 5, 64)
    a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    torch.testing.assert_close(layer(x), x @ w.T + scale * (x @ a.T @ b.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"pissa": True}])
def test_small_matrices_get_their_full_rank(options, tmp_path, capsys):
    """A matrix with a side below the rank is adapted all the same, at the same scale, and comes back from the file."""

    def build():
        torch.manual_seed(0)
        model = tiny.build("llama")
        for layer in model.model.layers:  # a gate with five outputs, beside larger matrices
            layer.self_attn.v_proj = torch.nn.Sequential(
                torch.nn.Linear(64, 5, bias=False), torch.nn.Linear(5, 32, bias=False)
            )
        return model

    model = stir(adapt(build(), rank=16, **options))
    assert (
        "16 of 16 linear layers (100.0 % of matmul weights), 4 of them too small for the rank"
        in capsys.readouterr().err
    )
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert sorted({layer.r["default"] for layer in layers}) == [5, 16]
    assert len({round(layer.scaling["default"], 9) for layer in layers}) == 1
    expected = logits(model)
    save(model, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, build())), expected, rtol=0, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-4)


def test_dora_is_magnitude_and_direction():
    """W' = m · (W + s B A) / ‖W + s B A‖, row by row; no change at the start."""
    torch.manual_seed(0)
    base = tiny.build("llama")
    before = logits(base)
    model = adapt(base, rank=4, dora=True)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    stir(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
        x = torch.randn(3, 5, 64)
        a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
        moved = w + 2.0 * b @ a
        magnitude = layer.lora_magnitude_vector["default"].weight[:, None]
        wanted = x @ (magnitude * moved / moved.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa(models, tmp_path, rslora):
    """Starts at the base's own logits from the largest singular values; saved for the unchanged base."""
    path = tiny.on_disk("llama", models)
    plain = adapt(path, rank=4)
    before = logits(plain)
    weight = plain.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.detach().clone()
    model = adapt(path, rank=4, pissa=True, rslora=rslora)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(product, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-3, atol=1e-4)
    expected = logits(stir(model))
    assert (expected - before).abs().max() > 0.1
    save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True
    base = type(model.get_base_model())
    theirs = peft.PeftModel.from_pretrained(base.from_pretrained(path), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(load(tmp_path, path, train=True)), expected, rtol=0, atol=1e-4)
    merge(model, tmp_path / "merged")
    torch.testing.assert_close(logits(base.from_pretrained(tmp_path / "merged")), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # saving changed nothing


def test_pissa_wants_16_bit_weights():
    model = adapt(tiny.build("llama"), quantization="8bit").unload()
    with pytest.raises(UnsupportedError, match="pissa on a 8bit base"):
        adapt(model, pissa=True)
    with pytest.raises(UnsupportedError, match="pissa on a 4bit base"):
        adapt(tiny.build("llama"), pissa=True, quantization="4bit")
    with pytest.raises(OptionError, match="dora and pissa"):
        LoRA(dora=True, pissa=True)
    with pytest.raises(OptionError, match="experts must be True or False, got 'no'"):
        LoRA(experts="no")


def test_lora_plus():
    """B learns faster than A by the ratio; heads keep their own rate."""
    groups = {g["name"]: g for g in param_groups(adapt(tiny.build("bert"), rank=4, lora_plus=16), lr=1e-4)}
    assert set(groups) == {"adapter", "adapter B", "head"}
    assert groups["adapter B"]["lr"] == pytest.approx(16e-4) and groups["adapter"]["lr"] == 1e-4
    assert len(groups["adapter"]["params"]) == len(groups["adapter B"]["params"]) == 13
    assert groups["adapter"]["params"][0].shape == (4, 64) and groups["adapter B"]["params"][0].shape == (64, 4)
    assert "adapter B" not in {g["name"] for g in param_groups(adapt(tiny.build("bert"), rank=4))}
    with pytest.raises(OptionError, match="lora_plus must be above 0"):
        LoRA(lora_plus=0)
    with pytest.raises(OptionError, match=r"Here it is called 'lora_plus'"):
        adapt(tiny.build("llama"), loraplus_lr_ratio=16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_new_tokens(models, tmp_path, tied, quantization):
    """Only their rows move, only their rows are saved, and a base without them gets room for them."""
    base = tiny.build("llama")
    base.config.tie_word_embeddings = tied
    if tied:
        base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    first = base.get_input_embeddings().weight.shape[0]
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(first + 3, mean_resizing=False)
    model = adapt(base, rank=4, new_tokens=[first, first + 2], quantization=quantization)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = tiny.batch("llama")
    batch["input_ids"][:, 2] = first
    batch["labels"][:, 4] = first + 2
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    for _ in range(2):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    tokens = {n for n in moved if "trainable_tokens_delta" in n}
    assert len(tokens) == (1 if tied else 2) and all("lora_" in n for n in moved - tokens)
    assert all(before[n].shape == (2, 64) for n in tokens)

    def found(model):
        with torch.no_grad():
            return model.eval()(**batch).logits

    expected = found(model)
    save(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(t.shape[0] >= first for t in tensors.values()), "a whole embedding was saved"
    # the rows that no one asked for start at random, so they are the same only by the words that are used
    again = load(tmp_path / "adapter", str(tmp_path / "base"), train=True, quantization=quantization)
    used = [*range(first), first, first + 2]
    torch.testing.assert_close(found(again)[..., used], expected[..., used], rtol=0, atol=1e-5)
    assert again.get_input_embeddings().weight.shape[0] == first + 3
    merged = model.merge_and_unload() if quantization is None else None
    if merged is not None:
        torch.testing.assert_close(found(merged), expected, rtol=0, atol=1e-5)


def test_new_tokens_in_16_bit_train_in_float32():
    model = adapt(tiny.build("llama", dtype=torch.bfloat16), rank=4, new_tokens=5)
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert rows and all(p.dtype == torch.float32 for p in rows)
    model(**tiny.batch("llama")).loss.backward()


def test_new_tokens_that_cannot_be():
    model = tiny.build("llama")
    with pytest.raises(OptionError, match=r"names the id 160, but the model has 160 embeddings.*resize_token"):
        adapt(model, new_tokens=[160])
    with pytest.raises(OptionError, match=r"takes ids of tokens, got '<think>'.*convert_tokens_to_ids"):
        adapt(model, new_tokens=["<think>"])
    with pytest.raises(OptionError, match="new_tokens is empty"):
        adapt(model, new_tokens=[])
    model.lm_head = torch.nn.Linear(64, 160, bias=True)
    with pytest.raises(UnsupportedError, match="its output head has a bias"):
        adapt(model, new_tokens=[7])


def test_a_classifier_has_no_output_rows():
    model = adapt(tiny.build("bert"), rank=4, new_tokens=[7])
    assert sum("trainable_tokens_delta" in n for n, _ in model.named_parameters()) == 1


def test_everything_else_through_pefts_config():
    """A config as PEFT has it is taken as it is."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", use_rslora=True)
    model = adapt(tiny.build("llama"), config)
    assert model.peft_config["default"].init_lora_weights == "olora"
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 4.0
