"""What the lean step saves: seconds and live bytes of a LoRA training step, ours against plain PEFT's.

    python benchmarks/step.py --output benchmarks/results/step

Three tables, each measured in turn within one process:

* `shapes`: plain PEFT, PEFT with activation checkpointing, full fine-tuning; `adapt` as it is, with
  `lean="low-memory"`, with activation checkpointing on top, and with dropout 0.1 beside PEFT's own with it.
* `4bit`: the stock recipe (`prepare_model_for_kbit_training`, without and with its checkpointing) and `adapt` on an
  NF4 base.
* `ragged`: an epoch of 2,048 rows whose lengths are drawn from a log-normal distribution with a mean of 160 tokens:
  plain PEFT on random padded batches, the same on rows of like length, ours likewise, and ours packed. Some batches of
  each order are timed, from the shortest to the longest in equal strides, and scaled to all the tokens.

Random weights of the shapes of Qwen2.5-0.5B's layers in a Llama (width 896, 14 heads on 2 key heads, MLP 4864), fewer
layers; LoRA of rank 16 on every linear layer, float32 adapters. A step is forward, backward, clipping and fused AdamW.
Kinds are timed in turn, by the process's CPU seconds on one thread (on a GPU by the clock, synchronized); a ratio is
the median over rounds of one kind's seconds by the first kind's of the same round. `beyond` is the peak of live bytes
minus weights, adapters and optimizer states, counted in a step of its own. The matmul share is 4 operations for each
weight and token, and those of attention, by the seconds and the rate at which this machine multiplies matrices of
these shapes.
"""

import argparse
import functools
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import provenance
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = ((2, 256), (1, 1024), (1, 2048))
VOCABULARIES = (32_000, 128_256)
BEFORE_COUNTING = 1  # rounds that are not counted
LENGTHS = (4.755, 0.8)  # of log-normal lengths, mean 160
GROUPS = {
    "shapes": [
        "peft",
        "peft + checkpointing",
        "full",
        "ours",
        "ours low-memory",
        "ours + checkpointing",
        "peft dropout 0.1",
        "ours dropout 0.1",
    ],
    "4bit": ["stock 4bit", "stock 4bit + checkpointing", "ours 4bit"],
    "ragged": ["peft random", "peft by length", "ours by length", "ours packed"],
}


def base(options: argparse.Namespace, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def peft_lora(model: Any, rank: int, dropout: float = 0.0) -> Any:
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).train()


def model_of(kind: str, options: argparse.Namespace, vocabulary: int) -> Any:
    import peft

    from lora_kit import adapt
    from lora_kit.quantization import quantize_, resolve

    model = base(options, vocabulary)
    checkpointing = kind.endswith("+ checkpointing")
    dropout = 0.1 if "dropout" in kind else 0.0
    if kind == "full":
        return adapt(model, "full", weights="keep", lean=False)
    if kind.startswith("stock 4bit"):
        quantize_(model, resolve("4bit"), [])
        model.is_loaded_in_4bit = True
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        return peft_lora(model, options.rank)
    if kind.startswith("peft"):
        adapted = peft_lora(model, options.rank, dropout)
    else:
        adapted = adapt(
            model,
            "lora",
            rank=options.rank,
            dropout=dropout,
            quantization="4bit" if "4bit" in kind else None,
            lean="low-memory" if "low-memory" in kind else True,
        )
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.enable_input_require_grads()
    return adapted


def step_of(model: Any) -> tuple[Callable[[dict[str, Any]], None], Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(runs: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each kind, a number a round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(options.rounds + BEFORE_COUNTING):
        for kind in runs if turn % 2 else reversed(runs):
            start = clock(options.device)
            runs[kind]()
            if turn >= BEFORE_COUNTING:
                seconds[kind].append(clock(options.device) - start)
    return seconds


def peak_of(run: Callable[[], None], model: Any, optimizer: Any, device: str) -> tuple[int, int]:
    """(bytes at the peak beyond what stays, bytes that stay)."""
    from lora_kit.memory.tracker import PeakBytes, resident_tensors

    run()
    gc.collect()
    resident = resident_tensors(model, optimizer)
    stays = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in resident}.values())
    if device != "cpu":
        stays = torch.cuda.memory_allocated()
    with PeakBytes(device, resident) as memory:
        run()
    return memory.peak - stays, stays


def rows_of(
    group: str,
    kinds: list[str],
    seconds: dict[str, list[float]],
    peaks: dict[str, tuple[int, int]],
    **facts: Any,
) -> list[dict[str, Any]]:
    found = []
    for kind in kinds:
        ratios = [a / b for a, b in zip(seconds[kind], seconds[kinds[0]], strict=True)]
        found.append(
            {
                "table": group,
                "kind": kind,
                **facts,
                "seconds": statistics.median(seconds[kind]),
                "time": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "beyond_bytes": peaks[kind][0],
                "resident_bytes": peaks[kind][1],
                "bytes": peaks[kind][0] / peaks[kinds[0]][0],
            }
        )
    return found


def matmul_rate(options: argparse.Namespace, tokens: int) -> float:
    """Operations a second of the MLP's products at so many tokens, the median of several."""
    x = torch.randn(tokens, options.width, device=options.device).to(torch.bfloat16)
    weight = torch.randn(options.inner, options.width, device=options.device).to(torch.bfloat16)
    rates = []
    for _ in range(9):
        start = clock(options.device)
        for _ in range(4):
            y = x @ weight.t()
        rates.append(4 * 2 * tokens * weight.numel() / (clock(options.device) - start))
        del y
    return statistics.median(rates)


def operations(model: Any, options: argparse.Namespace, vocabulary: int, rows: int, tokens: int) -> float:
    """Of a step that trains no base weight: forward and the gradient of the inputs, and causal attention."""
    inner = sum(p.numel() for n, p in model.named_parameters() if "proj" in n and "lora_" not in n)
    products = 4 * (inner + vocabulary * options.width) * rows * tokens
    attention = options.layers * 3 * 2 * 2 * rows * tokens * tokens * options.width / 2
    return products + attention


def shapes(options: argparse.Namespace, kinds: list[str], group: str) -> list[dict[str, Any]]:
    found = []
    for vocabulary in options.vocabularies:
        models = {kind: model_of(kind, options, vocabulary) for kind in kinds}
        steps = {kind: step_of(model) for kind, model in models.items()}
        for rows, length in options.shapes:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (rows, length), generator=generator).to(options.device)
            batch = {"input_ids": ids, "labels": ids}
            runs = {kind: functools.partial(step[0], batch) for kind, step in steps.items()}
            seconds = in_turn(runs, options)
            peaks = {kind: peak_of(runs[kind], models[kind], steps[kind][1], options.device) for kind in kinds}
            rate = matmul_rate(options, rows * length)
            done = rows_of(group, kinds, seconds, peaks, vocabulary=vocabulary, rows=rows, tokens=length)
            for row in done:
                if row["kind"] in ("peft", "ours"):
                    work = operations(models[row["kind"]], options, vocabulary, rows, length)
                    row["matmul_share"] = work / row["seconds"] / rate
            found += done
            print(table(done), flush=True)
    return found


def ragged(options: argparse.Namespace, kinds: list[str], group: str) -> list[dict[str, Any]]:
    from lora_kit.training.batching import Collator, LengthGroups, Packer

    draw = random.Random(0)
    lengths = [max(8, min(1024, round(draw.lognormvariate(*LENGTHS)))) for _ in range(options.ragged_rows)]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, options.vocabularies[0], (n,), generator=generator).tolist() for n in lengths]
    data = [{"input_ids": row, "labels": row, "length": len(row)} for row in rows]
    size = 8
    orders = {
        "random": draw.sample(range(len(data)), len(data)),
        "by length": list(LengthGroups(lengths, size, seed=0)),
    }
    orders["packed"] = orders["random"]
    models = {kind: model_of(kind, options, options.vocabularies[0]) for kind in kinds}
    steps = {kind: step_of(model) for kind, model in models.items()}
    runs, shares, tokens = {}, {}, {}
    for kind in kinds:
        order = orders[kind.partition(" ")[2]]
        collate = Packer() if "packed" in kind else Collator(0)
        whole = [order[k : k + size] for k in range(0, len(order), size)]
        # some batches that stand for all: from the shortest to the longest in equal strides
        whole.sort(key=lambda some: max(lengths[i] for i in some))
        stride = len(whole) / options.ragged_batches
        chosen = [whole[int((k + 0.5) * stride)] for k in range(options.ragged_batches)]
        batches = [collate([data[i] for i in some]) for some in chosen]
        batches = [
            {key: value.to(options.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            for batch in batches
        ]
        padded = sum(size * max(lengths[i] for i in some) for some in whole)
        shares[kind] = 1.0 if "packed" in kind else sum(lengths) / padded
        tokens[kind] = sum(lengths[i] for some in chosen for i in some)

        def epoch(kind: str = kind, batches: list[dict[str, Any]] = batches) -> None:
            for batch in batches:
                steps[kind][0](batch)

        runs[kind] = epoch
    seconds = in_turn(runs, options)
    peaks = {kind: peak_of(runs[kind], models[kind], steps[kind][1], options.device) for kind in kinds}
    # as many tokens for all: what an epoch takes
    seconds = {kind: [s * sum(lengths) / tokens[kind] for s in some] for kind, some in seconds.items()}
    found = rows_of(group, kinds, seconds, peaks, vocabulary=options.vocabularies[0], rows=size, tokens=None)
    for row in found:
        row["real_tokens"] = shares[row["kind"]]
    print(table(found), flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| vocabulary | batch × tokens | step | seconds | time (spread) | beyond MB | beyond | matmul share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["spread"]
        share = f"{row['matmul_share']:.2f}" if "matmul_share" in row else ""
        if row["tokens"] is None:
            shape = f"{row['rows']} rows, {100 * row['real_tokens']:.0f} % of tokens real"
        else:
            shape = f"{row['rows']} × {row['tokens']}"
        lines.append(
            f"| {row['vocabulary']:,} | {shape} | {row['kind']} | {row['seconds']:.3f} | {row['time']:.3f} "
            f"({low:.3f} – {high:.3f}) | {row['beyond_bytes'] / 1e6:.1f} | {row['bytes']:.3f} | {share} |"
        )
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], about: str) -> str:
    text = "# What the lean step saves\n\nRatios to the first row of each group.\n"
    for group in GROUPS:
        some = [row for row in rows if row["table"] == group]
        if some:
            text += f"\n## {group}\n\n{table(some)}\n"
    return f"{text}\n{about}\n"


def rounds_and_commits(rows: list[dict[str, Any]]) -> str:
    """How often each table was measured, and from which commit."""
    found = dict.fromkeys((row["table"], row["rounds"], row["commit"]) for row in rows)
    return "; ".join(f"`{table}`: {rounds} rounds, commit {commit}" for table, rounds, commit in found) + "."


def shape(word: str) -> tuple[int, int]:
    rows, _, tokens = word.partition("x")
    return int(rows), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--kinds", nargs="+", help="some rows of the groups only; the first is what ratios are of")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--inner", type=int, default=4864)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--shapes", nargs="+", type=shape, default=list(SHAPES), help="rows x tokens, such as 2x256")
    parser.add_argument("--ragged-rows", type=int, default=2048)
    parser.add_argument("--ragged-batches", type=int, default=6, help="how many of an epoch are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="runs/step")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    facts = provenance.facts(options.device)
    folder = Path(options.output)
    file = folder / "steps.jsonl"
    # groups that are not measured now stay as they are
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [row for row in rows if row["table"] not in options.groups]
    for group in options.groups:
        kinds = [kind for kind in GROUPS[group] if options.kinds is None or kind in options.kinds]
        found = (ragged if group == "ragged" else shapes)(options, kinds, group)
        rows += [{**row, **facts, "rounds": options.rounds} for row in found]
        provenance.write_rows(file, rows, {})
    about = (
        f"{options.layers} layers of width {options.width}, MLP {options.inner}, rank {options.rank}, bfloat16 base, "
        f"one thread. {rounds_and_commits(rows)} {provenance.sentence(facts)}"
    )
    (folder / "report.md").write_text(report(rows, about))


if __name__ == "__main__":
    sys.exit(main())
