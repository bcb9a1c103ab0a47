"""Checkpoints of a run: folders `step-<number>`, each a whole save with the run's state beside it.

The newest one whose manifest verifies is the one to go on from. One that a killed process left unfinished, or that was
damaged since, is passed over, and that is said.
"""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import fingerprint
from lora_kit.adaptation import record_of
from lora_kit.errors import ResumeError, StorageError, WrongBaseError, listing
from lora_kit.messages import say
from lora_kit.storage import manifest, states, stored, units
from lora_kit.storage.save import bytes_of, unwrapped, write_files
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"step-(\d+)\Z")
_REST = "other_weights.safetensors"
"""Weights of a model trained in full whose names transformers' own files do not have."""


def numbered(folder: Path) -> dict[int, Path]:
    """Step → folder, oldest first, finished or not."""
    if not folder.is_dir():
        return {}
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return dict(sorted(found))


def write(folder: Path, step: int, model: Model, state: dict[str, Any], run: dict[str, Any], *, keep: int) -> Path:
    """Write one checkpoint below `folder`, then remove the oldest beyond `keep`.

    Args:
        folder: of all checkpoints of a run.
        step: optimizer steps taken.
        model: as `save` takes it.
        state: named states, as `states.write` takes them.
        run: facts that a run which goes on from here must share, such as its seed.
        keep: checkpoints to keep, this one among them.
    """
    model = unwrapped(model)

    def beside(staging: Path) -> None:
        states.write(staging, state)
        if not hasattr(model, "get_base_model"):
            _write_the_rest(model, staging)

    def fill(staging: Path) -> None:
        write_files(model, staging, {"step": step, "run": run}, beside)

    target = folder / f"step-{step}"
    # AdamW keeps two numbers for each one trained
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    units.write(target, fill, needed=bytes_of(model) + 2 * trained)
    for old in [path for number, path in numbered(folder).items() if number < step][: -keep + 1 or None]:
        for known in (units.current(old) / manifest.NAME, old / manifest.NAME):
            known.unlink(missing_ok=True)  # first, so that what is left of it at any moment is no checkpoint
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(folder: Path) -> Path | None:
    """Where the newest checkpoint that verifies lies; None where there is none. Says what it passed over."""
    passed: list[str] = []
    for step, path in reversed(numbered(folder).items()):
        root = units.current(path)
        try:
            if manifest.read(root) is not None:
                for line in passed:
                    say(f"{line}; going on from step-{step}")
                return root
            if not any(root.iterdir()):
                continue
            passed.append(f"{path.name} is not finished (the process was stopped while it was saved)")
        except StorageError as error:
            passed.append(f"{path.name} is damaged ({error})")
    for line in passed:
        say(line)
    return None


def check(root: Path, model: Model, run: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint that this model, in this run, can go on from.

    Raises:
        ResumeError: it is no checkpoint, or was made with other settings.
        WrongBaseError: it was made on another base.
    """
    facts = manifest.facts(root)
    if not facts or "step" not in facts or not (root / states.WORDS).exists():
        raise ResumeError(
            f"{root} has no optimizer state ({states.WORDS} is missing), so no run can go on from it. Start a new run "
            "from its weights: load(path, base, train=True)."
        )
    record = record_of(model)
    now = {"method": record.method, **record.options, **run}
    then = {"method": facts["method"], **facts["options"], **(facts.get("run") or {})}
    changed = [
        f"{key} was {then[key]!r}, is {value!r}"
        for key, value in now.items()
        if key in then and _as_json(value) != _as_json(then[key])
    ]
    if changed:
        raise ResumeError(
            f"{root} was made with other settings ({listing(changed)}), so going on from it would be another run. Give "
            "the same settings, or start anew from its weights: load(path, base, train=True)."
        )
    samples = (facts.get("fingerprint") or {}).get("samples") or {}
    wrong = [name for name, entry in samples.items() if record.fingerprint.get("samples", {}).get(name) != entry]
    if wrong and hasattr(model, "get_base_model"):
        raise WrongBaseError(
            f"{root} was made on {facts.get('base') or 'another model'}, and {record.base or 'this model'} is another: "
            f"{len(wrong)} of {len(samples)} sampled tensors differ, such as {wrong[0]}. adapt(the_right_base)."
        )
    return facts


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def put_back(root: Path, model: Model) -> None:
    """Copy a checkpoint's weights into the model that is being trained, in place."""
    from peft.utils import set_peft_model_state_dict

    model = unwrapped(model)
    if hasattr(model, "get_base_model"):
        from lora_kit.methods.native import as_named

        tensors, name = stored.read(root), record_of(model).name
        stored.compare(root / stored.NAME, tensors, model, name)
        with as_named(model):
            set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
        stored.refuse_changed(root / stored.NAME, tensors, model, name)
        return
    _copy_whole(root, model)


def _copy_whole(root: Path, model: Model) -> None:
    import torch

    found = _whole_in(root)
    state = _by_storage(model)
    lost = [names[0] for names, _ in state if not set(names) & set(found)]
    wrong = [n for names, tensor in state for n in names if n in found and found[n].shape != tensor.shape]
    if lost or wrong:
        raise ResumeError(
            f"{root} has {len(found)} weights; {len(lost)} that this model needs are missing and {len(wrong)} are of "
            f"another shape ({listing([*lost, *wrong], 3)}). adapt(base, 'full') with the model it was made of."
        )
    with torch.no_grad():
        for names, tensor in state:
            tensor.copy_(next(found[name] for name in names if name in found))


def _by_storage(model: Model) -> "list[tuple[list[str], torch.Tensor]]":
    """(all names of a weight or buffer, the tensor): tied weights once."""
    places: dict[tuple[int, tuple[int, ...]], tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        places.setdefault((tensor.data_ptr(), tuple(tensor.shape)), ([], tensor))[0].append(name)
    return list(places.values())


def _whole_in(folder: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == states.NUMBERS:
            continue
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise StorageError(
                f"{file} cannot be read ({error}); nothing was loaded. finetune(..., resume=path) with an earlier one."
            ) from None
    return found


def _write_the_rest(model: Model, folder: Path) -> None:
    """What transformers writes under names of its own, or not at all, under the model's names beside it."""
    from safetensors.torch import save_file

    files = sorted(folder.glob("*.safetensors"))
    written = {name: tuple(shape) for file in files for name, _, shape, *_ in fingerprint.tensors_in(file)}
    rest = {
        names[0]: tensor.detach().cpu().clone()
        for names, tensor in _by_storage(model)
        if not any(written.get(name) == tuple(tensor.shape) for name in names)
    }
    if rest:
        save_file(rest, folder / _REST)
