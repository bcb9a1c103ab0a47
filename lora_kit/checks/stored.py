"""Saving and loading, tried out in a temporary folder and on the model itself, without a second model."""

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.checks.report import Check, failed, passed, skipped
from lora_kit.checks.running import as_in_training, beginning, logits_of
from lora_kit.checks.subject import Subject
from lora_kit.errors import LoraKitError, listing
from lora_kit.methods.native import as_named
from lora_kit.sharing import started_elsewhere
from lora_kit.storage.save import canonical, save
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

NAME = "save and load"
LARGEST = 2e9
"""Bytes of a whole model from which on it is not written for a trial."""


def save_and_load(subject: Subject) -> Check:
    """What is written is what is in memory, bit by bit, and puts the adapter back where it came from."""
    if subject.adapted and (wrong := _keys_of_another_model(subject)) is not None:
        return wrong
    if not subject.adapted and subject.record.quantization != "16bit":
        return skipped(NAME, f"a whole model in {subject.record.quantization}")
    size = sum(
        p.numel() * p.element_size() for p in (subject.saved if subject.adapted else _state(subject.model)).values()
    )
    if not subject.adapted and size > LARGEST:
        return skipped(NAME, f"{size / 1e9:.1f} GB; save() re-reads what it writes")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            free = shutil.disk_usage(scratch).free
            if free < 2 * size:
                return skipped(NAME, f"{scratch} has room for {free / 1e6:,.0f} MB, {2 * size / 1e6:,.0f} are needed")
            folder = save(subject.model, Path(scratch) / "trial")
            return _compare(subject, folder, size)
    except OSError as error:
        return skipped(NAME, f"the temporary folder cannot be written: {error}")
    except LoraKitError as error:
        if isinstance(error.__cause__, OSError):
            return skipped(NAME, f"the temporary folder cannot be written: {error.__cause__}")
        return failed(
            NAME,
            f"save() refused, 0 files written: {str(error).rstrip('.')}",
            "save(model, path), after correcting that",
        )


def _keys_of_another_model(subject: Subject) -> Check | None:
    """Names by which no other model will find its tensors: they lead through a wrapper that is not there again."""
    keys = list(subject.saved)
    twice = [key for key in keys if key.count("base_model.model.") > 1]
    if twice:
        return failed(
            NAME,
            f"{len(twice)} of {len(keys)} names lead through two adapters, one around the other ({twice[0]}), and fit "
            "no other model",
            "model = adapt(base) once, on a base that was loaded anew",
        )
    return None


def _compare(subject: Subject, folder: Path, size: int) -> Check:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    memory = subject.saved if subject.adapted else _state(subject.model)
    compiled = any(canonical(name) != name for name in memory)
    memory = {canonical(name): value for name, value in memory.items()}
    if subject.adapted and started_elsewhere(subject.model):
        return skipped(NAME, f"PiSSA is written as {len(found)} tensors of twice the rank, on the base as it was")
    wrong = [name for name, value in found.items() if name in memory and not _same_bits(value, memory[name])]
    if wrong:
        return failed(
            NAME,
            f"{len(wrong)} of {len(found)} tensors in the file differ from those in memory ({listing(wrong, 1)})",
            "save(model, path) on another disk: the temporary folder gives back other bytes",
        )
    strange = [name for name in found if name not in memory]
    places = {memory[name].data_ptr() for name in found if name in memory}
    lost = [name for name, value in memory.items() if name not in found and value.data_ptr() not in places]
    # transformers writes some models under other names than it holds them by
    if lost and not strange:
        return failed(
            NAME, f"{len(lost)} of {len(memory)} tensors are not in the file ({listing(lost, 1)})", "save(model, path)"
        )
    same = f"{len(found) - len(strange)} of {len(found)} tensors in the file are those in memory, bit by bit"
    same += f" ({size / 1e6:,.1f} MB)"
    if strange and not subject.adapted:
        same += f"; {len(strange)} go by other names there"
    if not subject.adapted or (subject.is_prompt and len(list(_encoder(subject).parameters())) > 1):
        # keys and values that a network computes are saved, the network is not
        return passed(NAME, same)
    if compiled:
        return passed(NAME, f"{same}, without the compiler's wrapper in their names")
    return _put_back(subject, found, same)


def _put_back(subject: Subject, found: "dict[str, torch.Tensor]", same: str) -> Check:
    """Spoil what is trained, and load the file over it."""
    import torch
    from peft.utils import set_peft_model_state_dict

    model, record = subject.model, subject.record
    before = {path: p.detach().clone() for path, p in subject.trained.items()}
    expected = _eval_logits(subject)
    ours = hasattr(model, "lora_kit_record") and subject.config.peft_type.value == "LORA"
    try:
        with torch.no_grad():
            for p in subject.trained.values():
                p.add_(0.1 if p.is_floating_point() else 0)
        spoiled = _eval_logits(subject)
        try:
            with as_named(model) if ours else nullcontext():
                set_peft_model_state_dict(model, found, adapter_name=record.name)
        except Exception as error:  # whatever PEFT raises that does not like its own file
            last = str(error).strip().splitlines()[-1].strip()
            return failed(
                NAME, f"PEFT cannot load the {len(found)} tensors that it wrote: {last}", "model = adapt(base)"
            )
        again = _eval_logits(subject)
        wrong = [path for path, p in subject.trained.items() if not _same_bits(p.detach(), before[path])]
    finally:
        with torch.no_grad():
            for path, p in subject.trained.items():
                p.copy_(before[path])
    if wrong:
        return failed(
            NAME,
            f"{len(wrong)} of {len(before)} trained tensors do not come back from the file ({listing(wrong, 1)})",
            "model = adapt(base), whose file holds all that it trains",
        )
    if expected is None or spoiled is None or again is None:
        return passed(NAME, same)
    away, back = (float((logits - expected).abs().max()) for logits in (spoiled, again))
    if back > 1e-3 * away:
        return failed(NAME, f"logits are off by {back:.3g} after loading (spoiled: {away:.3g})", "model = adapt(base)")
    return passed(NAME, f"{same}; loaded, they give the same logits (difference {back:.2g})")


def _eval_logits(subject: Subject) -> "torch.Tensor | None":
    try:
        with as_in_training(subject):
            return logits_of(subject, beginning(subject))
    except Exception:  # the batch was found wanting already
        return None


def _same_bits(a: "torch.Tensor", b: "torch.Tensor") -> bool:
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def _state(model: Model) -> dict[str, Any]:
    return dict(model.state_dict())


def _encoder(subject: Subject) -> Model:
    return subject.model.prompt_encoder[subject.record.name]
