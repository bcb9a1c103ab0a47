"""Does the lean step train the same, and how much sooner? A real encoder on real sentences, several seeds.

    python benchmarks/lean_training.py --data DATA/sst2 --output benchmarks/results/lean_training

all-MiniLM-L6-v2 with a bfloat16 base, LoRA of rank 16 on every linear layer, 2,000 phrases, one epoch, AdamW with
the method's own rates, warm-up of 10 % and linear decay; accuracy on 1,500 held-out phrases.

* `peft`: PEFT's own forward (`adapt(..., lean=False)`), on the same batches as `ours`;
* `peft, random batches`: the same on batches as a plain shuffle makes them, padded;
* `ours`: the lean step, on batches of rows of like length, as `finetune` makes them.

The three train side by side, one step each in turn, timed by the process's CPU seconds on one thread. A ratio of
seconds is that of whole epochs; the spread is that over seeds.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import provenance
import torch

KINDS = {"peft": False, "peft, random batches": False, "ours": True}


def accuracy(model: Any, batches: list[dict[str, Any]]) -> float:
    model.eval()
    right = total = 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            right += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
    model.train()
    return right / total


def train(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import get_linear_schedule_with_warmup, set_seed

    from lora_kit import adapt, base, demo, param_groups
    from lora_kit.training import data
    from lora_kit.training.batching import Collator, LengthGroups, padding_id, sort_for_measuring

    path = options.model or demo.model_path()
    tokenizer = base.tokenizer_of(path)
    rows = data.read(options.data, train_rows=options.train_rows)
    some, held_out = data.tokenize(rows, tokenizer, task="classification", max_length=256)
    collate, size = Collator(padding_id(tokenizer)), options.batch_size
    like = list(LengthGroups([row["length"] for row in some], size, seed))
    shuffled = random.Random(seed).sample(range(len(some)), len(some))

    def batches(order: list[int]) -> list[dict[str, Any]]:
        return [collate([some[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]

    given = {"peft": batches(like), "peft, random batches": batches(shuffled), "ours": batches(like)}
    count = len(given["ours"])
    parts: dict[str, Any] = {}
    for kind, lean in KINDS.items():
        set_seed(seed)
        model = adapt(
            path,
            "lora",
            task="classification",
            dtype=torch.bfloat16,
            lean=lean,
            model_kwargs={"num_labels": len(rows.labels)},
        )
        optimizer = torch.optim.AdamW(param_groups(model), fused=True)
        parts[kind] = model, optimizer, get_linear_schedule_with_warmup(optimizer, count // 10, count)
    seconds = dict.fromkeys(KINDS, 0.0)
    for step in range(count):
        for kind in KINDS if step % 2 else reversed(KINDS):
            model, optimizer, schedule = parts[kind]
            torch.manual_seed(1000 * seed + step)  # the same dropout for all
            start = time.process_time()
            model(**given[kind][step]).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[kind] += time.process_time() - start
            schedule.step()
    test = sort_for_measuring(held_out)
    measured = [collate(test[k : k + 64]) for k in range(0, len(test), 64)]
    return [
        {
            "kind": kind,
            "seed": seed,
            "steps": count,
            "step_seconds": seconds[kind] / count,
            "time": seconds[kind] / seconds["peft"],
            "time_of_random": seconds[kind] / seconds["peft, random batches"],
            "accuracy": accuracy(parts[kind][0], measured),
        }
        for kind in KINDS
    ]


def report(rows: list[dict[str, Any]], about: str) -> str:
    lines = [
        "| step | accuracy | seeds | CPU s a step | of PEFT's, same batches (spread) | of PEFT's, random batches |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        times = [row["time"] for row in mine]
        scores = [row["accuracy"] for row in mine]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        lines.append(
            f"| {kind} | {statistics.fmean(scores):.3f} ± {spread:.3f} | "
            f"{' '.join(f'{score:.3f}' for score in scores)} | "
            f"{statistics.fmean(row['step_seconds'] for row in mine):.3f} | "
            f"{statistics.median(times):.3f} ({min(times):.3f} – {max(times):.3f}) | "
            f"{statistics.median(row['time_of_random'] for row in mine):.3f} |"
        )
    return "# The lean step in training\n\n" + "\n".join(lines) + f"\n\n{about}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with train.csv and test.csv, columns text and label")
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="runs/lean-training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = provenance.facts("cpu")
    folder = Path(options.output)
    rows = []
    for seed in range(options.seeds):
        rows += train(seed, options)
        print(report(rows, ""), flush=True)
    provenance.write_rows(folder / "runs.jsonl", rows, facts)
    about = (
        f"{options.train_rows:,} rows, one epoch, batches of {options.batch_size}, one thread; "
        f"{provenance.sentence(facts)}"
    )
    (folder / "report.md").write_text(report(rows, about))


if __name__ == "__main__":
    sys.exit(main())
