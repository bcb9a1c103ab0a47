"""`save`: an adapted model as files that PEFT, or transformers, reads without us."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import base, fingerprint, sharing
from lora_kit.adaptation import Record, base_of, record_of
from lora_kit.errors import StorageError, listing
from lora_kit.storage import config as settings
from lora_kit.storage import manifest, rows, stored, units
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch


def save(model: Model, path: str | Path) -> Path:
    """Write what was trained to a folder: an adapter in PEFT's layout, or a whole model in transformers'.

    A save is one unit: written beside what the folder holds, flushed, hashed, read back and compared with the model,
    and put in its place by a rename (`lora_kit.storage.units`). Until then the folder holds the save before; a process
    that is killed at any moment leaves one of the two, whole. Files that belong to no save are left alone.

    Args:
        model: from `adapt`, `load`, PEFT or transformers; a compiled or distributed wrapper is looked through. In a
            distributed run the first process writes.
        path: folder; made if need be.

    Returns:
        The folder.

    Raises:
        StorageError: the path is a file, the disk is full, the model is none of transformers' or PEFT's, or holds NaN
            or infinite values.

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
    return save_with(model, path)


def save_with(model: Model, path: str | Path, beside: Callable[[Path], Any] | None = None) -> Path:
    """`save`, with files that `beside` writes into the folder as part of the same unit."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file ({folder.stat().st_size:,} bytes); pass a folder: save(model, 'out').")
    model = unwrapped(model)
    if not _writes():
        return folder
    units.write(folder, lambda staging: write_files(model, staging, beside=beside), needed=bytes_of(model))
    return folder


def _writes() -> bool:
    """Whether this process is the one that writes: in a distributed run, the first."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def unwrapped(model: Model) -> Model:
    """The model inside compiled and distributed wrappers, if it is one that can be saved."""
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model)
    if not hasattr(inner, "save_pretrained"):
        raise StorageError(
            f"{type(inner).__name__} is no model of transformers or PEFT, so its format is not known. "
            "safetensors.torch.save_model(model, path) writes its weights."
        )
    return inner


def bytes_of(model: Model) -> int:
    """Bytes that the tensors of a save will have; what is tied is written once."""
    places = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in _to_be_saved(model).values()}
    return sum(places.values())


def _to_be_saved(model: Model) -> "dict[str, torch.Tensor]":
    if not hasattr(model, "get_base_model"):
        return {name: tensor for name, tensor in model.state_dict().items() if hasattr(tensor, "element_size")}
    from peft.utils import get_peft_model_state_dict

    name = record_of(model).name
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=_embeds(model))


def write_files(
    model: Model,
    staging: Path,
    extra: dict[str, Any] | None = None,
    beside: Callable[[Path], Any] | None = None,
) -> None:
    """Every file of a save, the manifest last; `extra` facts go into it, and `beside` writes further files."""
    record = record_of(model)
    tensors = _to_be_saved(model)
    stored.refuse_non_finite(
        tensors,
        f"nothing was saved: {type(base_of(model)).__name__} has",
        "Go back to an earlier state: load(path_of_a_good_save, base, train=True), with a lower learning rate.",
    )
    brought: dict[str, rows.Rows] = {}
    if hasattr(model, "get_base_model"):
        _write_adapter(model, record.name, staging)
        brought = rows.changed(model.get_base_model(), record.base)
        if brought:
            rows.write(staging, brought)
    else:
        model.save_pretrained(staging)
        write_tokenizer(record.base, staging)
    if beside is not None:
        beside(staging)
    _refuse_changed(tensors, staging, moved=sharing.started_elsewhere(model))
    manifest.write(staging, {**_facts(model, record), "rows": sorted(brought), **(extra or {})})


def _facts(model: Model, record: Record) -> dict[str, Any]:
    """What the manifest says of the model."""
    labels = model.config.id2label if record.task and "classification" in record.task else None
    prints = record.fingerprint
    if not prints and hasattr(model, "get_base_model"):  # plain PEFT's, which left no record
        inner = model.get_base_model()
        prints = {"files": fingerprint.of_files(record.base), "samples": fingerprint.of_model(inner, record.heads)}
    return {
        "method": record.method,
        "options": record.options,
        "task": record.task,
        "labels": None if labels is None else [labels[i] for i in sorted(labels)],
        "base": record.base,
        "base_dtype": record.base_dtype,
        "quantization": record.quantization,
        "parameters": record.parameters,
        "embeddings": _token_rows(model) if record.options.get("new_tokens") else None,
        "heads": list(record.heads),
        "fingerprint": prints if hasattr(model, "get_base_model") else {},
        **record.facts,
    }


def _refuse_changed(tensors: "dict[str, torch.Tensor]", staging: Path, *, moved: bool) -> None:
    """What is on the disk is what is in the model; names that transformers writes otherwise are not compared."""
    import torch
    from safetensors import safe_open

    tensors = {canonical(name): tensor for name, tensor in tensors.items()}
    found = set()
    for file in sorted(staging.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored_file:
            for name in set(stored_file.keys()) & set(tensors):
                found.add(name)
                if not moved and not torch.equal(stored_file.get_tensor(name), tensors[name].detach().cpu()):
                    raise StorageError(
                        f"{file.name}: {name}, one of {len(tensors)} tensors, was read back otherwise than it was "
                        "written. What the folder held before is as it was. save(model, another_path), elsewhere."
                    )
    if (staging / stored.NAME).exists() and found != set(tensors) and not moved:
        lost = sorted(set(tensors) - found)
        raise StorageError(
            f"PEFT wrote {len(found)} of {len(tensors)} tensors of the adapter (not {listing(lost, 3)}). What the "
            "folder held before is as it was. pip install -U peft, then save(model, path)."
        )


def _token_rows(model: Model) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _embeds(model: Model) -> bool:
    """Whether PEFT has to store whole embeddings: where one carries an adapter."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    return any(
        isinstance(m, BaseTunerLayer)
        and isinstance(m.get_base_layer(), nn.Embedding)
        and not isinstance(m, TrainableTokensLayer)
        for m in model.modules()
    )


def _write_adapter(model: Model, name: str, staging: Path) -> None:
    """PEFT's own files."""
    # "auto", PEFT's default, would look the base up on the hub to see whether its vocabulary was resized
    model.save_pretrained(staging, selected_adapters=[name], save_embedding_layers=_embeds(model))
    if name != "default":  # PEFT puts an adapter of any other name into a folder of that name
        for file in (staging / name).iterdir():
            file.rename(staging / file.name)
        (staging / name).rmdir()
    if sharing.started_elsewhere(model):
        _move_to_the_unchanged_base(model, staging)
    _name_what_peft_would_rename(model, name, staging)
    _name_as_not_compiled(staging)


def canonical(name: str) -> str:
    """A name as it is without `torch.compile` around a part of the model."""
    return name.replace("._orig_mod", "").removeprefix("_orig_mod.")


def _name_as_not_compiled(folder: Path) -> None:
    """Take the compiler's wrappers out of the names, so that the files fit the base as it is loaded."""
    from safetensors.torch import load_file, save_file

    file = folder / stored.NAME
    tensors = load_file(file)
    if all(canonical(name) == name for name in tensors):
        return
    save_file({canonical(name): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    described = folder / settings.NAME
    text = described.read_text()
    described.write_text(canonical(text))


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
