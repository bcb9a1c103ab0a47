"""What is trained and what is not: adapters, heads, targets, shared weights, and whether all of it is saved."""

from typing import Any

from lora_kit import base as base_models
from lora_kit import sharing
from lora_kit.checks.report import Check, failed, passed, share, skipped, warned
from lora_kit.checks.subject import Subject
from lora_kit.errors import listing, nearest
from lora_kit.types import Model

GO_ON = "load(path, base, train=True)"

# what PEFT itself adds to modules_to_save for tasks with a head, whether or not there is such a module
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_PEFT_TRIES = {"classifier", "score", "qa_outputs"}


def of_model(subject: Subject) -> list[Check]:
    """Every check that needs no forward."""
    return [mode(subject), trainable(subject), heads(subject), targets(subject), kept(subject), tied(subject)]


def mode(subject: Subject) -> Check:
    """Training mode, in which dropout drops and the loss is the training loss."""
    model = subject.model
    resting = sum(not module.training for module in model.modules())
    if not model.training:
        return warned("mode", f"evaluation mode ({resting} modules): dropout is off", "model.train()")
    return passed("mode", "training")


def trainable(subject: Subject) -> Check:
    """Something is trained, it can be, and none of the adapter is left out."""
    name, model, record = "trainable", subject.model, subject.record
    total = sum(p.numel() for p in subject.trained.values())
    count = len(subject.trained)
    said = (
        f"{count} tensors, {total:,} parameters ({share(total / max(record.parameters, 1))} of {record.parameters:,})"
    )
    if not subject.adapted:
        if not count:
            return failed(name, f"0 of {len(list(model.parameters()))} parameters are trainable", "adapt(model)")
        if record.quantization != "16bit":
            packed = sum(not p.is_floating_point() for p in model.parameters())
            return failed(
                name,
                f"the base is in {record.quantization}: its {packed} quantized matrices hold integers and stay as they "
                f"are, only {said} move",
                'adapt(model, "lora"), or load the model without quantization',
            )
        return passed(name, said)
    own = own_parameters(subject)
    frozen = [path for path, p in own.items() if not p.requires_grad]
    if not count or (own and len(frozen) == len(own)):
        return failed(name, f"{len(frozen)} of {len(own)} adapter tensors are frozen", GO_ON)
    merged = [path for path, module in subject.base.named_modules() if getattr(module, "merged", False) is True]
    if merged:
        return failed(
            name,
            f"{len(merged)} adapters are merged into the base ({listing(merged, 1)}), where they get no gradient",
            "model.unmerge_adapter()",
        )
    off = [path for path, layer in subject.lora_layers.items() if not layer.scaling[record.name]]
    if off:
        return failed(
            name,
            f"{len(off)} of {len(subject.lora_layers)} LoRA layers have scale 0 (lora_alpha="
            f"{subject.config.lora_alpha}): they change nothing and get no gradient",
            f"adapt(model, rank={subject.config.r}, alpha={2 * subject.config.r})",
        )
    if frozen:
        return warned(
            name,
            f"{len(frozen)} of {len(own)} adapter tensors are frozen ({listing(frozen, 1)})",
            f"{GO_ON}, or for p in model.parameters(): if wanted, p.requires_grad_(True)",
        )
    return passed(name, said)


def own_parameters(subject: Subject) -> dict[str, Any]:
    """The active adapter's own parameters, trained or not: those that PEFT would mark as trainable."""
    adapter = subject.record.name
    if subject.is_prompt:
        encoder = subject.model.prompt_encoder[adapter]
        # the start of a prefix that is trained through a network stays as it is
        fixed = {id(encoder.embedding.weight)} if hasattr(encoder, "seeds") else set()
        return {n: p for n, p in encoder.named_parameters(prefix=f"prompt_encoder.{adapter}") if id(p) not in fixed}
    mark = getattr(subject.model.base_model, "prefix", None)
    parts = (f".{adapter}.", f".{adapter}")
    return {
        n: p
        for n, p in subject.model.named_parameters()
        if mark and mark in n and (parts[0] in n or n.endswith(parts[1])) and p.is_floating_point()
    }


def heads(subject: Subject) -> Check:
    """Task heads are trained whole: a new one that is frozen stays random, and another one is drawn at loading."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    name, base = "heads", subject.base
    frozen: dict[str, tuple[int, int, bool]] = {}
    paths = [path for path in dict.fromkeys((*subject.record.heads, *base_models.heads_of(base))) if path]
    # of a head and what lies inside it, the head
    paths = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    for path in paths:
        head = base.get_submodule(path)
        originals = {
            id(p)
            for m in head.modules()
            if isinstance(m, AuxiliaryTrainingWrapper)
            for p in m.original_module.parameters()
        }
        own = {n: p for n, p in head.named_parameters() if id(p) not in originals and "lora_" not in n}
        still = [p for p in own.values() if not p.requires_grad]
        if still:
            biases = [p for n, p in own.items() if n.endswith("bias")]
            new = not any(bool(p.any()) for p in biases)
            frozen[path] = (sum(p.numel() for p in still), sum(p.numel() for p in own.values()), new)
    if not frozen:
        return (
            passed("heads", f"trained whole: {listing(map(repr, paths))}") if paths else passed(name, "0: it has none")
        )
    path, (count, total, new) = next(iter(frozen.items()))
    found = f"{count:,} of {total:,} parameters of the head {path!r} are frozen"
    remedy = 'adapt(model, "lora"), or in plain PEFT LoraConfig(task_type="SEQ_CLS", modules_to_save=' + f"[{path!r}])"
    if not new:
        return warned(name, f"{found}; its biases are not zero, so it may have been trained before", remedy)
    return failed(
        name, f"{found}, and no bias in it is other than zero: it is new, and neither trained nor saved", remedy
    )


def targets(subject: Subject) -> Check:
    """Every name in PEFT's config matches a module: PEFT trains what matches and says nothing of the rest."""
    name = "targets"
    if not subject.adapted or subject.is_prompt:
        return skipped(name, f"{subject.record.method} names no layers")
    from peft.tuners.tuners_utils import BaseTunerLayer

    config, modules = subject.config, dict(subject.base.named_modules())
    adapted = [path for path, module in modules.items() if isinstance(module, BaseTunerLayer)]
    leaves = sorted({path.replace(".base_layer", "").rpartition(".")[2] for path in modules if not path[-1:].isdigit()})
    wanted = getattr(config, "target_modules", None)
    for field, names, places in (
        ("target_modules", wanted if not isinstance(wanted, str) else (), adapted),
        ("modules_to_save", getattr(config, "modules_to_save", None), list(modules)),
    ):
        names = set(names or ()) - (_PEFT_TRIES if config.task_type in _WITH_HEADS else set())
        lost = sorted(n for n in names if not any(path == n or path.endswith(f".{n}") for path in places))
        if lost:
            close = nearest(lost[0], [leaf for leaf in leaves if leaf not in lost])
            hint = close.removeprefix(" Did you mean ").removesuffix("?") or "..."
            # names that PEFT itself fills in for a type of model are nobody's slip of the pen
            tell = warned if names in _filled_in(subject) else failed
            return tell(
                name,
                f"{len(lost)} of {len(names)} names in {field} match nothing: {listing(map(repr, lost), 3)}",
                f"{field}=[{hint}], or adapt(base), which finds the layers itself",
            )
    for path, layer in subject.lora_layers.items():
        size, side = layer.r[subject.record.name], min(layer.in_features, layer.out_features)
        if size > side and not hasattr(layer, "parameter_name"):
            return warned(
                name,
                f"rank {size} on {path}, whose smaller side is {side}: the update cannot have more",
                f"adapt(model, rank={side})",
            )
    transform = getattr(config, "layers_to_transform", None)
    asked = [transform] if isinstance(transform, int) else list(transform or ())
    depth = getattr(subject.text_config, "num_hidden_layers", None)
    beyond = [layer for layer in asked if layer >= depth] if depth is not None else []
    if depth is not None and beyond:
        return failed(
            name,
            f"layers_to_transform names {listing(beyond)}, the model has layers 0 to {depth - 1}",
            f"layers_to_transform=list(range({depth}))",
        )
    return passed(name, f"{len(adapted)} modules carry an adapter")


def _filled_in(subject: Subject) -> list[set[str]]:
    """The targets that PEFT's tables have for this type of model, one set for each kind of adapter."""
    from peft.utils import constants

    kind = getattr(subject.model_config, "model_type", "")
    tables = [value for key, value in vars(constants).items() if key.endswith("TARGET_MODULES_MAPPING")]
    return [set(table[kind]) for table in tables if isinstance(table.get(kind), list)]


def kept(subject: Subject) -> Check:
    """What is trained is what is saved: a base that was unfrozen moves, and its change is lost."""
    name = "saved"
    if not subject.adapted:
        return passed(name, f"all {len(subject.trained)} trained tensors are the model's own")
    # prompt encoders write the keys and values that they compute
    stored = {tensor.data_ptr() for tensor in subject.saved.values()}
    stored |= {p.data_ptr() for p in own_parameters(subject).values()} if subject.is_prompt else set()
    lost = [path for path, p in subject.trained.items() if p.data_ptr() not in stored]
    if lost:
        return failed(
            name,
            f"{len(lost)} of {len(subject.trained)} trained tensors are not in the adapter's file ({listing(lost, 1)})"
            ": what they learn is lost",
            "model.requires_grad_(False); model.set_adapter(model.active_adapter), "
            'or adapt(base, "full") to train all of it',
        )
    return passed(name, f"all {len(subject.trained)} trained tensors go into the adapter's file")


def tied(subject: Subject) -> Check:
    """Input embeddings and output head that are one weight: an adapter on one side would be merged into both."""
    name = "tied weights"
    clash = sharing.conflict(subject.model, subject.record.name) if subject.adapted else None
    if clash is not None:
        return warned(
            name,
            f"2 layers on one weight, {clash[0]} and {clash[1]}, carry different adapters; merge() will refuse",
            "adapt(base), which gives layers on one weight one adapter",
        )
    sides = _sides(subject.base)
    if sides is None:
        return skipped(name, "input embeddings and output head are not one weight")
    paths, carries, whole, apart = sides
    if all(carries) and apart:
        return warned(
            name,
            f"2 sides of a shared weight, {paths[0]} and {paths[1]}, carry an adapter each; merge() writes 2 weights, "
            "other tools would add both to both",
            "adapt(model), which leaves the head alone; or merge(model, out), not model.merge_and_unload()",
        )
    if carries[0] != carries[1]:
        with_, without = paths[::-1] if carries[1] else paths
        return warned(
            name,
            f"1 of 2 sides of a shared weight carries an adapter: {with_} does, {without} does not; merge() writes 2 "
            "weights, other tools would change both",
            "adapt(model), which leaves the head alone; or merge(model, out), not model.merge_and_unload()",
        )
    if any(whole):
        own = listing(path for path, trained in zip(paths, whole, strict=True) if trained)
        return passed(name, f"{sum(whole)} of 2 sides trained whole ({own}), saved and merged as a weight of its own")
    return passed(name, f"{paths[0]} and {paths[1]} are 1 weight, treated as 1")


def _sides(base: Model) -> tuple[list[str], list[bool], list[bool], bool] | None:
    """(paths, whether each carries an adapter, whether each is trained whole, whether they share nothing trained).

    None where input embeddings and output head are not one weight in the base.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    try:
        pair = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return None
    if any(part is None for part in pair):
        return None
    places = {id(module): path for path, module in base.named_modules()}
    paths, carries, whole, weights = [], [], [], []
    for part in pair:
        if isinstance(part, TrainableTokensLayer) or getattr(part, "token_adapter", None) is not None:
            return None  # rows that PEFT keeps alike on both sides
        paths.append(places.get(id(part), "?"))
        carries.append(isinstance(part, BaseTunerLayer))
        whole.append(isinstance(part, ModulesToSaveWrapper))
        inner = part.original_module if whole[-1] else part.get_base_layer() if carries[-1] else part
        weights.append(getattr(inner, "weight", None))
    if weights[0] is None or weights[1] is None or weights[0].data_ptr() != weights[1].data_ptr():
        return None
    mine, other = ({p.data_ptr() for p in part.parameters() if p.requires_grad} for part in pair)
    return paths, carries, whole, not mine & other
