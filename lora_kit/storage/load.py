"""`load`: the one way back from a folder, whatever the method."""

import copy
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import attention, fingerprint, insertion, sharing, structure
from lora_kit import base as base_models
from lora_kit import quantization as bits
from lora_kit.adaptation import Record, count_parameters, main_dtype
from lora_kit.errors import (
    AdapterMismatchError,
    OptionError,
    StorageError,
    WrongBaseError,
)
from lora_kit.messages import say
from lora_kit.methods import word_of
from lora_kit.methods.native import IN_THE_CACHE, as_named, refuse_checkpointing, refuse_later_checkpointing, wrap
from lora_kit.rollback import rollback
from lora_kit.storage import config as settings
from lora_kit.storage import manifest, rows, stored, units, whole
from lora_kit.targets import PEFT_TASKS
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from lora_kit.attention import Site


def load(
    path: str | Path,
    base: "str | Path | nn.Module | None" = None,
    *,
    train: bool = False,
    quantization: Any = None,
    dtype: "torch.dtype | str" = "auto",
    device: str | None = None,
    lean: bool | str = True,
    rename: dict[str, str] | None = None,
    allow_other_base: bool = False,
) -> Model:
    """Bring back what `save`, or plain PEFT or transformers, wrote. A base that is handed in is changed in place.

    Everything is checked before the first copy: hashes, the config's fields, names, shapes and dtypes both ways, that
    every value is finite, and that the base is the one it was trained on. A load that is refused leaves a base that was
    handed in as it was. Nothing in the folder is run: no pickle, no module named in a file, no code of a base.

    Args:
        path: folder of an adapter or of a whole model.
        base: for an adapter: the model it belongs on, as a hub id, a path or a loaded model. None: the one whose
            name was recorded; its code is never trusted.
        train: True to go on training, False to use it.
        quantization: as in `adapt`, for a base that is still to be loaded or is in memory.
        dtype: dtype to load a base in; `"auto"` is the checkpoint's own.
        device: as in `adapt`.
        lean: with `train=True`, as in `adapt`.
        rename: parts of tensors' names to exchange, for an adapter whose base has other names for its modules, such as
            `{"language_model.": ""}`.
        allow_other_base: True to load an adapter onto a base that it was not trained on.

    Returns:
        PEFT's `PeftModel`, or transformers' model for one that was trained in full.

    Raises:
        OptionError: a base for a whole model, or a value that is not accepted.
        StorageError: no such folder, a file that is missing or was changed, a pickled adapter, a config that names what
            PEFT does not know.
        WrongBaseError: the base is not the one that the adapter was trained on.
        AdapterMismatchError: tensors that do not belong on this base.
    """
    from lora_kit.lean import switch

    switch.check(lean)
    folder = Path(path)
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder; pass what save(model, path) wrote.")
    root = units.current(folder)
    if root != folder:
        say(f"{folder}: the process that saved last was stopped while it put the files in place; read from {root.name}")
    facts = manifest.facts(root)
    if (root / settings.NAME).exists():
        adapted = _load_adapter(
            root,
            facts,
            base,
            train=train,
            quantization=quantization,
            dtype=dtype,
            device=device,
            rename=rename,
            allow_other_base=allow_other_base,
        )
        switch.enable(adapted, lean if train else False)
        return adapted
    if not (root / "config.json").exists():
        unfinished = len(list(folder.glob(f"{units.STAGING}*")))
        raise StorageError(
            f"{folder} has neither adapter_config.json nor config.json, so it holds no saved model"
            + (f"; {unfinished} save was stopped before it was finished" if unfinished else "")
            + f" ({len(list(folder.iterdir()))} entries). Pass what save(model, path) wrote."
        )
    if base is not None:
        raise OptionError(f"{folder} holds a whole model, which needs no base; leave base out: load({str(folder)!r}).")
    if rename is not None:
        raise OptionError(f"{folder} holds a whole model, whose names stay; leave rename={rename!r} out.")
    model = whole.load_whole(root, facts, train=train, quantization=quantization, dtype=dtype, device=device)
    model.lora_kit_record = _record(facts, model, "full", facts.get("base"))
    switch.enable(model, lean if train else False)
    return model


def _load_adapter(
    folder: Path,
    facts: dict[str, Any],
    base: Any,
    *,
    train: bool,
    quantization: Any,
    dtype: Any,
    device: str | None,
    rename: dict[str, str] | None,
    allow_other_base: bool,
) -> Model:
    tensors = stored.renamed(stored.read(folder), rename)
    config = settings.read(folder, tensors)
    config.inference_mode = not train
    recorded = facts.get("base") or config.base_model_name_or_path
    config.base_model_name_or_path = None  # PEFT notes the name of the base that it is put on
    brought = rows.read(folder) if facts.get("rows") else {}
    given = base if base is not None else recorded
    fits = partial(
        stored.or_refused,
        AdapterMismatchError,
        f"PEFT cannot put the adapter in {folder} on this model",
        "load(path, base=...) with the base it was trained on",
    )
    quantized, source = _examined(folder, facts, config, given, quantization, dtype, device)
    in_memory = source.path is None
    if in_memory and quantized is not None:
        with fits():
            _refuse_other_base(facts, source.skeleton, given, folder, tuple(brought), allow=allow_other_base)
            with suppress(_RehearsedError), rollback(source.skeleton):
                # quantizing a base in memory cannot be taken back: see beforehand that the adapter fits
                _make_room(source.skeleton, facts.get("embeddings"), tensors, brought, tell=False)
                _wrapped(source.skeleton, copy.deepcopy(config), dict(facts), folder, tensors)
                raise _RehearsedError
    model, _ = base_models.load(source, quantized, base_models.heads_of(source.skeleton))
    with rollback(model), fits():
        if not in_memory or quantized is None:
            _refuse_other_base(facts, model, given, folder, tuple(brought), allow=allow_other_base)
        _make_room(model, facts.get("embeddings"), tensors, brought)
        adapted = _wrapped(model, config, facts, folder, tensors)
        rows.put_back(model, brought)
    if not train:
        adapted.requires_grad_(False)
    adapted.train(train)
    name = base if isinstance(base, str | Path) else getattr(model.config, "_name_or_path", None) or recorded
    if allow_other_base:  # saved again, it belongs on this one
        facts = {**facts, "fingerprint": {}}
    adapted.lora_kit_record = _record(facts, adapted, word_of(config), str(name) if name else None)
    return adapted


class _RehearsedError(Exception):
    """Ends a rehearsal, so that it is rolled back."""


def _wrapped(
    model: Model, config: Any, facts: dict[str, Any], folder: Path, tensors: "dict[str, torch.Tensor]"
) -> Model:
    """The model with this adapter on it and in it."""
    from peft.utils import set_peft_model_state_dict

    paths = [path for path, _ in model.named_modules() if path]
    exactly = settings.resolve_patterns(config, paths, tensors, folder)
    ours = bool(facts) and config.peft_type.value == "LORA"
    if ours:
        _as_modules(config, model)
    exactly = exactly or ours
    sites = _sites_for(facts.get("prefix"), config, model)
    if sites:
        adapted, _ = insertion.wrap(model, config, sites, "default", partial(wrap, exactly=True))
    else:
        if config.peft_type.value in IN_THE_CACHE:
            refuse_checkpointing(model)
        adapted = wrap(model, config, "default", exactly=exactly)
    stored.compare(folder / stored.NAME, tensors, adapted)
    with as_named(adapted) if exactly else nullcontext():
        set_peft_model_state_dict(adapted, dict(tensors), adapter_name="default")  # PEFT 0.18 renames in it
    stored.refuse_changed(folder / stored.NAME, tensors, adapted)
    if ours:
        sharing.share_equal_adapters(adapted, "default")
    if sites and "prefix" not in facts:
        if insertion.agrees(adapted):
            facts["prefix"] = insertion.facts(sites, None)
        else:
            insertion.undo(adapted)
            sites = ()
    if config.peft_type.value in IN_THE_CACHE and not sites:
        refuse_checkpointing(model)
        refuse_later_checkpointing(model)
    return adapted


def _refuse_other_base(
    facts: dict[str, Any], model: Model, given: Any, folder: Path, without: tuple[str, ...], *, allow: bool
) -> None:
    """Refuse a base that is certainly another; say so where nothing can tell."""
    known = facts.get("fingerprint") or {}
    if allow or not known:
        return
    came_from = str(given) if isinstance(given, str | Path) else getattr(model.config, "_name_or_path", None)
    recorded, now = known.get("files"), fingerprint.of_files(came_from)
    wrong, compared, matrices = fingerprint.differing(known.get("samples") or {}, model, without)
    # what is in memory says more than the files that it once came from
    decided = matrices and not isinstance(given, str | Path)
    if (
        recorded
        and now
        and recorded["layout"] == now["layout"]
        and recorded["content"] != now["content"]
        and not (decided and not wrong)
    ):
        proof = f"the files' fingerprints are {recorded['content'][:8]} and {now['content'][:8]}"
    elif wrong:
        proof = f"{len(wrong)} of {compared} sampled tensors differ, such as {wrong[0]}"
    else:
        if not matrices and (now is None or recorded != now):
            say(
                f"cannot tell whether {came_from or 'this model'} is the base that {folder} was trained on: its "
                "matrices are quantized, and its files are not at hand or of another layout"
            )
        return
    raise WrongBaseError(
        f"{folder} was trained on {facts.get('base') or 'another model'}, and {came_from or type(model).__name__} is "
        f"another: {proof}. Nothing was loaded. load(path, base=...) with the right one, or "
        "load(..., allow_other_base=True)."
    )


def _sites_for(known: dict[str, Any] | None, config: Any, model: Model) -> "tuple[Site, ...]":
    """The attention that a prefix goes into, by what the manifest says of it; none for one that stays PEFT's own.

    A folder that plain PEFT wrote is used in attention where that gives the same result. Elsewhere (absolute positions,
    which PEFT moves) it travels in the cache, as PEFT has it.
    """
    if config.peft_type.value != "PREFIX_TUNING":
        return ()
    if known is not None:
        insertion.attend_in_full(model)
    found = attention.find(model)
    sites = () if found is None else found.sites
    if known is not None:
        sites = tuple(site for site in sites if site.role in known["attention"])
        _compare_sites(known["shapes"], sites, model)
        return sites
    if found is None or not sites or insertion.unreadable(model, found, sites) is not None:
        return ()
    fits = insertion.starts(sites)[-1] == 2 * config.num_layers * config.token_dim
    return sites if fits and not config.prefix_projection else ()


def _compare_sites(wanted: list[Any], sites: "tuple[Site, ...]", model: Model) -> None:
    """Refuse unless the model's attentions are, one by one, of the shapes that the prefix was trained for."""
    name = type(model).__name__
    said = f"{name} has {len(sites)} attentions for this prefix, which was trained for {len(wanted)}"
    if len(sites) == len(wanted):
        pairs = [(tuple(keys), tuple(values)) for keys, values in wanted]
        wrong = [(site, pair) for site, pair in zip(sites, pairs, strict=True) if site.shapes != pair]
        if not wrong:
            return
        site, pair = wrong[0]
        said = f"{name}: {site.path} has keys and values of {site.key_shape} and {site.value_shape} (heads, width); "
        said += f"the prefix and its numbers were trained for {pair[0]} and {pair[1]}"
    raise AdapterMismatchError(f"{said}. Load it on the base it was trained on. Nothing was loaded.")


def _make_room(
    model: Model,
    embeddings: int | None,
    tensors: "dict[str, torch.Tensor]",
    brought: "dict[str, rows.Rows]",
    *,
    tell: bool = True,
) -> None:
    """Grow the base's embeddings, in place, to hold the new tokens that the adapter brings."""
    wanted = max([embeddings or 0, *(found.rows for found in brought.values())])
    now = int(model.get_input_embeddings().weight.shape[0]) if wanted else 0
    if not wanted or now >= wanted:
        return
    carried = max([t.shape[0] for t in tensors.values() if t.dim()] + [len(r.places) for r in brought.values()])
    if wanted - now > carried:
        raise AdapterMismatchError(
            f"the adapter was trained with {wanted:,} token embeddings, the base has {now:,}, and the folder holds at "
            f"most {carried:,} rows for the others. Nothing was loaded. load(path, base=...) with the base it was "
            "trained on."
        )
    model.resize_token_embeddings(wanted)
    if tell:
        said = f"the base has {now} token embeddings, the adapter was trained with {wanted}"
        say(f"{said}: {wanted - now} rows were added")


def _as_modules(config: Any, model: Model) -> None:
    """Undo what `save` did for PEFT's sake: linear layers among the target parameters are modules again."""
    plain = {p.full_name: p.path for p in structure.survey(model) if p.kind == "linear"}
    named = config.target_parameters or []
    modules = {plain[name] for name in named if name in plain}
    if not modules:
        return
    config.target_modules = {*(config.target_modules or ()), *modules}
    config.target_parameters = [name for name in named if name not in plain] or None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for name in set(pattern) & set(plain):
            pattern[plain[name]] = pattern.pop(name)


def _examined(
    folder: Path, facts: dict[str, Any], config: Any, base: Any, quantization: Any, dtype: Any, device: str | None
) -> "tuple[BitsAndBytesConfig | None, base_models.Source]":
    """How the base is to be quantized, and the base, not yet loaded."""
    from torch import nn

    if base is None:
        raise OptionError(f"{folder} does not say which model it belongs on; pass base=, a hub id, a path or a model.")
    quantized = bits.resolve(quantization)
    task = None
    kwargs = None
    if not isinstance(base, nn.Module):
        peft_task = getattr(config.task_type, "value", config.task_type)
        task = facts.get("task") or {theirs: ours for ours, theirs in PEFT_TASKS.items()}.get(peft_task)
        if facts.get("labels"):
            kwargs = base_models.head_for(facts["labels"])
    source = base_models.examine(base, task=task, dtype=dtype, device=device, model_kwargs=kwargs)
    bits.check(source.skeleton, quantized)
    bits.try_out(quantized, base_models.device_of(source))
    return quantized, source


def _record(facts: dict[str, Any], model: Model, word: str, base: str | None) -> Record:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Record(
        method=str(facts.get("method", word)),
        options=dict(facts.get("options") or {}),
        task=base_models.task_of(inner),
        base=base,
        base_dtype=str(facts.get("base_dtype") or main_dtype(inner)) if word == "full" else main_dtype(inner),
        quantization=bits.of(inner) or "16bit",
        parameters=count_parameters(inner, without="default" if inner is not model else None),
        heads=tuple(facts.get("heads") or base_models.heads_of(inner)),
        facts={key: facts[key] for key in ("prefix",) if key in facts},
        fingerprint=dict(facts.get("fingerprint") or {}),
    )
