"""Which modules carry an adapter, and how much of the model that covers.

What counts is what a module is, not what it is called: a linear map with a weight. Left out are the output head,
heads that are trained whole, routers, and linear subclasses whose forward is their own.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_kit.errors import OptionError, TargetError, UnsupportedError, listing, nearest
from lora_kit.types import Model

if TYPE_CHECKING:
    pass

# PEFT's names for the tasks of `base.TASKS`
PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Choice:
    """The modules that will carry an adapter, and what was left out."""

    modules: dict[str, Model]
    weights: int
    """Entries of the weight matrices that are adapted."""
    total_weights: int
    """Entries of all matrices that take part in matrix products, the output head and trained heads left out."""
    total_modules: int
    skipped: dict[str, str] = field(default_factory=dict)
    """Path → reason."""

    def coverage(self) -> str:
        """`"72 of 72 linear layers (100.0 % of their weights)"`."""
        share = 100 * self.weights / max(self.total_weights, 1)
        line = f"{len(self.modules)} of {self.total_modules} linear layers ({share:.1f} % of matmul weights)"
        reasons = Counter(self.skipped.values())
        return line + "".join(f", {count} left out: {reason}" for reason, count in reasons.items())


def peft_task(model: Model) -> str | None:
    """PEFT's task type for this model, or None for a model of unknown task."""
    from lora_kit import base

    return PEFT_TASKS.get(base.task_of(model) or "")


def linear_layers(model: Model) -> dict[str, Model]:
    """Path → module for every linear map with a weight: `nn.Linear` and its kin, `Conv1D`, quantized linears."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def shape(module: Model) -> tuple[int, int]:
    """(out features, in features), whatever layout the weight is stored in."""
    if type(module).__name__ == "Conv1D":
        rows, columns = module.weight.shape
        return columns, rows
    return module.out_features, module.in_features


def output_embeddings(model: Model) -> Model:
    """The output head of a language model."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _runs_its_own_forward(module: Model) -> bool:
    """Whether this is a linear subclass that computes something else (a router that returns a tuple, say)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    known = type(module) in (nn.Linear, Conv1D) or type(module).__module__.startswith("bitsandbytes.")
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


def choose(model: Model, wanted: tuple[str, ...] | str | None, heads: list[str], *, rank: int) -> Choice:
    """The modules to adapt.

    Args:
        wanted: None for every linear layer; or names, of which each must match; or one regular expression.
        heads: paths of modules that are trained whole and so carry no adapter.
        rank: rank of the update, which no adapted matrix may be smaller than.

    Raises:
        TargetError: for a name that matches nothing.
        OptionError: for a rank larger than a matrix.
        UnsupportedError: for a model without any linear layer.
    """
    layers = linear_layers(model)
    output = output_embeddings(model)
    layers = {p: m for p, m in layers.items() if m is not output and not within(p, heads)}
    sizes = {p: shape(m)[0] * shape(m)[1] for p, m in layers.items()}
    if wanted not in (None, "all-linear"):
        chosen = match(model, wanted)
        skipped: dict[str, str] = {}
    else:
        skipped = {p: "routers" for p, m in layers.items() if _runs_its_own_forward(m)}
        small = [p for p in layers if p not in skipped and min(shape(layers[p])) < rank]
        # A gate with one output is no reason to refuse a model, a rank above its real matrices is.
        if sum(sizes[p] for p in small) < 0.01 * sum(sizes.values()):
            skipped |= dict.fromkeys(small, f"smaller than the rank {rank}")
        chosen = {p: m for p, m in layers.items() if p not in skipped}
    if not chosen:
        raise UnsupportedError(
            f"{type(model).__name__} has no linear layer that could carry an adapter. Use method='full'."
        )
    for path, module in chosen.items():
        if path in sizes and min(shape(module)) < rank:
            raise OptionError(
                f"rank {rank} is larger than the matrix of {path!r}, {shape(module)[0]} × {shape(module)[1]}; "
                f"accepted there: 1 to {min(shape(module))}. Choose a smaller rank, or other target_modules."
            )
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3 and p.is_floating_point())
    if experts and wanted is None:
        skipped["fused experts"] = "fused experts, held as 3-d parameters"
    adapted = sum(sizes[path] for path in chosen if path in sizes)
    return Choice(chosen, adapted, sum(sizes.values()) + experts, len(layers), skipped)


def match(model: Model, wanted: Iterable[str] | str) -> dict[str, Model]:
    """The modules that the names (each at least one) or the regular expression stand for.

    A name matches as PEFT matches it: the full path, or its last parts.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    carriers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | nn.Embedding | nn.Conv2d)}
    if isinstance(wanted, str):
        try:
            chosen = {p: m for p, m in carriers.items() if re.fullmatch(wanted, p)}
        except re.error as error:
            raise TargetError(f"target_modules {wanted!r} is not a regular expression: {error}.") from None
        if not chosen and any(p.endswith(f".{wanted}") for p in carriers):
            raise TargetError(
                f"target_modules is the string {wanted!r}, which is read as a regular expression for the whole path "
                f"and matches none. For a name pass a list: target_modules=[{wanted!r}]."
            )
        if not chosen:
            raise TargetError(
                f"target_modules {wanted!r} matches the path of no linear layer.{_menu(carriers, wanted)}"
            )
        return chosen
    chosen = {}
    for name in wanted:
        found = {p: m for p, m in carriers.items() if p == name or p.endswith(f".{name}")}
        if not found:
            raise TargetError(f"target_modules names {name!r}, which matches no linear layer.{_menu(carriers, name)}")
        chosen |= found
    return chosen


def _menu(carriers: dict[str, Model], name: str) -> str:
    """The names that would match, the nearest first."""
    counts = Counter(path.rpartition(".")[2] for path in carriers)
    counts.pop("", None)
    close = nearest(name.rpartition(".")[2], counts)
    names = [f"{last} ({count})" for last, count in counts.items() if not last.isdigit()]
    return f"{close} Accepted here: {listing(names)}."
