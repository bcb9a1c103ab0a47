"""One small forward and backward pass that shows which modules' outputs reach the model's output.

What a model carries and what it uses differ: decoders keep the cross-attention of the encoder-decoder they came from,
sparse attention chooses tokens by maps that get no gradient. An adapter there would train nothing.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

Key = TypeVar("Key")


def used(model: Model, candidates: dict[str, Model]) -> set[str] | None:
    """The candidates (path → module) whose output has a part in the model's output; None if no forward could be run.

    The model runs once in evaluation mode on a few random tokens, and is left as it was.
    """
    import torch

    if not candidates or not hasattr(model, "config"):
        return None
    with trial(model):
        for inputs in trial_inputs(model):
            marks: dict[str, list[torch.Tensor]] = {path: [] for path in candidates}
            called: set[str] = set()
            hooks = [module.register_forward_hook(_marker(marks[path])) for path, module in candidates.items()]
            hooks += [m.register_forward_hook(_noter(called, path)) for path, m in model.named_modules() if path]
            try:
                output = model(**inputs)
                found = reached(output, marks, sure=not _has_functions_of_its_own(model))
            except Exception:  # whatever a model raises that does not like these inputs
                continue
            finally:
                for hook in hooks:
                    hook.remove()
            if found is not None:
                return found | _idle_siblings(model, set(candidates), found, called)
    return None


def stops_gradients(model: Model) -> bool:
    """Whether a training forward gives an output without a gradient although parameters want one.

    Layers that run inside an autograd function of the model's own (Reformer's reversible layers) only get gradients
    if the function's input has one. Only such models are tried.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "config") or not _has_functions_of_its_own(inner):
        return False
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    heads = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    with unchanged(model), _frozen(heads), torch.random.fork_rng(devices), torch.enable_grad():
        model.train()
        for inputs in trial_inputs(inner):
            try:
                output = model(**inputs)
            except Exception:  # as above
                continue
            return not any(torch.is_tensor(v) and v.requires_grad for v in output.values())
    return False


def _has_functions_of_its_own(model: Model) -> bool:
    """Whether the code of the model's module runs layers inside an autograd function, out of sight of gradients."""
    import sys

    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (OSError, TypeError):
        return False
    return bool(re.search(r"\((torch\.)?(autograd\.)?Function\):", source))


def reached(
    output: Any, marks: "dict[Key, list[torch.Tensor]]", *, sure: bool = False, really: bool = False
) -> "set[Key] | None":
    """The keys whose marks the output depends on; None where nothing can be said.

    `really`: by a gradient that is not zero, as of rows that are cut off later. Not where a softmax may cancel a mark.
    """
    import torch

    items = output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else [output])
    tensors = {key: value for key, value in items if torch.is_tensor(value) and value.grad_fn is not None}
    logits = [value for key, value in tensors.items() if "logits" in str(key)] or list(tensors.values())
    flat = [(path, mark) for path, several in marks.items() for mark in several]
    if not flat:
        return None
    if not logits:
        return set() if sure else None
    # weighted unevenly: the plain sum of what a normalization gives has no gradient
    total = torch.stack([(v.float() * torch.linspace(-1, 2, v.numel()).view_as(v).to(v)).sum() for v in logits]).sum()
    gradients = torch.autograd.grad(total, [mark for _, mark in flat], allow_unused=True)
    found = [(key, gradient) for (key, _), gradient in zip(flat, gradients, strict=True) if gradient is not None]
    return {key for key, gradient in found if not really or gradient.any()}


def _marker(marks: "list[torch.Tensor]") -> Any:
    """A hook that adds a zero to the output, through which a gradient can be seen."""
    import torch

    def add(module: Any, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not torch.is_tensor(first) or not first.is_floating_point():
            return None
        zero = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)
        marks.append(zero)
        return (first + zero, *output[1:]) if isinstance(output, tuple) else first + zero

    return add


def _noter(called: set[str], path: str) -> Any:
    def note(module: Any, inputs: Any, output: Any) -> None:
        called.add(path)

    return note


def _idle_siblings(model: Model, candidates: set[str], reached: set[str], called: set[str]) -> set[str]:
    """Members of a list of experts that no token was sent to: they are used if one of the list is."""
    from torch import nn

    idle = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        members = [f"{path}.{name}" for name, _ in module.named_children()]
        running = [member for member in members if member in called]
        if not running or len(running) == len(members):
            continue
        for member in set(members) - set(running):
            for candidate in candidates:
                if candidate == member or candidate.startswith(f"{member}."):
                    rest = candidate.removeprefix(member)
                    if any(f"{other}{rest}" in reached for other in running):
                        idle.add(candidate)
    return idle


@contextmanager
def trial(model: Model) -> Iterator[None]:
    """Evaluation mode, frozen parameters and a fixed random state inside; outside everything is as it was before.

    A model without weights runs on stand-ins (`standins`).
    """
    import torch

    from lora_kit import standins

    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with standins.runnable(model) if standins.needed(model) else nullcontext():
        with unchanged(model), _as_it_was(model), torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            with _no_leaves(model):
                yield


@contextmanager
def _no_leaves(model: Model) -> Iterator[None]:
    """Checkpointing asks embeddings for a gradient, and some models (GIT) then add to that leaf in place."""
    from torch import nn

    hooks = [m.register_forward_hook(copy_leaf) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def copy_leaf(module: Any, inputs: Any, output: Any) -> Any:
    """A forward hook: what comes out is no leaf, so that it may be changed in place."""
    return output.clone() if getattr(output, "requires_grad", False) and output.is_leaf else output


@contextmanager
def unchanged(model: Model) -> Iterator[None]:
    """Modes, hooks, and whatever modules keep on themselves from one call to the next, are put back afterwards."""
    before = {module: dict(vars(module)) for module in model.modules()}
    # transformers hangs hooks on layers that record their outputs, and marks the model: both go, or there would be two
    hooks = [
        (held, dict(held))
        for attributes in before.values()
        for name, held in attributes.items()
        if "_hooks" in name and isinstance(held, dict)
    ]
    # bitsandbytes moves the constants of 8-bit weights from the parameter to the layer's state at the first forward
    constants = {
        module: (module.weight.CB, module.weight.SCB, dict(vars(module.state)))
        for module in before
        if type(getattr(module, "weight", None)).__name__ == "Int8Params" and hasattr(module, "state")
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            now = vars(module)
            for name in set(now) - set(attributes):
                del now[name]
            now.update(attributes)
        for held, found in hooks:
            held.clear()
            held.update(found)
        for module, (codes, scales, state) in constants.items():
            module.weight.CB, module.weight.SCB = codes, scales
            vars(module.state).clear()
            vars(module.state).update(state)


@contextmanager
def _frozen(parameters: "list[torch.nn.Parameter]") -> Iterator[None]:
    """These trainable parameters want no gradient inside."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _as_it_was(model: Model) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; `requires_grad` as before outside."""
    model.eval()
    with _frozen([parameter for parameter in model.parameters() if parameter.requires_grad]):
        yield


def trial_inputs(
    model: Model, text: "list[int] | None" = None, lengths: "tuple[int, ...] | None" = None
) -> Iterator[dict[str, Any]]:
    """Inputs that a model of text may take, the most ordinary first; then with an image or sound beside them.

    Two rows of random tokens, or twice the token ids of a text, again and again where it is shorter than the row.
    """
    import torch

    config = model.config
    takes = inspect.signature(model.forward).parameters
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    vocabulary = getattr(inner, "vocab_size", None) or 100
    special = {v for k, v in vars(config).items() if k.endswith(("_id", "_index")) and isinstance(v, int)}
    special |= {v for k, v in vars(inner).items() if k.endswith(("_id", "_index")) and isinstance(v, int)}
    plain = [i for i in range(vocabulary if isinstance(vocabulary, int) else 100) if i not in special] or [0]
    sound = getattr(config, "num_mel_bins", None) or getattr(inner, "num_mel_bins", None) or 80
    if text is not None:
        lengths = (len(text) + 1, *(n for n in (64, 128, 256) if n > len(text) + 1))
    for length in lengths or (8, 16, 64):
        if text is None:
            ids = torch.tensor(plain, device=device)[torch.randint(len(plain), (2, length), device=device)]
        else:
            ids = torch.tensor([(text * length)[:length]] * 2, device=device)
        end = getattr(inner, "eos_token_id", None)
        if isinstance(end, int) and end < vocabulary:
            ids[:, -1] = end  # some classifiers read the state of the last one
        basic: dict[str, Any] = {}
        if "input_ids" in takes:
            basic = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "decoder_input_ids" in takes and not _classifies(model):
            basic["decoder_input_ids"] = ids
        if "use_cache" in takes:
            basic["use_cache"] = False
        if "bbox" in takes:
            basic["bbox"] = torch.zeros(2, length, 4, dtype=torch.long, device=device)
        image = _image_size(config)
        more: list[dict[str, torch.Tensor]] = [{}]
        if "pixel_values" in takes:
            more.append({"pixel_values": torch.randn(2, 3, image, image, device=device, dtype=dtype)})
        if "input_features" in takes:
            frames = 2 * getattr(config, "max_source_positions", 32)
            more.append({"input_features": torch.randn(2, sound, frames, device=device, dtype=dtype)})
            for width in dict.fromkeys((sound, *_sound_widths(config))):
                more.append({"input_features": torch.randn(2, 64, width, device=device, dtype=dtype)})
        if "input_values" in takes:
            more.append({"input_values": torch.randn(2, 4000, device=device, dtype=dtype)})
        for extra in more:
            yield {k: v for k, v in {**basic, **extra}.items() if k in takes or "kwargs" in takes}
        if "input_ids" in takes:
            yield {"input_ids": ids}  # a mask makes some look for images


def _sound_widths(config: Any) -> Iterator[int]:
    """Numbers of features a moment of sound may have, from all over the config."""
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        for key in ("num_mel_bins", "feature_projection_input_dim", "feature_size", "input_feat_per_channel"):
            if isinstance(getattr(part, key, None), int):
                yield getattr(part, key)


def _classifies(model: Model) -> bool:
    return "Classification" in type(model).__name__ or "QuestionAnswering" in type(model).__name__


def _image_size(config: Any) -> int:
    inner = getattr(config, "vision_config", None) or config
    for key in ("image_size", "img_size", "input_size"):
        size = getattr(inner, key, None)
        if size:
            return size if isinstance(size, int) else size[0]
    return 32
