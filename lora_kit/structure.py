"""What the parts of a model are: linear maps, stacks of matrices, routers, towers, weights that are shared.

A part is known by what it does, not by what it is called: a linear map is a module whose forward is `x Wᵀ + b`; a
stack is a 3-d parameter that holds one matrix per expert. Both LoRA's targets and quantization are chosen from here.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_kit.types import Model

if TYPE_CHECKING:
    from torch import nn

# why a part is left out, in the words of the report
OUTPUT = "output embeddings"
HEAD = "heads, trained whole"
ROUTER = "routers"
READ = "weight read directly by the module around it"
GROUPED = "convolutions in groups"
CODED = "experts in a quantized format that takes no adapter"
STATE = "blocks whose state the module around them sets"
FOREIGN = "3-d weights that are no stack of matrices"
BARE = "weights that a module holds without a layer around them"


# whose linear layers are linear maps, whatever they hold
_QUANTIZERS = ("bitsandbytes.", "transformers.integrations.", "compressed_tensors.", "torchao.")

# parameters of two dimensions and more that are added or multiplied element by element
_NO_MATRIX = re.compile(r"bias|embed|pos|A_log|scale|probe|query|norm|time_|token|static")


@dataclass(frozen=True)
class Part:
    """One weight that takes part in matrix products."""

    path: str
    """Path of the module that holds it."""
    module: Model
    parameter: str
    """Name of the weight within the module."""
    kind: str
    """`"linear"`: a module whose forward is `x Wᵀ + b`. `"own"`: a linear module with a forward of its own. `"stack"`:
    (experts, ·, ·) matrices. `"other"`: what is only counted."""
    rows: int
    columns: int
    count: int = 1
    """Number of matrices."""
    tower: str = "language"
    reason: str | None = None
    """Why it is left out, whatever is asked for."""

    @property
    def entries(self) -> int:
        return self.rows * self.columns * self.count

    @property
    def weight(self) -> "nn.Parameter":
        return getattr(self.module, self.parameter)

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.parameter}"


def survey(model: Model, heads: Iterable[str] = ()) -> list[Part]:
    """Every weight of the model that takes part in matrix products, in the model's order (weights may be on `meta`)."""
    heads = list(heads)
    output = _output_weights(model)
    towers = Towers(model)
    experts = _expert_counts(model)
    parts = []
    for path, module in model.named_modules():
        found = list(_weights_of(path, module))
        if not found:
            continue
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        for part in found:
            reason = part.reason
            if id(part.weight) in output:
                reason = OUTPUT
            elif within(path, heads):
                reason = HEAD
            elif part.kind in ("linear", "own") and _is_router(path, module, parent, experts):
                reason = ROUTER
            elif part.kind in ("linear", "own") and reads_weight(parent, path.rpartition(".")[2]):
                reason = READ
            elif part.kind == "stack" and _is_reached_into(parent, path.rpartition(".")[2], module):
                reason = STATE
            parts.append(Part(**{**vars(part), "tower": towers.of(path), "reason": reason}))
    return parts


def _weights_of(path: str, module: Model) -> Iterator[Part]:
    """The matrices that this module itself holds."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        rows, columns = shape(module)
        kind = "own" if _runs_its_own_forward(module) else "linear"
        yield Part(path, module, "weight", kind, rows, columns)
        return
    if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
        # a linear map over channels; in groups it is one a low-rank update does not fit into
        whole = module.groups == 1
        sides = module.out_channels, module.in_channels // module.groups
        yield Part(path, module, "weight", "linear" if whole else "other", *sides, reason=None if whole else GROUPED)
        return
    if isinstance(module, nn.Embedding) or type(module).__module__.startswith("torch.nn.modules.conv"):
        return
    for name, weight in module._parameters.items():
        if weight is None or not weight.dim() > 1 or _NO_MATRIX.search(name):
            continue
        size = stack_shape(module, name) or tuple(weight.shape)
        if _is_coded(module, name, weight):
            yield Part(path, module, name, "other", size[1], 2 * weight[0, 0].numel(), size[0], reason=CODED)
        elif len(size) == 3 and _is_stack(module, name, size):
            yield Part(path, module, name, "stack", size[1], size[2], size[0])
        elif len(size) == 2 and is_router_class(type(module)):
            yield Part(path, module, name, "other", *size, reason=ROUTER)
        elif len(size) == 2 and name == "weight" and hasattr(module, "out_features"):
            yield Part(path, module, name, "own", *size)  # a linear layer written out (I-BERT's)
        elif len(size) == 2 and min(size) > 1:
            yield Part(path, module, name, "other", *size, reason=BARE)
        elif len(size) == 3 and min(size) > 2 and weight.is_floating_point():
            yield Part(path, module, name, "other", size[1], size[2], size[0], reason=FOREIGN)


def _is_coded(module: Model, name: str, weight: Model) -> bool:
    """Whether these are experts that the checkpoint itself holds quantized (gpt-oss in MXFP4: two values a byte)."""
    from lora_kit import stacks

    plain = weight.is_floating_point() or stacks.is_packed(module, name)
    return not plain and weight.dim() >= 3 and "expert" in type(module).__name__.lower()


def _is_stack(module: Model, name: str, size: tuple[int, ...]) -> bool:
    """Whether a 3-d parameter holds one matrix per expert (or per block of a block-diagonal map)."""
    from torch import nn

    from lora_kit import stacks

    if stacks.is_packed(module, name):
        return True
    weight = module._parameters[name]
    if not weight.is_floating_point() or min(size[1:]) < 2 or type(module).forward is nn.Module.forward:
        return False
    return "expert" in type(module).__name__.lower() or (size[1] == size[2] and "weight" in name)


def stack_shape(module: Model, name: str) -> tuple[int, ...] | None:
    """The (experts, ·, ·) shape behind a packed parameter, or None for a plain one."""
    from lora_kit import stacks

    return stacks.shape_of(module, name)


def shape(module: Model) -> tuple[int, int]:
    """(out features, in features) of a linear layer, whatever layout the weight is stored in."""
    if type(module).__name__ == "Conv1D":
        rows, columns = module.weight.shape
        return columns, rows
    if type(module).__name__ == "Conv1d":
        return module.out_channels, module.in_channels
    return module.out_features, module.in_features


def within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def output_embeddings(model: Model) -> Model:
    """The output head of a language model."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _output_weights(model: Model) -> set[int]:
    """Ids of the weights of the output head, and of every embedding (a linear layer may be tied to one)."""
    from torch import nn

    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = output_embeddings(model)
    if output is not None and hasattr(output, "weight"):
        found.add(id(output.weight))
    # a model of models (speech, vision) may hold language models with heads of their own
    for module in model.modules():
        inner = output_embeddings(module) if module is not model else None
        if inner is not None and hasattr(inner, "weight"):
            found.add(id(inner.weight))
    return found


def is_router_class(cls: type) -> bool:
    return bool(re.search(r"Router|Gating|TopK.*Gate|MoE?Gate$", cls.__name__))


def _expert_counts(model: Model) -> dict[str, set[int]]:
    """Path of a module → numbers of experts that hang directly below it."""
    from torch import nn

    counts: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        above = path.rpartition(".")[0]
        if "expert" not in type(module).__name__.lower() and "expert" not in path.rpartition(".")[2]:
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            counts.setdefault(above, set()).add(len(module))
        for name, weight in module._parameters.items():
            size = stack_shape(module, name) or (tuple(weight.shape) if weight is not None else ())
            if len(size) == 3 and size[0] > 1:
                counts.setdefault(above, set()).add(size[0])
    return counts


def _is_router(path: str, module: Model, parent: Model, experts: dict[str, set[int]]) -> bool:
    """A linear map with one output per expert, beside the experts; or one that calls itself a router."""
    if is_router_class(type(module)) or (parent is not None and is_router_class(type(parent))):
        return True
    return shape(module)[0] in experts.get(path.rpartition(".")[0], ())


def _runs_its_own_forward(module: Model) -> bool:
    """Whether this is a linear subclass that computes something else (in groups, or a router that returns a tuple)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    known = type(module) in (nn.Linear, Conv1D) or any(
        cls.__module__.startswith(_QUANTIZERS) for cls in type(module).__mro__
    )
    return not known and type(module).forward is not nn.Linear.forward and not _is_a_plain_product(module)


def _is_a_plain_product(module: Model) -> bool:
    """Run the module once on a small input and compare with `x Wᵀ + b`; on `meta` only shapes can be compared."""
    import torch
    from torch.nn import functional

    x = torch.ones(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            y = module(x)
            expected = functional.linear(x, module.weight, module.bias)
    except Exception:
        return False
    if not torch.is_tensor(y) or y.shape != expected.shape:
        return False
    return y.is_meta or bool(torch.allclose(y, expected, rtol=1e-2, atol=1e-3))


def _source_of(module: Model) -> str:
    cls: Any = type(module)
    return _source(cls)


@lru_cache(maxsize=1024)
def _source(cls: Any) -> str:
    """The code of a class, or nothing where there is no file of it."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def reads_weight(parent: Model, child: str, *, attributes: bool = False) -> bool:
    """Whether the code of `parent` uses the weight of its child itself, instead of calling the child.

    Mamba's fused kernels and `nn.MultiheadAttention` do: an adapter around the child would never be run, and a
    quantized weight would be read as the bytes it is packed in. `attributes` asks for reads of `.weight.data` too,
    which an adapter survives and a packed weight does not. Slices are tensor parallelism by hand
    (`pretraining_tp`), which adapters and quantized layers leave switched off.
    """
    if parent is None or not child.isidentifier():
        return False
    harmless = "dtype|device|shape|size|is_meta" + ("" if attributes else "|data|requires_grad")
    after = rf"(?!\s*\[)(?!\.({harmless})\b)"
    return bool(re.search(rf"\bself\.{child}\.weight\b{after}", _source_of(parent)))


def _is_reached_into(parent: Model, child: str, module: Model) -> bool:
    """Whether the code of `parent` sets attributes of its child, or reads its parameters: a wrapper would hide them."""
    if parent is None or not child.isidentifier():
        return False
    found = re.findall(rf"\bself\.{child}\.(\w+)(\s*=(?!=))?", _source_of(parent))
    return any(assigned or name in module._parameters for name, assigned in found)


class Towers:
    """Which of a model's modules belong to the language model, and which read images or sound.

    A model has towers only where its config holds one of its own for text, images or sound.
    """

    def __init__(self, model: Model):
        self._roots: dict[str, str] = {}
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        senses = [key for key, value in vars(config).items() if hasattr(value, "to_dict")] if config else []
        self.several = any(re.search(r"text_config|vision|image|audio|speech", key) for key in senses)
        if not self.several:
            return
        for path, module in model.named_modules():
            if path and hasattr(module, "config"):
                kind = _modality(module, text)
                if kind:
                    self._roots[path] = kind
        others = sorted(set(self._roots.values()) - {"language"})
        # what joins the towers goes with the one that it serves
        named = "language" in self._roots.values()
        self._roots[""] = others[0] if others and named else "language"

    def of(self, path: str) -> str:
        if not self.several:
            return "language"
        while path not in self._roots:
            path = path.rpartition(".")[0]
        return self._roots[path]


def _modality(module: Model, text: object) -> str | None:
    """`"language"`, `"vision"` or `"audio"` for the root of a tower, None for anything else."""
    if module.config is text or type(module.config) is type(text):
        return "language"
    name = str(getattr(module, "main_input_name", "")) if hasattr(module, "base_model_prefix") else ""
    words = f"{name} {type(module.config).__name__} {type(module).__name__}".lower()
    if re.search(r"pixel|vision|visual|image|vit\b", words):
        return "vision"
    if re.search(r"audio|speech|input_features|input_values|sound", words):
        return "audio"
    return None


def hold_still(model: Model) -> None:
    """Keep RWKV from halving weights in place before each evaluation, on this instance.

    It does so, every `rescale_every` layers, against overflow in float16. The adapters around those weights would not
    be halved with them, and quantized weights cannot be.
    """
    if not getattr(getattr(model, "config", None), "rescale_every", 0):
        return
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            mode, module.training = module.training, True
            module._rescale_layers()  # back to the weights of training
            module.training = mode
    model.config.rescale_every = 0
