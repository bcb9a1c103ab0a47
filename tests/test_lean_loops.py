"""The lean step inside other people's loops: they run unchanged, and get the losses that they got without it."""

import os
import subprocess
import sys
from pathlib import Path

import lean_models as models
import pytest
import tiny
import torch
import transformers

from lora_kit import adapt, param_groups, training_defaults
from lora_kit.lean.logits import Logits

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
TESTS = Path(__file__).parent


def rows(count=8):
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in range(5, 5 + count):
        ids = torch.randint(4, tiny.VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": ids})
    return found


def collate(some):
    longest = max(len(row["input_ids"]) for row in some)

    def filled(key, value):
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in some])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in some])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"label_smoothing_factor": 0.1}, {"torch_compile": True}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_trainer(settings, tmp_path):
    """With its own loss normalization, accumulation, mixed precision, label smoothing and evaluation."""
    if settings.get("torch_compile"):
        settings = {**settings, "torch_compile_backend": "aot_eager"}
        torch._dynamo.reset()
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = adapt(tiny.build("llama"), "lora", rank=4, lean=lean)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=0,
            **{**training_defaults(model), **settings},
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(4), data_collator=collate
        )
        trainer.train()
        found.append(losses(trainer) + [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e])
        predicted = trainer.predict(rows(4))
        assert predicted.predictions.shape[-1] == tiny.VOCABULARY
    tolerance = 2e-2 if settings.get("bf16") else 1e-4
    assert len(found[0]) == 6 and max(abs(a - b) for a, b in zip(*found, strict=True)) < tolerance


def test_trainer_computes_no_logits(tmp_path, monkeypatch):
    """Nothing in Trainer's training reads them, in mixed precision either, where outputs are cast to float32."""
    model = adapt(tiny.build("llama"), "lora", rank=4)
    monkeypatch.setattr(Logits, "values", lambda self: pytest.fail("computed"))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to="none", save_strategy="no"
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate).train()


@pytest.mark.parametrize(
    "settings", [{}, {"padding_free": False, "packing": True, "max_length": 16}], ids=["", "packed"]
)
@pytest.mark.filterwarnings("ignore")
def test_trl(settings, tmp_path):
    """TRL's `SFTTrainer` with its defaults (a head of its own, checkpointing) and its token accuracy."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    texts = datasets.Dataset.from_list([{"text": " ".join(f"w{(i * k) % 90}" for k in range(9))} for i in range(8)])
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = adapt(tiny.build("llama"), "lora", rank=4, lean=lean)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            logging_steps=1,
            per_device_train_batch_size=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            **settings,
        )
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=tiny.tokenizer())
        trainer.train()
        accuracy = [e["mean_token_accuracy"] for e in trainer.state.log_history if "mean_token_accuracy" in e]
        assert len(accuracy) == 4
        found.append(losses(trainer) + accuracy)
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < 1e-4


def test_token_accuracy_of_a_loop_that_reads_logits():
    """As TRL's older metric and many loops have it: the logits of the training forward, after the loss."""
    found = []
    for lean in (False, True):
        model = models.adapted("llama", lean=lean)
        inputs = models.batch("llama")
        out = model(**inputs)
        with torch.no_grad():
            right = out.logits[..., :-1, :].argmax(-1) == inputs["labels"][..., 1:]
        entropy = -(out.logits.detach().softmax(-1) * out.logits.detach().log_softmax(-1)).sum(-1)
        out.loss.backward()
        found.append((right, entropy))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.filterwarnings("ignore")
def test_accelerate(mixed):
    import accelerate

    found = []
    for lean in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=2)
        model = adapt(tiny.build("llama"), "lora", rank=4, lean=lean)
        optimizer = torch.optim.AdamW(param_groups(model))
        loader = torch.utils.data.DataLoader(rows(), batch_size=2, collate_fn=collate)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        seen = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(loss.item())
        found.append(seen)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < (2e-2 if mixed == "bf16" else 1e-5)


@pytest.mark.parametrize("wrapping", ["ddp static", "fsdp2", "fsdp2 parts"])
def test_two_processes(wrapping):
    """Gradients of two processes, each with half of the rows, are those of one without the lean step."""
    port = 20_000 + os.getpid() % 20_000
    settings = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(TESTS / "two_processes.py"), wrapping]
    processes = [
        subprocess.Popen(
            command, env={**settings, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
