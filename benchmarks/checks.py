"""What `verify` and `guard` cost and find, and what full fine-tuning of a bfloat16 model loses.

    python benchmarks/checks.py --output benchmarks/results/checks

* `verify`: seconds of one pre-flight on a real encoder (all-MiniLM-L6-v2, three classes, 8 sentences), CPU time of the
  process on one thread, model loaded before; medians of a few runs and their spread.
* `full`: the share of a bfloat16 model's weights that are bit by bit what they were after 20 steps at 1e-5, of those
  that had a gradient: transformers' way (AdamW on the bfloat16 weights), float32 weights (`adapt(model, "full")`), and
  stochastic rounding (`weights="stochastic"`), for which beside it what was moved in all over what AdamW wanted.
* `split`: the distance of a step's gradient, run in parts after a lack of memory, from the whole's: largest relative
  error over methods, rows of unequal length and labels.
"""

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import provenance
import torch

RUNS = 5
STEPS, RATE = 20, 1e-5


def llama(dtype: torch.dtype, width: int = 128) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(dtype)


def texts(rows: int, length: int, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens of unequal length, the first half of each row without labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=draw)
    lengths = torch.randint(length // 3, length + 1, (rows,), generator=draw)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(length) < lengths[:, None] // 2), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def verify_seconds() -> Iterator[dict[str, Any]]:
    import csv

    from transformers import AutoTokenizer

    from lora_kit import adapt, param_groups, verify
    from lora_kit.base import head_for
    from lora_kit.demo import DATA, model_path

    with (DATA / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:8]
    names = ["negative", "neutral", "positive"]
    batch = dict(
        AutoTokenizer.from_pretrained(model_path())([r["text"] for r in rows], padding=True, return_tensors="pt")
    )
    batch["labels"] = torch.tensor([names.index(row["label"]) for row in rows])
    for method in ("lora", "prefix", "full"):
        model = adapt(str(model_path()), method, task="classification", model_kwargs=head_for(names))
        optimizer = torch.optim.AdamW(param_groups(model))
        seconds = []
        for _ in range(RUNS):
            started = time.process_time()
            report = verify(model, batch, optimizer=optimizer)
            seconds.append(time.process_time() - started)
        yield {
            "part": "verify",
            "case": method,
            "seconds": round(statistics.median(seconds), 2),
            "from": round(min(seconds), 2),
            "to": round(max(seconds), 2),
            "checks": len(report.checks),
            "failed": len(report.failed),
            "warned": len(report.warned),
        }


def updates_lost() -> Iterator[dict[str, Any]]:
    from lora_kit import adapt
    from lora_kit.lean.optimizer import AdamW

    for weights in ("keep", "float32", "stochastic"):
        model = adapt(llama(torch.bfloat16), "full", weights=weights)
        truth = llama(torch.bfloat16).float().train()
        kind = AdamW if weights == "stochastic" else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=RATE, weight_decay=0.0)
        exact = torch.optim.AdamW(truth.parameters(), lr=RATE, weight_decay=0.0)
        before = [p.detach().double().clone() for p in model.parameters()]
        had = [torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()]
        for step in range(STEPS):
            batch = texts(8, 48, 512, step)
            for each, steps in ((model, optimizer), (truth, exact)):
                each(**batch).loss.backward()
                if each is model:
                    for mask, p in zip(had, model.parameters(), strict=True):
                        mask |= p.grad != 0
                steps.step()
                steps.zero_grad()
        still = moved = wanted = 0.0
        for mask, start, p, goal in zip(had, before, model.parameters(), truth.parameters(), strict=True):
            change, aim = p.detach().double() - start, goal.detach().double() - start
            still += float(((change == 0) & mask).sum())
            # along the direction that was wanted: chance moves as far up as down
            moved += float((change * aim.sign()).sum())
            wanted += float(aim.abs().sum())
        yield {
            "part": "full",
            "case": weights,
            "unmoved percent": round(100 * still / sum(int(mask.sum()) for mask in had), 3),
            "moved of wanted": round(moved / wanted, 4),
        }


def split_gradients() -> Iterator[dict[str, Any]]:
    from lora_kit import adapt, guard, param_groups

    for method in ("lora", "prefix", "full"):
        worst = 0.0
        for seed in range(3):
            model = adapt(llama(torch.float32), method)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.normal_(0, 0.05)
            batch = texts(7, 37, 512, seed)
            model(**batch).loss.backward()
            whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            model.zero_grad()

            def full(module: Any, arguments: Any) -> None:
                if arguments[0].shape[0] > 2:
                    raise torch.OutOfMemoryError("out of memory, on purpose")

            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            inner.model.layers[2].mlp.register_forward_pre_hook(full)
            with guard(model, torch.optim.AdamW(param_groups(model))) as step:
                step(batch)
            parts = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            worst = max(worst, float((parts - whole).norm() / whole.norm()))
        yield {"part": "split", "case": method, "relative error": float(f"{worst:.2g}")}


PARTS = {"verify": verify_seconds, "full": updates_lost, "split": split_gradients}


def report(rows: list[dict[str, Any]], about: str) -> str:
    lines = ["# What verify and guard cost and find", ""]
    for part in PARTS:
        mine = [{k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part]
        if mine:
            names = list(mine[0])
            lines += [f"## {part}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
            lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in mine]
            lines.append("")
    return "\n".join([*lines, about, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--output", default="runs/checks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lora_kit").setLevel("ERROR")
    rows = []
    for part in options.parts:
        for row in PARTS[part]():
            rows.append(row)
            print(row, flush=True)
    facts = provenance.facts("cpu")
    provenance.write_rows(Path(options.output) / "checks.jsonl", rows, facts)
    about = f"One thread, other programs beside; {provenance.sentence(facts)}"
    (Path(options.output) / "report.md").write_text(report(rows, about))


if __name__ == "__main__":
    sys.exit(main())
