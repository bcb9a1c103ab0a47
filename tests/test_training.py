"""Metrics against hand-counted truths, the method's own rates, and finetune end to end."""

import math
import types

import pytest
import tiny
import torch
import transformers
from references import token_loss

from lora_kit import METHODS, adapt, finetune, load, param_groups, training_defaults
from lora_kit.errors import DataError, OptionError, UnsupportedError
from lora_kit.training import metrics

ROWS = [{"text": " ".join([f"w{i % 7}"] * 3 + ["w90" if i % 2 else "w91"]), "label": i % 2} for i in range(64)]


def test_language_model_loss_is_by_token():
    """Sums over rows of different length, not a mean of means."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, 2:] = -100
    labels[2, :4] = -100
    reduce, compute = metrics.for_task("causal-lm")
    found = compute(types.SimpleNamespace(predictions=reduce(logits, labels).numpy(), label_ids=None))
    total, count = token_loss(logits, labels)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    means = [token_loss(a[None], b[None]) for a, b in zip(logits, labels, strict=True)]
    assert found["loss"] != pytest.approx(sum(t / n for t, n in means) / 3, rel=1e-3)


def test_classification_metrics_by_hand():
    """Two classes, six rows: accuracy 4/6, precision (2/3 + 2/3)/2, recall (2/3 + 2/3)/2."""
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1], [1, 0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    reduce, compute = metrics.for_task("classification")
    found = compute(types.SimpleNamespace(predictions=reduce((logits, None), labels).numpy(), label_ids=labels.numpy()))
    assert found == pytest.approx({"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    skewed = compute(
        types.SimpleNamespace(predictions=logits.numpy(), label_ids=torch.tensor([0, 0, 1, 1, 1, 1]).numpy())
    )
    assert skewed["accuracy"] == pytest.approx(5 / 6)
    assert skewed["precision"] == pytest.approx((2 / 3 + 1) / 2) and skewed["recall"] == pytest.approx((1 + 3 / 4) / 2)


# --- defaults -------------------------------------------------------------------------------------------------------


def test_rates_fall_with_size():
    for kind in METHODS.values():
        for task, declared in (("classification", kind.rate), ("causal-lm", kind.language_rate)):
            rates = [kind.learning_rate(n, task) for n in (1e6, 22.7e6, 1e8, 8e9)]
            assert rates == sorted(rates, reverse=True) and rates[1] == declared.at_reference
    # the published values that the exponent joins, for models of billions of parameters
    assert 1e-5 <= METHODS["full"].learning_rate(8_000_000_000, "causal-lm") <= 2e-5
    assert 1e-4 <= METHODS["lora"].learning_rate(8_000_000_000, "causal-lm") <= 2e-4
    assert 4e-3 <= METHODS["prefix"].learning_rate(3_000_000_000, "causal-lm") <= 8e-3


@pytest.mark.parametrize("method", METHODS)
def test_groups_hold_every_trainable_parameter_once(method):
    model = adapt(tiny.build("bert"), method)
    groups = param_groups(model)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    by_name = {group["name"]: group for group in groups}
    kind = METHODS[method]
    assert by_name["head"]["lr"] == pytest.approx(
        kind.learning_rate(model.lora_kit_record.parameters, "classification", head=True)
    )
    assert by_name["head"]["weight_decay"] == 0
    if method == "full":
        assert by_name["weights"]["weight_decay"] == kind.weight_decay
        assert by_name["biases and norms"]["weight_decay"] == 0
        assert all(p.dim() < 2 for p in by_name["biases and norms"]["params"])
    scaled = {group["name"]: group["lr"] for group in param_groups(model, lr=by_name[groups[0]["name"]]["lr"] * 2)}
    assert scaled["head"] == pytest.approx(2 * by_name["head"]["lr"], rel=1e-6)


def test_defaults_are_training_arguments(tmp_path):
    for method in METHODS:
        fields = training_defaults(adapt(tiny.build("llama"), method))
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)
        assert arguments.learning_rate == METHODS[method].learning_rate(94_528, "causal-lm")
        assert arguments.get_warmup_steps(100) == 10
    assert training_defaults(adapt(tiny.build("llama", dtype=torch.bfloat16), "full"))["bf16"] is True


def test_groups_of_a_plain_peft_model():
    """A model that lora_kit did not adapt has the same groups."""
    import peft

    plain = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    (group,) = param_groups(plain)
    assert group["lr"] == METHODS["lora"].learning_rate(94_528, "causal-lm")
    assert group["params"] == [p for p in plain.parameters() if p.requires_grad]


def test_groups_refusals(models):
    frozen = adapt(tiny.build("llama")).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="nothing in this model is trainable"):
        param_groups(frozen)
    with pytest.raises(OptionError, match="lr must be above 0"):
        param_groups(adapt(tiny.build("llama")), lr=0)


# --- finetune -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_finetune_a_classifier_from_a_path(method, models, tmp_path):
    """The word that decides the label is found; the saved folder gives the same answers with its own tokenizer."""
    path = tiny.on_disk("bert", models)
    done = finetune(
        path, ROWS, method=method, output=tmp_path / "out", epochs=8, learning_rate=5e-3, test_data=ROWS[:20]
    )
    if method != "prefix":  # before a frozen encoder of random weights a prefix can do little
        assert done.after["accuracy"] > 0.9 > done.before["accuracy"]
    assert set(done.after) == {"accuracy", "precision", "recall", "f1"}
    assert "accuracy" in str(done) and str(done.saved) in str(done)
    again = load(tmp_path / "out", None if method == "full" else path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer("w1 w1 w1 w90", return_tensors="pt")
    torch.testing.assert_close(again(**text).logits, done.model.eval()(**text).logits, rtol=0, atol=1e-6)
    assert method == "prefix" or again(**text).logits.argmax().item() == 1
    assert again.config.id2label == {0: "0", 1: "1"}


@pytest.mark.parametrize("base", [None, "8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_finetune_a_decoder(method, base, models, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 9} w{(i * 3) % 9}" for i in range(900)))
    done = finetune(
        tiny.on_disk("llama", models), tmp_path / "text.txt", method=method, quantization=base, max_length=32, epochs=4
    )
    assert done.after["loss"] < done.before["loss"] - 0.05
    assert done.after["perplexity"] == pytest.approx(math.exp(done.after["loss"]))


def test_finetune_an_encoder_decoder(models):
    rows = [{"prompt": f"w{i % 5} w{i % 3}", "completion": f"w{i % 5}"} for i in range(40)]
    done = finetune(tiny.on_disk("t5", models), rows, method="lora", epochs=3, dtype="bfloat16")
    assert done.after["loss"] < done.before["loss"]


def test_finetune_an_adapted_model(models):
    model = adapt(tiny.on_disk("llama", models), "lora", rank=4)
    rows = [{"prompt": f"w{i % 5}", "completion": "w3 w4"} for i in range(40)]
    done = finetune(model, rows, epochs=2)
    assert done.model is model and done.saved is None and done.after["loss"] < done.before["loss"]


def test_before_is_the_base_without_the_adapter(models):
    """A prefix changes the model from its first moment; what is called before is the model without it."""
    rows = [{"text": f"w{i % 9} w{i % 5} w{i % 7}"} for i in range(40)]
    path = tiny.on_disk("llama", models)
    found = [finetune(path, rows, method=m, epochs=0.1).before["loss"] for m in ("lora", "prefix", "full")]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] == pytest.approx(found[2], rel=1e-6)


def test_finetune_refusals(models, tmp_path):
    path = tiny.on_disk("bert", models)
    model = adapt(path, "lora")
    with pytest.raises(OptionError, match=r"method='lora' is for a hub id or a path.*pass it to adapt"):
        finetune(model, ROWS, method="lora")
    with pytest.raises(OptionError, match="rank=4 is for a hub id"):
        finetune(model, ROWS, rank=4)
    with pytest.raises(DataError, match=r"2 labels \(0, 1\), the model's head 3"):
        finetune(model, ROWS)
    with pytest.raises(OptionError, match=r"no field of TrainingArguments.*'num_train_epochs'"):
        finetune(path, ROWS, training_arguments={"num_train_epoch": 3})
    with pytest.raises(OptionError, match="no tokenizer is known"):
        finetune(adapt(tiny.build("llama")), [{"text": "w1"}] * 4)
    with pytest.raises(OptionError, match="unknown option 'rnk'"):
        finetune(path, ROWS, rnk=4)
