"""Text generation with a decoder, under transformers' Trainer.

    python examples/text_generation_trainer.py --model Qwen/Qwen2.5-0.5B --quantization 4bit

What lora_kit does here: one call to adapt, and the method's own learning rate, weight decay and warm-up as
TrainingArguments. Trainer, data and collator are transformers' and datasets' own.
"""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from lora_kit import adapt, load, save, training_defaults
from lora_kit.demo import DATA

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
parser.add_argument("--method", default="lora")
parser.add_argument("--quantization", default=None)
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--rows", type=int, default=None)
parser.add_argument("--output", default="runs/text-generation")
parser.add_argument("--cpu", action="store_true")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
sentences = load_dataset("csv", data_files={"train": str(DATA / "train.csv")}, split="train")
if arguments.rows:
    sentences = sentences.select(range(arguments.rows))
sentences = sentences.map(
    lambda row: tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=64),
    remove_columns=sentences.column_names,
)

# The one call.
device = "cpu" if arguments.cpu else None
model = adapt(arguments.model, arguments.method, quantization=arguments.quantization, device=device)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=arguments.output + "-checkpoints",
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=8,
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        label_names=["labels"],
        use_cpu=arguments.cpu,
        dataloader_pin_memory=not arguments.cpu,
        **training_defaults(model),
    ),
    train_dataset=sentences,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()

folder = save(model, arguments.output)
again = load(
    folder, None if arguments.method == "full" else arguments.model, quantization=arguments.quantization, device=device
)
start = tokenizer("The delivery", return_tensors="pt").to(again.device)
written = again.generate(**start, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(f"saved in {folder}; it writes: {tokenizer.decode(written[0], skip_special_tokens=True)}")
