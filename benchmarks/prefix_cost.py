"""What a prefix costs: seconds and live bytes of a training step, beside the least that any method needs.

    python benchmarks/prefix_cost.py --output benchmarks/results/prefix_cost

* `frozen`: the model without an adapter, forward and backward to its embeddings; no method that trains something in
  the first layer can do less.
* `prefix`, `lora`: `adapt` with its defaults, a whole step of AdamW.
* `peft prefix`: plain PEFT's, in the key/value cache.

Random weights of the shapes of Qwen2.5-0.5B's layers (width 896, 14 heads on 2 key heads), fewer of them and of the
vocabulary. Steps are taken in turn, each timed by the process's CPU seconds on one thread; a ratio is the median over
rounds of one step's seconds by the `frozen` step's of the same round. Bytes are live tensors at the peak of a step,
weights included, counted in a step of their own.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import provenance
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = ((4, 256), (1, 2048))
TOKENS = 20
BEFORE_COUNTING = 2  # rounds that are not counted


def base(dtype: torch.dtype, layers: int, vocabulary: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def model_of(kind: str, dtype: torch.dtype, layers: int, vocabulary: int) -> Any:
    import peft

    from lora_kit import adapt

    model = base(dtype, layers, vocabulary)
    if kind == "frozen":
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model.train()
    if kind == "peft prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
        return peft.get_peft_model(model, config).train()
    return adapt(model, kind, **({"num_virtual_tokens": TOKENS} if kind == "prefix" else {}))


def step_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], None], Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, optimizer


def measure(dtype: str, rows: int, length: int, kinds: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    from lora_kit.memory.tracker import PeakBytes, resident_tensors

    ids = torch.randint(options.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    models = {kind: model_of(kind, DTYPES[dtype], options.layers, options.vocabulary) for kind in kinds}
    steps = {kind: step_of(model, batch) for kind, model in models.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(options.rounds + BEFORE_COUNTING):
        for kind in kinds if round_ % 2 else reversed(kinds):
            start = time.process_time()
            steps[kind][0]()
            if round_ >= BEFORE_COUNTING:
                seconds[kind].append(time.process_time() - start)
    found = []
    for kind in kinds:
        step, optimizer = steps[kind]
        with PeakBytes("cpu", resident_tensors(models[kind], optimizer)) as memory:
            step()
        ratios = [a / b for a, b in zip(seconds[kind], seconds["frozen"], strict=True)]
        found.append(
            {
                "method": kind,
                "dtype": dtype,
                "rows": rows,
                "tokens": length,
                "seconds": statistics.median(seconds[kind]),
                "ratio": statistics.median(ratios),
                "quartiles": [statistics.quantiles(ratios, n=4)[i] for i in (0, 2)],
                "peak_bytes": memory.peak,
            }
        )
    return found


def report(rows: list[dict[str, Any]], about: str) -> str:
    lines = [
        "| dtype | batch × tokens | method | step s | of frozen (quartiles) | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['dtype']} | {row['rows']} × {row['tokens']} | {row['method']} | {row['seconds']:.3f} | "
            f"{row['ratio']:.3f} ({low:.3f} – {high:.3f}) | {row['peak_bytes'] / 1e6:.1f} |"
        )
    return "# What a prefix costs\n\n" + "\n".join(lines) + f"\n\n{about}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--methods", nargs="+", default=["prefix", "lora", "peft prefix"])
    parser.add_argument("--output", default="runs/prefix-cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = provenance.facts("cpu")
    folder = Path(options.output)
    rows = []
    for dtype in options.dtypes:
        for shape in SHAPES:
            rows += measure(dtype, *shape, ["frozen", *options.methods], options)
            print(report(rows[-1 - len(options.methods) :], ""), flush=True)
    provenance.write_rows(folder / "steps.jsonl", rows, facts)
    about = (
        f"{options.layers} layers of width 896, vocabulary {options.vocabulary:,}, {TOKENS} virtual tokens, "
        f"{options.rounds} rounds, one thread; {provenance.sentence(facts)}"
    )
    (folder / "report.md").write_text(report(rows, about))


if __name__ == "__main__":
    sys.exit(main())
