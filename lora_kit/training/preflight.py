"""`lora-kit verify`: the pre-flight on a model and data as `finetune` would train them."""

import tempfile
from typing import TYPE_CHECKING, Any

from lora_kit import base
from lora_kit.checks.report import Report
from lora_kit.checks.verify import verify
from lora_kit.errors import OptionError
from lora_kit.methods import resolve
from lora_kit.training import data as rows_from
from lora_kit.training.finetune import adapted_for, build_trainer

if TYPE_CHECKING:
    pass


def preflight(
    model: str,
    data: str,
    *,
    method: str | None = None,
    quantization: str | None = None,
    batch_size: int = 16,
    max_length: int = 256,
    packing: bool | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    **options: Any,
) -> Report:
    """Prove, before a long run, that it would learn: one batch of the data through the model that finetune would train.

    Args:
        model: hub id or path.
        data: path of a CSV, JSON lines, Parquet or text file, path of a folder, or a hub id.
        method: lora (the default), prefix or full.
        quantization: 8bit or 4bit. By default the weights stay as they are.
        batch_size: rows in a step.
        max_length: tokens of a row; longer ones are cut.
        packing: as in finetune.
        learning_rate: by default the method's own.
        seed: of new heads, adapters, and the order of rows.
        dtype: bfloat16, float16 or float32. By default (auto) the checkpoint's own.
        device: cuda or cpu. By default the GPU if there is one.
        options: fields of the method's option class, such as `rank=32`.

    Raises:
        DataError: data that is not there, not understood, or not for this model's task.
        OptionError: an option that is not accepted.
    """
    import transformers

    rows = rows_from.read(data, seed=seed)
    transformers.set_seed(seed)
    tokenizer = base.tokenizer_of(model)
    if tokenizer is None:
        raise OptionError(f"{model} has no tokenizer beside it. Put one there: tokenizer.save_pretrained({model!r}).")
    chosen = resolve(method or "lora", options).start_from(rows.texts(20))
    adapted = adapted_for(rows, model, chosen, quantization, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(
            adapted,
            rows,
            tokenizer,
            scratch,
            epochs=1,
            batch_size=batch_size,
            max_length=max_length,
            packing=packing,
            learning_rate=learning_rate,
            seed=seed,
        )
        batch = next(iter(trainer.get_train_dataloader()))
    return verify(adapted, dict(batch), optimizer=trainer.optimizer, tokenizer=tokenizer)
