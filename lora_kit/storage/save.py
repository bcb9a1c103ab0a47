"""`save`: an adapted model as files that PEFT, or transformers, reads without us."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit import base, sharing
from lora_kit.adaptation import record_of
from lora_kit.errors import StorageError
from lora_kit.storage import manifest
from lora_kit.types import Model

if TYPE_CHECKING:
    pass


def save(model: Model, path: str | Path) -> Path:
    """Write what was trained to a folder: an adapter in PEFT's layout, or a whole model in transformers'.

    The files are written beside the folder first and moved into it one by one, the manifest `lora_kit.json` last. Files
    of other names in the folder are left alone.

    Args:
        model: from `adapt`, `load`, PEFT or transformers; a compiled or distributed wrapper is looked through.
        path: folder; made if need be.

    Returns:
        The folder.

    Raises:
        StorageError: the path is a file, or the model is none of transformers' or PEFT's.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lora_kit import adapt
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = adapt(LlamaForCausalLM(config), rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(file.name for file in save(model, folder).iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'lora_kit.json']
    """
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; pass the path of a folder.")
    if not hasattr(model, "save_pretrained"):
        raise StorageError(f"{type(model).__name__} is no model of transformers or PEFT, so its format is not known.")
    record = record_of(model)
    staging = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if hasattr(model, "get_base_model"):
            written = _write_adapter(model, record.name, staging)
        else:
            written = staging
            model.save_pretrained(staging)
            write_tokenizer(record.base, staging)
        labels = model.config.id2label if record.task and "classification" in record.task else None
        manifest.write(written, record, labels, _token_rows(model) if record.options.get("new_tokens") else None)
        _move(written, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _token_rows(model: Model) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _write_adapter(model: Model, name: str, staging: Path) -> Path:
    """PEFT's own files; returns the folder that they are in."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    embeddings = any(
        isinstance(m, BaseTunerLayer)
        and isinstance(m.get_base_layer(), nn.Embedding)
        and not isinstance(m, TrainableTokensLayer)
        for m in model.modules()
    )
    # "auto", PEFT's default, would look the base up on the hub to see whether its vocabulary was resized
    model.save_pretrained(staging, selected_adapters=[name], save_embedding_layers=embeddings)
    # PEFT puts an adapter of any other name into a folder of that name
    folder = staging if name == "default" else staging / name
    if sharing.started_elsewhere(model):
        _move_to_the_unchanged_base(model, folder)
    _name_what_peft_would_rename(model, name, folder)
    return folder


def _move_to_the_unchanged_base(model: Model, folder: Path) -> None:
    """Write PiSSA's adapter as a plain one of twice the rank, which belongs on the base as it was loaded."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(sharing.on_the_unchanged_base(model, load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    grown = 2**0.5 if config["use_rslora"] else 2
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": grown * config["lora_alpha"]}
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: grown * alpha for name, alpha in config["alpha_pattern"].items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _name_what_peft_would_rename(model: Model, name: str, folder: Path) -> None:
    """Put linear layers that PEFT would take for experts, by their names, among the parameters, which it leaves alone.

    For some mixture-of-experts types PEFT reads `gate_proj` and the like among the target modules as the experts'. A
    layer's weight named as a target parameter gives the same tensors under the same keys.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # before PEFT 0.19 nothing is renamed
        return
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    if config["peft_type"] != "LORA" or not isinstance(config["target_modules"], list):
        return
    renamed = copy.deepcopy(model.peft_config[name])
    convert(renamed, model.get_base_model(), None)
    lost = set(config["target_modules"]) - set(renamed.target_modules)
    if not lost:
        return
    paths = [path for path in sharing.adapted_modules(model) if any(path == t or path.endswith(f".{t}") for t in lost)]
    config["target_modules"] = sorted(set(config["target_modules"]) - lost)
    config["target_parameters"] = [*(config["target_parameters"] or []), *(f"{path}.weight" for path in paths)]
    for pattern in ("rank_pattern", "alpha_pattern"):
        config[pattern] = {f"{key}.weight" if key in paths else key: value for key, value in config[pattern].items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


def write_tokenizer(source: str | None, folder: Path) -> None:
    """Put the base's tokenizer, where there is one, beside a whole model."""
    tokenizer = base.tokenizer_of(source) if source else None
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _move(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in source.iterdir() if file.is_file()]
    files.sort(key=lambda file: file.name == manifest.NAME)
    for file in files:
        file.replace(folder / file.name)
