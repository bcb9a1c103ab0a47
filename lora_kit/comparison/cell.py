"""One run of the comparison, in a process of its own: clean peaks, and a run out of memory is a row, not a crash.

`python -m lora_kit.comparison.cell spec.json row.json` trains what the spec says and writes the row. Its standard
output is for the parent: one JSON object a line, with the steps done.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SKIPPED_STEPS = 2
"""Steps at the start that do not count as steady: allocators fill and kernels are chosen."""


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one method on one base with one seed, and measure it."""
    import transformers

    from lora_kit import base
    from lora_kit.adaptation import adapt, record_of
    from lora_kit.methods import resolve
    from lora_kit.storage.save import save
    from lora_kit.training import data
    from lora_kit.training.finetune import TASK_OF_KIND, build_trainer, head_for, measure
    from lora_kit.training.metrics import HEADLINE

    rows = data.read(spec["data"], test=spec["test_data"], train_rows=spec["train_rows"], test_rows=spec["test_rows"])
    transformers.set_seed(spec["seed"])
    method = resolve(spec["method"], spec["options"]).start_from(rows.texts(20))
    model = adapt(
        spec["model"],
        method,
        quantization=None if spec["quantization"] == "16bit" else spec["quantization"],
        task=TASK_OF_KIND[rows.kind],
        dtype=spec["dtype"],
        device=spec["device"],
        model_kwargs=head_for(rows),
    )
    record = record_of(model)
    tokenizer = base.tokenizer_of(spec["model"])
    clock = _clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(
            model,
            rows,
            tokenizer,
            scratch,
            epochs=spec["epochs"],
            batch_size=spec["batch_size"],
            max_length=spec["max_length"],
            learning_rate=spec["learning_rate"],
            seed=spec["seed"],
            callbacks=[clock],
            training_arguments={"include_num_input_tokens_seen": "non_padding", "disable_tqdm": True},
        )
        before = measure(trainer, without_adapter=True)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = measure(trainer)
        saved = save(model, Path(scratch) / "saved")
        on_disk = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        peak = measure_peak(trainer)
    steady = clock.seconds[SKIPPED_STEPS:] or clock.seconds
    tokens = clock.tokens[SKIPPED_STEPS:] or clock.tokens
    rate = trainer.args.learning_rate if spec["learning_rate"] is None else spec["learning_rate"]
    return {
        "status": "ok",
        "task": record.task,
        "metric": HEADLINE[record.task or ""],
        "size": method.size,
        "before": before,
        "after": after,
        "train_seconds": seconds,
        "step_seconds": statistics.median(steady),
        "tokens_per_second": sum(tokens) / sum(steady),
        "steps": len(clock.seconds),
        "peak_bytes": peak,
        "peak_of": "allocated on CUDA" if model.device.type == "cuda" else "live tensors",
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": record.parameters,
        "saved_bytes": on_disk,
        "learning_rate": rate,
        "train_rows_used": len(rows.train) if rows.kind != "document" else len(trainer.train_dataset),
        "test_rows_used": len(rows.test) if rows.kind != "document" else len(trainer.eval_dataset),
        "machine": machine(model.device.type),
    }


def measure_peak(trainer: Any) -> int:
    """Peak bytes of one whole training step on the longest rows, with every optimizer state in place.

    It is taken after training, saving and evaluation, so that watching it slows nothing down and changes no result.
    """
    from lora_kit.memory.tracker import PeakBytes, resident_tensors

    model, optimizer = trainer.model, trainer.optimizer
    longest = sorted(trainer.train_dataset, key=lambda row: -row["length"])[: trainer.args.train_batch_size]
    batch = trainer.data_collator(longest)
    optimizer.zero_grad()
    with PeakBytes(model.device, resident_tensors(model, optimizer)) as memory:
        trainer.training_step(model, batch)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return memory.peak


def _clock() -> Any:
    """A Trainer callback that times each step, counts its tokens and tells the parent."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.tokens: list[int] = []
            self._start = 0.0
            self._seen = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._wait()
            self._start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._wait()
            self.seconds.append(time.perf_counter() - self._start)
            self.tokens.append(int(state.num_input_tokens_seen) - self._seen)
            self._seen = int(state.num_input_tokens_seen)
            _tell({"step": state.global_step, "steps": state.max_steps})

        def _wait(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    return Clock()


def machine(device: str) -> dict[str, Any]:
    """What the run ran on."""
    import os

    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_parent, flush=True)


def failure(error: BaseException) -> dict[str, Any]:
    """The row of a run that did not finish."""
    import torch

    from lora_kit.errors import LoraKitError

    text = str(error)
    out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
    reason = text if isinstance(error, LoraKitError) else f"{type(error).__name__}: {text}"
    return {"status": "out of memory" if out else "failed", "reason": reason[:1000]}


def main(spec_file: str, row_file: str) -> None:
    """Run the cell and write its row; a failure is a row too."""
    import logging
    import traceback

    # this process is the cell's own: what the libraries repeat at every layer and batch would bury its log
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    spec = json.loads(Path(spec_file).read_text())
    try:
        row = run(spec)
    except Exception as error:  # whatever it is, the matrix goes on and the row says what happened
        traceback.print_exc()
        row = failure(error)
    Path(row_file).write_text(json.dumps(row))


# Libraries print to standard output now and then; the parent reads only JSON, from the real one.
_parent = sys.stdout

if __name__ == "__main__":
    sys.stdout = sys.stderr
    main(*sys.argv[1:3])
