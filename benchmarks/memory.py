"""How far are plans from what is measured? Real steps on the CPU, depth, published figures, and the plan's own cost.

    python benchmarks/memory.py --output benchmarks/results/memory

* cells: architectures × methods × bases × dtypes × optimizers, with and without checkpointing and the lean step. A real
  step is run under torch's profiler, whose allocator events are an independent count of bytes, and compared with the
  plan for the CPU.
* depth: the plan, carried on from two shallow simulations, against the simulation of every layer.
* outside: figures that others measured on GPUs and published (`outside.json` says who and where).
* cost: seconds and resident memory of one `plan(...)` in a fresh process, import included.
* architectures: every architecture that can be built tiny, LoRA, live bytes.
* cuda (`--device cuda`): cells of Llama shapes, `max_memory_allocated` against the plan.
"""

import argparse
import csv
import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import provenance
import torch

HERE = Path(__file__).parent
WIDE = {"hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 16000}


def configs() -> dict[str, tuple[Any, str]]:
    """Name → (config, task): small models of eight families."""
    import transformers as tf

    gated = {"intermediate_size": 2816, "num_key_value_heads": 4, **WIDE}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "llama": (tf.LlamaConfig(num_hidden_layers=8, **gated), "causal-lm"),
        "qwen2": (tf.Qwen2Config(num_hidden_layers=8, tie_word_embeddings=True, **gated), "causal-lm"),
        "gpt2": (tf.GPT2Config(n_embd=1024, n_head=16, n_layer=8, vocab_size=16000, **ends), "causal-lm"),
        "neox": (tf.GPTNeoXConfig(num_hidden_layers=8, intermediate_size=4096, **ends, **WIDE), "causal-lm"),
        "gemma3": (
            tf.Gemma3TextConfig(num_hidden_layers=14, head_dim=64, sliding_window=64, **gated),
            "causal-lm",
        ),
        "mixtral": (tf.MixtralConfig(num_hidden_layers=5, num_local_experts=4, **gated), "causal-lm"),
        "bert": (tf.BertConfig(num_hidden_layers=8, intermediate_size=4096, **WIDE), "classification"),
        "t5": (
            tf.T5Config(
                d_model=1024, d_ff=2816, d_kv=64, num_heads=16, vocab_size=16000, num_layers=6, num_decoder_layers=5,
                decoder_start_token_id=0,
            ),
            "seq2seq-lm",
        ),
    }  # fmt: skip


# method, options, base, dtype, checkpointing, lean, the rest of the step
CELLS: tuple[tuple[str, dict[str, Any], str, str, bool, Any, dict[str, Any]], ...] = (
    ("lora", {}, "16bit", "bfloat16", False, True, {}),
    ("lora", {"dropout": 0.1, "experts": False}, "16bit", "bfloat16", True, False, {"padding": True}),
    ("lora", {}, "16bit", "float32", False, "low-memory", {"autocast": "bfloat16", "optimizer": "adamw_foreach"}),
    ("lora", {}, "4bit", "bfloat16", True, True, {"accumulation": 2}),
    ("lora", {}, "8bit", "float32", False, True, {"optimizer": "sgd"}),
    ("full", {}, "16bit", "bfloat16", False, True, {}),
    ("full", {"weights": "keep"}, "16bit", "bfloat16", True, False, {"optimizer": "adamw_loop"}),
    ("prefix", {}, "16bit", "bfloat16", False, True, {"padding": True}),
    ("prefix", {}, "4bit", "bfloat16", True, True, {"keep_outputs": True}),
)


def name_of(family: str, cell: Any) -> str:
    method, options, bits, dtype, checkpointing, lean, rest = cell
    parts = [family, method, *(f"{k}={v}" for k, v in options.items()), bits, dtype]
    parts += ["checkpointing"] * checkpointing + [f"lean={lean}"] + [f"{k}={v}" for k, v in rest.items()]
    return " ".join(parts)


def planned(family: str, cell: Any, rows: int, tokens: int) -> Any:
    from lora_kit.memory.plan import plan

    config, task = configs()[family]
    method, options, bits, dtype, checkpointing, lean, rest = cell
    return plan(
        config,
        method,
        task=task,
        quantization=None if bits == "16bit" else bits,
        batch_size=rows,
        seq_len=tokens,
        gradient_checkpointing=checkpointing,
        dtype=dtype,
        lean=lean,
        device="cpu",
        **rest,
        **options,
    )


def measured(plan: Any, device: str = "cpu") -> int:
    """Peak bytes of a real step after one that is not counted; on the CPU by the profiler's allocator events."""
    from lora_kit.memory import step as steps
    from lora_kit.memory.check import check, ready

    gc.collect()
    if device == "cuda":
        return int(check(plan).measured)
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        found = ready(plan)
        steps.run(*found)
        gc.collect()
        gc.disable()
        with record_function("the step"):
            steps.run(*found)
        gc.enable()
    events = seen.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == "the step")
    live = peak = 0
    for moment, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        if moment >= start:
            peak = max(peak, live)
    return peak


def cells(families: list[str], rows: int = 4, tokens: int = 256) -> list[dict[str, Any]]:
    found = []
    for family in families:
        for cell in CELLS:
            plan = planned(family, cell, rows, tokens)
            real = measured(plan)
            row = {
                "cell": name_of(family, cell), "measured": real, "planned": plan.peak,
                "error_percent": round(100 * (plan.peak / real - 1), 5), "at": plan.at,
            }  # fmt: skip
            found.append(row)
            print(f"{row['error_percent']:+9.4f} %  {row['cell']}", flush=True)
            del plan
    return found


def depth() -> list[dict[str, Any]]:
    """Carried on against simulated in full, at the depth and width of real models."""
    import transformers as tf

    from lora_kit.memory.cpu import CPU
    from lora_kit.memory.plan import plan
    from lora_kit.memory.simulate import simulate

    large = {
        "Llama-3-8B shape": tf.LlamaConfig(**LLAMA_8B),
        "Qwen2.5-7B shape": tf.Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064,
        ),
        "Gemma-3-4B shape": tf.Gemma3TextConfig(
            hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, vocab_size=262208,
        ),
        "GPT-NeoX-20B shape": tf.GPTNeoXConfig(),
        "Mixtral-8x7B shape": tf.MixtralConfig(),
        "T5-11B shape": tf.T5Config(
            d_model=1024, d_ff=65536, d_kv=128, num_heads=128, num_layers=24, decoder_start_token_id=0
        ),
    }  # fmt: skip
    found = []
    for name, config in large.items():
        for method, bits, checkpointing in (("lora", "4bit", True), ("prefix", None, False), ("full", None, True)):
            made = plan(
                config, method, quantization=bits, gradient_checkpointing=checkpointing, dtype="bfloat16", seq_len=512,
                device="cpu",
            )  # fmt: skip
            whole = simulate(made._blueprint, made._step, True, world=CPU).peak[1].bytes
            shape = f"{name} {method} {bits or '16bit'}"
            error = round(100 * (made.peak / whole - 1), 6)
            found.append({"model": shape, "carried_on": made.peak, "in_full": whole, "error_percent": error})
            print(f"{error:+.5f} %  {shape}", flush=True)
    return found


LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B["num_attention_heads"] = 64
LLAMA_3B = {**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
LLAMA_3B |= {"num_attention_heads": 24, "tie_word_embeddings": True}


def steady() -> list[dict[str, Any]]:
    """PEFT's own comparison on MetaMathQA: bytes allocated between two steps."""
    import peft
    import transformers as tf

    from lora_kit.memory.plan import plan

    known = json.loads((HERE / "outside.json").read_text())["peft_metamathqa"]
    task = {"task_type": "CAUSAL_LM"}
    methods: dict[str, Any] = {
        "lora r32 q,v": peft.LoraConfig(r=32, target_modules=["q_proj", "v_proj"], **task),
        "lora r64 q,v": peft.LoraConfig(r=64, target_modules=["q_proj", "v_proj"], **task),
        "lora r10 mlp": peft.LoraConfig(r=10, target_modules=["up_proj", "gate_proj", "down_proj"], **task),
        "full": "full",
        "prefix 200": peft.PrefixTuningConfig(num_virtual_tokens=200, **task),
        "prompt 200": peft.PromptTuningConfig(num_virtual_tokens=200, **task),
        "ln_tuning": peft.LNTuningConfig(**task),
    }

    def between(name: str, length: int) -> float:
        made = plan(
            tf.LlamaConfig(**LLAMA_3B), methods[name], dtype="bfloat16", batch_size=4, seq_len=length, padding=True,
            keep_outputs=True, use_cache=True, optimizer="adamw_foreach", lean=False,
            **({"weights": "keep"} if name == "full" else {}),
        )  # fmt: skip
        return made.phases["before gradients are freed"] / 2**20

    first = known["fitted_on"]
    low, high = between(first, 200), between(first, 264)
    length = round(200 + 64 * (known["steady_mib"][first] - low) / (high - low))
    found = []
    for name, published in known["steady_mib"].items():
        value = between(name, length)
        error = round(100 * (value / published - 1), 4)
        found.append({"method": name, "published_mib": published, "planned_mib": round(value, 1), "length": length,
                      "error_percent": error, "fitted": name == first})  # fmt: skip
        print(f"{error:+.4f} %  {name} (length {length})", flush=True)
    return found


def longest() -> list[dict[str, Any]]:
    """Unsloth's table of the longest context for transformers with flash attention: QLoRA of Llama 3.1, rank 32."""
    import dataclasses

    import transformers as tf

    from lora_kit.memory.fit import fit
    from lora_kit.memory.plan import made, plan

    known = json.loads((HERE / "outside.json").read_text())["unsloth_context"]
    found = []
    for size, config in (("8B", LLAMA_8B), ("70B", LLAMA_70B)):
        start = plan(
            tf.LlamaConfig(**config), "lora", rank=32, quantization="4bit", dtype="bfloat16", autocast="bfloat16",
            gradient_checkpointing=True, lean=False, optimizer="adamw_foreach", seq_len=512, keep_outputs=True,
        )  # fmt: skip
        fields = {f.name: getattr(start._blueprint, f.name) for f in dataclasses.fields(start._blueprint)}
        stock = made(stock_recipe()(**fields), start._axes, start._step, start.settings)
        for card, published in known[size].items():
            answer = fit(stock, f"{card}GB", "seq_len", step=16).largest
            error = round(100 * (answer / published - 1), 2)
            found.append({"model": size, "card_gib": int(card), "published": published, "planned": answer,
                          "error_percent": error})  # fmt: skip
            print(f"{error:+.2f} %  {size} on {card} GiB: {answer} planned, {published} published", flush=True)
    return found


def stock_recipe() -> Any:
    """The blueprint of the recipe as it was in 2024: k-bit preparation (all that is not quantized in float32), products
    under autocast, logits cast to float32 in the model."""
    from lora_kit.memory.blueprint import Blueprint

    class Stock(Blueprint):
        def build(self, depths: Any = None) -> Any:
            model = super().build(depths)
            for parameter in model.parameters():
                if parameter.dtype == torch.bfloat16 and not parameter.requires_grad:
                    parameter.data = parameter.data.float()
            model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
            model.get_base_model().loss_function = shifted_loss
            return model

    return Stock


def shifted_loss(logits: Any, labels: Any, vocab_size: int, **rest: Any) -> Any:
    """The loss as transformers' models wrote it in 2024, with a copy of the logits but the last."""
    shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
    return torch.nn.functional.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))


def cost() -> list[dict[str, Any]]:
    """One plan in a fresh process, from a folder with a config."""
    import transformers as tf

    found = []
    for name, config in (("Llama-3-8B shape", LLAMA_8B), ("Llama-3-70B shape", LLAMA_70B)):
        for arguments in (
            "'lora', quantization='4bit', gradient_checkpointing=True, seq_len=4096",
            "'full', gradient_checkpointing=True, seq_len=4096",
            "'prefix', seq_len=4096",
        ):
            with tempfile.TemporaryDirectory() as folder:
                tf.LlamaConfig(**config, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
                code = (
                    f"import time; t = time.perf_counter(); import lora_kit; lora_kit.plan({folder!r}, {arguments}); "
                    "s = time.perf_counter() - t; import resource; "
                    "print(s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
                )
                command = [sys.executable, "-W", "ignore", "-c", code]
                runs = []
                for _ in range(3):
                    run = subprocess.run(command, capture_output=True, text=True, check=True)
                    runs.append([float(word) for word in run.stdout.split()[-2:]])
            seconds = sorted(run[0] for run in runs)
            row = {"plan": f"{name} {arguments}", "seconds": round(seconds[1], 2), "least": round(seconds[0], 2),
                   "most": round(seconds[2], 2), "resident_bytes": int(max(run[1] for run in runs))}  # fmt: skip
            found.append(row)
            print(row, flush=True)
    return found


def cuda() -> list[dict[str, Any]]:
    """Real steps of Llama shapes on this machine's GPU."""
    import transformers as tf

    from lora_kit.memory.plan import plan

    config = tf.LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": 8})
    found = []
    for method, bits, checkpointing, lean, optimizer in (
        ("lora", None, False, True, "adamw"), ("lora", None, False, False, "adamw"),
        ("lora", None, True, True, "adamw"), ("lora", None, True, False, "adamw"),
        ("lora", None, False, "low-memory", "adamw"), ("lora", "4bit", False, True, "adamw"),
        ("lora", "4bit", True, False, "adamw"), ("lora", "8bit", True, True, "adamw"),
        ("prefix", None, False, True, "adamw"), ("prefix", "4bit", True, True, "adamw"),
        ("full", None, True, True, "adamw"), ("full", None, False, False, "adamw_foreach"),
        ("lora", None, False, True, "adamw_8bit"),
    ):  # fmt: skip
        made = plan(
            config, method, quantization=bits, gradient_checkpointing=checkpointing, lean=lean, optimizer=optimizer,
            dtype="bfloat16", batch_size=2, seq_len=1024,
        )  # fmt: skip
        torch.cuda.empty_cache()
        real = measured(made, "cuda")
        name = f"{method} {bits or '16bit'} {'checkpointing ' if checkpointing else ''}lean={lean} {optimizer}"
        error = round(100 * (made.peak / real - 1), 3)
        found.append({"cell": name, "measured": real, "planned": made.peak, "error_percent": error, "at": made.at})
        print(f"{error:+.3f} %  {name}", flush=True)
    return found


def architectures() -> list[dict[str, Any]]:
    """Tiny models of every architecture in transformers' tables: the plan against the live bytes of a LoRA step."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import architectures as tiny

    found = []
    for task in ("causal-lm", "seq2seq-lm", "classification"):
        for name in tiny.architectures(task):
            row: dict[str, Any] = {
                "architecture": name,
                "task": task,
                "measured": "",
                "planned": "",
                "error_percent": "",
            }
            row["why_not"] = ""
            found.append(row)
            signal.alarm(120)
            try:
                _one_architecture(row, tiny.recipe(name, task).config, task)
            except Exception as error:  # whatever it is, it is the row's
                row["why_not"] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            finally:
                signal.alarm(0)
            gc.collect()
            print(row, flush=True)
    return found


def _one_architecture(row: dict[str, Any], config: Any, task: str) -> None:
    import dataclasses

    from lora_kit.memory.check import check
    from lora_kit.memory.plan import plan
    from lora_kit.memory.simulate import World, at_depth

    made = plan(config, "lora", task=task, rank=4, seq_len=16, batch_size=2, device="cpu", dtype="float32")
    # what operations take while they run is no tensor, and live bytes are what is measured here
    trace = at_depth(made._blueprint, made._axes, made._step, True, world=World())
    row["planned"] = trace.peak[1].bytes
    row["measured"] = check(dataclasses.replace(made, peak=row["planned"])).measured
    row["error_percent"] = round(100 * (row["planned"] / row["measured"] - 1), 4)


PARTS = {
    "cells": lambda: cells(list(configs())),
    "depth": depth,
    "steady": steady,
    "longest": longest,
    "cost": cost,
    "architectures": architectures,
    "cuda": cuda,
}


def report(folder: Path) -> str:
    """All parts that were run, each with where it comes from."""
    lines = ["# Plans against what is measured", ""]
    for part in PARTS:
        file = folder / f"{part}.csv"
        if not file.exists():
            continue
        with file.open(newline="") as rows_of:
            rows = list(csv.DictReader(rows_of))
        errors = [
            abs(float(row["error_percent"])) for row in rows if row.get("error_percent") and row.get("fitted") != "True"
        ]
        lines.append(f"## {part}")
        if errors:
            middle, worst = statistics.median(errors), max(errors)
            lines.append(f"\nMedian error {middle:.4f} %, worst {worst:.4f} %, {len(errors)} rows.")
        lines += ["", (folder / f"{part}.txt").read_text().strip(), ""]
        if part == "architectures":
            rows = [row for row in rows if not row["error_percent"] or abs(float(row["error_percent"])) > 0]
            lines += ["Rows with an error, or without a plan; the others are in architectures.csv:", ""]
        if rows:
            lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(_readable(value) for value in row.values()) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _readable(value: str) -> str:
    return f"{int(value):,}" if value.isdigit() else value.replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts to run, with commas: {', '.join(PARTS)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default="runs/memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    facts = provenance.facts(options.device)
    wanted = options.only.split(",") if options.only else [part for part in PARTS if part != "cuda"]
    for part in ["cuda"] if options.device == "cuda" else wanted:
        started = time.perf_counter()
        rows = PARTS[part]()
        with (folder / f"{part}.csv").open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (folder / f"{part}.txt").write_text(provenance.sentence(facts) + "\n")
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    (folder / "report.md").write_text(report(folder))


if __name__ == "__main__":
    main()
