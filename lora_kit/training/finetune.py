"""`finetune`: transformers' `Trainer` with the right collator, optimizer groups and metrics.

A thin door for those who have no training loop yet, and what the comparison runs. Whoever has a loop keeps it: `adapt`,
`param_groups` and `training_defaults` are all that it needs from here.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import base
from lora_kit.adaptation import adapt, base_of, record_of
from lora_kit.checks.guard import guard
from lora_kit.errors import DataError, OptionError, listing, nearest
from lora_kit.messages import quiet
from lora_kit.methods import Method, resolve
from lora_kit.storage.save import save_with
from lora_kit.training import data as rows_from
from lora_kit.training import metrics
from lora_kit.training.batching import (
    Collator,
    Packer,
    can_pack,
    has_rows_of_any_length,
    padding_id,
    sort_for_measuring,
    trainer_class,
)
from lora_kit.training.checkpointing import FOLDER, to_go_on_from, with_checkpoints
from lora_kit.training.defaults import param_groups, training_defaults
from lora_kit.training.planning import planned_for
from lora_kit.types import Model

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerCallback

STOPPED = "stopped"
"""Folder below `output` for the last good state of a run that the guard stopped."""
TASK_OF_KIND = {
    "classification": "classification",
    "prompt": None,  # a causal or an encoder–decoder model, as the checkpoint says
    "chat": "causal-lm",
    "text": "causal-lm",
    "document": "causal-lm",
}


@dataclass(frozen=True)
class Finetuned:
    """A finished run."""

    model: Any
    before: dict[str, float]
    """Metrics on the held-out rows before training, without the adapter."""
    after: dict[str, float]
    """The same after training."""
    seconds: float
    """Time of training alone."""
    saved: Path | None
    """Folder that the result was written to."""

    def __str__(self) -> str:
        parts = [f"{name} {self.before[name]:.4g} → {self.after[name]:.4g}" for name in self.after]
        return f"{', '.join(parts)} in {self.seconds:.0f} s" + (f"; saved in {self.saved}" if self.saved else "")


def finetune(
    model: "str | Path | nn.Module",
    data: Any,
    *,
    method: Any = None,
    quantization: Any = None,
    output: str | Path | None = None,
    save_every: int | None = None,
    keep: int = 2,
    resume: "bool | str | Path" = False,
    plan: bool = False,
    test_data: Any = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    epochs: float = 3.0,
    batch_size: int = 16,
    max_length: int = 256,
    packing: bool | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    dtype: Any = "auto",
    device: str | None = None,
    tokenizer: Any = None,
    callbacks: "list[TrainerCallback] | None" = None,
    training_arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Finetuned:
    """Fine-tune a model on rows of text and measure it before and after on rows held out.

    The run is guarded (`guard`): it stops at the first NaN before the weights are touched, and where a step does not
    fit in memory it goes on in parts.

    Args:
        model: hub id or path; in a program also an adapted model, which is trained in place.
        data: path of a CSV, JSON lines, Parquet or text file, path of a folder, or a hub id; in a program also a
            `datasets.Dataset`. Columns: text and label; prompt and completion; messages; or text alone.
        method: for an id or a path: lora (the default), prefix or full; in a program also an option object or a PEFT
            config.
        quantization: for an id or a path: 8bit or 4bit. By default the weights stay as they are.
        output: folder to save the result in. By default it is not saved.
        save_every: optimizer steps between checkpoints, in the folder checkpoints below output. By default none.
        keep: checkpoints to keep.
        resume: go on from the newest whole checkpoint below output, to the very weights that a run without a break
            would have reached; in a program also the path of a checkpoint.
        plan: plan the memory of the run beforehand, and print the plan's error after two steps. For an id or a path; on
            a CPU the second step is slow.
        test_data: rows to measure on. By default the data's own test part, else a tenth of the rows.
        train_rows: use the first so many training rows only.
        test_rows: measure on the first so many held-out rows only.
        epochs: passes over the training rows.
        batch_size: rows in a step.
        max_length: tokens of a row; longer ones are cut.
        packing: put the rows of a step behind one another instead of padding them. By default where attention has
            kernels for that (flash attention); elsewhere rows of like length share a step.
        learning_rate: by default the method's own.
        seed: of new heads, adapters, and the order of rows.
        dtype: for an id or a path: bfloat16, float16 or float32. By default (auto) the checkpoint's own.
        device: cuda or cpu. By default the GPU if there is one.
        tokenizer: by default the one that lies where the model came from.
        callbacks: of `transformers.Trainer`.
        training_arguments: fields of `transformers.TrainingArguments` that overrule what is chosen here.
        options: fields of the method's option class, such as `rank=32`.

    Raises:
        DataError: data that is not there, not understood, or not for this model's task.
        OptionError: an option that is not accepted, or one for a model still to be loaded beside a loaded one.
        ResumeError: a checkpoint without the state of a run, or of a run with other settings.
    """
    import torch
    import transformers

    if output is None and (save_every is not None or resume):
        raise OptionError(
            f"save_every={save_every!r}, resume={resume!r}: checkpoints lie below output, which is None. Pass "
            "output='out'."
        )
    rows = rows_from.read(data, test=test_data, train_rows=train_rows, test_rows=test_rows, seed=seed)
    transformers.set_seed(seed)
    if isinstance(model, str | Path):
        chosen = resolve(method or "lora", options).start_from(rows.texts(20))
        adapted = adapted_for(rows, model, chosen, quantization, dtype=dtype, device=device)
        tokenizer = tokenizer or base.tokenizer_of(str(model))
    else:
        given = {"method": method, "quantization": quantization, "plan": plan or None, **options} | (
            {} if dtype == "auto" else {"dtype": dtype}
        )
        for key, value in given.items():
            if value is not None:
                raise OptionError(
                    f"{key}={value!r} is for a hub id or a path, but a loaded {type(model).__name__} was given; pass "
                    "it to adapt() instead."
                )
        adapted = model if device is None else model.to(device)
        tokenizer = tokenizer or base.tokenizer_of(model)
    if tokenizer is None:
        raise OptionError(
            "no tokenizer is known for this model (its config names no place that has one); pass tokenizer=."
        )

    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(
            adapted,
            rows,
            tokenizer,
            scratch,
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            packing=packing,
            learning_rate=learning_rate,
            seed=seed,
            callbacks=callbacks,
            training_arguments=training_arguments,
            checkpoints=None if output is None else Path(output) / FOLDER,
            save_every=save_every,
            keep=keep,
        )
        start = None if output is None else to_go_on_from(resume, Path(output) / FOLDER)
        guard(
            trainer,
            plan=planned_for(trainer, str(model), chosen, quantization, dtype, head_for(rows)) if plan else None,
            output=None if output is None else Path(output) / STOPPED,
        )
        before = measure(trainer, without_adapter=True)
        done = trainer.train() if start is None else trainer.go_on_from(start)
        seconds = float(done.metrics["train_runtime"])
        after = measure(trainer)
    saved = None
    if output is not None:
        saved = save_with(adapted, output, tokenizer.save_pretrained)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Finetuned(adapted, before, after, seconds, saved)


def adapted_for(
    rows: rows_from.Rows,
    model: str | Path,
    method: Method,
    quantization: Any,
    *,
    dtype: Any,
    device: str | None,
) -> Model:
    """A hub id or path as a model ready to train on these rows."""
    return adapt(
        str(model),
        method,
        quantization=quantization,
        task=TASK_OF_KIND[rows.kind],
        dtype=dtype,
        device=device,
        model_kwargs=head_for(rows),
    )


def head_for(rows: rows_from.Rows) -> dict[str, Any] | None:
    """The `model_kwargs` that give a classifier one output a label."""
    if rows.kind != "classification":
        return None
    return base.head_for(rows.labels)


def build_trainer(
    model: Model,
    rows: rows_from.Rows,
    tokenizer: Any,
    folder: str | Path,
    *,
    epochs: float,
    batch_size: int,
    max_length: int,
    learning_rate: float | None,
    seed: int,
    packing: bool | None = None,
    callbacks: "list[TrainerCallback] | None" = None,
    training_arguments: dict[str, Any] | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    keep: int = 2,
) -> Any:
    """A `Trainer` over these rows, ready to train and to measure; `folder` takes what Trainer writes, `checkpoints` the
    run's, every `save_every` steps."""
    import torch
    from transformers import TrainingArguments

    from lora_kit.lean.optimizer import AdamW

    limits = [("epochs", epochs, 0), ("batch_size", batch_size, 1), ("max_length", max_length, 2), ("keep", keep, 1)]
    for name, value, least in [*limits, ("save_every", 1 if save_every is None else save_every, 1)]:
        if isinstance(value, bool) or not value >= least or not value > 0:
            raise OptionError(
                f"{name} must be above 0"
                + (f" and at least {least}" if least > 1 else "")
                + f", got {value!r}; such as "
                f"{name}={least or 3}."
            )
    task = record_of(model).task
    if task is None:
        raise OptionError(f"{type(model).__name__} is none of transformers' classes; train it in a loop of your own.")
    config = model.config
    if rows.kind == "classification" and getattr(config, "num_labels", None) != len(rows.labels):
        raise DataError(
            f"the data has {len(rows.labels)} labels ({listing(rows.labels)}), the model's head {config.num_labels}; "
            f"load the model with num_labels={len(rows.labels)}."
        )
    with quiet(
        "transformers.tokenization_utils_base"
    ):  # a long text is longer than the model; it is cut to blocks below
        train, test = rows_from.tokenize(rows, tokenizer, task=task, max_length=max_length)
    padding = padding_id(tokenizer)
    if task == "classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding
    device = next(model.parameters()).device
    known = TrainingArguments.__dataclass_fields__
    fields: dict[str, Any] = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2 * batch_size,
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "save_strategy": "no" if save_every is None else "steps",
        "save_steps": 1 if save_every is None else save_every,
        "logging_strategy": "no",
        "report_to": "none",
        **training_defaults(model),
    }
    for key in training_arguments or {}:
        if key not in known:
            raise OptionError(f"training_arguments: {key!r} is no field of TrainingArguments.{nearest(key, known)}")
    fields |= training_arguments or {}
    packed = _packing(model, task, packing)
    groups = param_groups(model, learning_rate)
    if record_of(model).options.get("weights") == "stochastic":
        optimizer: Any = AdamW(groups)
    else:
        optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
    reduce, compute = metrics.for_task(task)
    kind = trainer_class(Packer() if packed else None)
    if checkpoints is not None:
        # what decides the steps: a run that goes on from a checkpoint must share it
        run = {
            "rows": len(train),
            "epochs": epochs,
            "batch_size": batch_size,
            "max_length": max_length,
            "packing": packed,
            "learning_rate": learning_rate,
            "seed": seed,
            "training_arguments": {key: str(value) for key, value in (training_arguments or {}).items()},
        }
        kind = with_checkpoints(kind, checkpoints, keep=keep, run=run)
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **fields),
        data_collator=Collator(padding),
        train_dataset=train,
        eval_dataset=sort_for_measuring(test),
        optimizers=(optimizer, None),
        preprocess_logits_for_metrics=reduce,
        compute_metrics=compute,
        callbacks=callbacks,
    )


def _packing(model: Model, task: str, wanted: bool | None) -> bool:
    """Whether to pack; an error where that was asked for and cannot be done."""
    if wanted not in (None, True, False):
        raise OptionError(f"packing must be True, False or None, got {wanted!r}.")
    if wanted is False or (wanted is None and not has_rows_of_any_length(model)):
        return False
    possible = task == "causal-lm" and can_pack(model)
    if wanted and not possible:
        raise OptionError(
            f"packing=True: {type(base_of(model)).__name__} does not keep packed rows apart (it takes no positions, or "
            "carries a state from row to row, or is no causal language model). Leave packing out: rows of like length "
            "are put together instead."
        )
    return possible


def measure(trainer: "Trainer", *, without_adapter: bool = False) -> dict[str, float]:
    """Metrics on the held-out rows, with the adapter or without."""
    with quiet("bitsandbytes.autograd._functions"):  # it reports each layer's cast at each batch
        with _without_adapter(trainer) if without_adapter else nullcontext():
            found = trainer.evaluate()
    names = ("accuracy", "precision", "recall", "f1") if "eval_accuracy" in found else ("loss", "perplexity")
    return {name: found[f"eval_{name}"] for name in names}


@contextmanager
def _without_adapter(trainer: "Trainer") -> Iterator[None]:
    """The base alone, with untrained heads."""
    model: Any = trainer.model
    if not hasattr(model, "get_base_model"):
        yield
    elif model.active_peft_config.is_prompt_learning and "disable_adapter" not in vars(model):
        # PEFT's own switch needs prepare_inputs_for_generation, which its classification class has not; what its prompt
        # methods train lives in the wrapper alone, so the model inside is the base
        trainer.model = model.get_base_model()
        try:
            yield
        finally:
            trainer.model = model
    else:
        with model.disable_adapter():
            yield
