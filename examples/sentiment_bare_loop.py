"""Sentiment classification with an encoder, in a bare PyTorch loop of one's own.

    python examples/sentiment_bare_loop.py --method lora
    python examples/sentiment_bare_loop.py --method prefix --quantization 4bit

What lora_kit does here: one call to adapt, the method's own learning rates, save and load. The loop is yours.
"""

import argparse
import csv
import random

import torch
from transformers import AutoTokenizer

from lora_kit import adapt, load, param_groups, save
from lora_kit.demo import DATA, model_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--method", default="lora")
parser.add_argument("--quantization", default=None)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--rows", type=int, default=None)
parser.add_argument("--output", default="runs/sentiment")
arguments = parser.parse_args()

torch.manual_seed(0)
random.seed(0)


def read(name):
    with (DATA / name).open() as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


train, test = read("train.csv")[: arguments.rows], read("test.csv")[: arguments.rows]
labels = ["negative", "neutral", "positive"]
tokenizer = AutoTokenizer.from_pretrained(model_path())


def batch(rows):
    made = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    return made | {"labels": torch.tensor([labels.index(label) for _, label in rows])}


# The one call. The checkpoint has no classification head: it gets one, which is trained and saved with the adapter.
model = adapt(
    model_path(),
    arguments.method,
    quantization=arguments.quantization,
    task="classification",
    dtype="float32" if arguments.method == "full" else "bfloat16",
    device="cpu",
    model_kwargs={"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}},
)
optimizer = torch.optim.AdamW(param_groups(model))
steps = arguments.epochs * -(-len(train) // 16)
warm_up = max(1, steps // 10)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
)


def accuracy():
    model.eval()
    with torch.no_grad():
        right = [
            (model(**(b := batch(test[i : i + 32]))).logits.argmax(-1) == b["labels"]) for i in range(0, len(test), 32)
        ]
    model.train()
    return torch.cat(right).float().mean().item()


print(f"accuracy before: {accuracy():.3f}")
for epoch in range(arguments.epochs):
    random.shuffle(train)
    for start in range(0, len(train), 16):
        loss = model(**batch(train[start : start + 16])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}, accuracy {accuracy():.3f}")

folder = save(model, arguments.output)
base = None if arguments.method == "full" else model_path()
again = load(
    folder,
    base,
    quantization=arguments.quantization,
    dtype="float32" if arguments.method == "full" else "bfloat16",
    device="cpu",
)
text = "What a lovely hotel, the staff were so kind and we will be back."
said = again(**tokenizer(text, return_tensors="pt")).logits.argmax(-1).item()
print(f"saved in {folder}; {text!r} is {again.config.id2label[said]}")
