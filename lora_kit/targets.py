"""Which weights carry an adapter, and how much of the model that covers.

What counts is what a module is, not what it is called (`structure.py`). Left out, each with its reason in the report:
the output head and what is tied to it, heads that are trained whole, routers, modules that are never used or whose
weight is read around them, and the towers of a multimodal model that were not asked for.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_kit import structure
from lora_kit.errors import OptionError, TargetError, UnsupportedError, listing, nearest
from lora_kit.structure import HEAD, OUTPUT, Part
from lora_kit.types import Model

# PEFT's names for the tasks of `base.TASKS`
PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    # "image-text" and "speech" have none: PEFT's classes for language models pass on arguments of text alone, which
    # such models need not take
}

TOWERS = ("language", "vision", "audio", "all")
UNUSED = "never used in a forward"


@dataclass(frozen=True)
class Choice:
    """The weights that will carry an adapter, and what was left out."""

    modules: dict[str, Model]
    """Path → linear layer."""
    parameters: tuple[str, ...]
    """Full names of parameters that PEFT adapts in place of a module: stacks, layers with a forward of their own."""
    parts: tuple[Part, ...]
    """What was there to choose from: the output head and heads left out."""
    chosen: frozenset[str]
    """Full names of the weights that are adapted."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Full name → reason."""
    where: str = "language"
    probed: bool = True
    """Whether a forward pass has shown which modules are used."""
    capped: dict[str, int] = field(default_factory=dict)
    """Full name of a matrix with a side below the rank → that side, which is its adapter's rank."""

    def share(self, towers: Iterable[str] = TOWERS) -> float:
        """Share of these towers' matmul weights that is adapted, 0 to 1."""
        parts = [p for p in self.parts if p.tower in towers]
        total = sum(p.entries for p in parts)
        return sum(p.entries for p in parts if p.full_name in self.chosen) / total if total else 0.0

    def coverage(self) -> str:
        """`"72 of 72 linear layers (100.0 % of matmul weights)"`, and what was left out and why."""
        towers = list(dict.fromkeys(p.tower for p in self.parts))
        asked = [t for t in towers if self.where in ("all", t)] or towers
        mine = [p for p in self.parts if p.tower in asked]
        line = f"{_count(mine, self.chosen)} ({100 * self.share(asked):.1f} % of matmul weights)"
        if len(towers) > 1:
            line = f"{' and '.join(asked)}: {line}"
        if self.capped:
            line += f", {len(self.capped)} of them too small for the rank, at their full rank"
        reasons = Counter(self.skipped[p.full_name] for p in mine if p.full_name in self.skipped)
        for reason, count in reasons.items():
            weight = sum(p.entries for p in mine if self.skipped.get(p.full_name) == reason)
            portion = 100 * weight / max(sum(p.entries for p in mine), 1)
            line += f", {count} left out: {reason}" + (f" ({portion:.1f} %)" if portion >= 0.05 else "")
        for tower in towers:
            if tower not in asked:
                line += f"; {tower} left out (where={tower!r} or 'all' adapts it)"
        if not self.probed:
            line += "; whether each is used in a forward could not be tried"
        return line


def _count(parts: list[Part], chosen: frozenset[str]) -> str:
    """`"12 of 14 linear layers and 4 of 4 expert stacks"`."""
    kinds = {"linear layers": ("linear", "own"), "expert stacks": ("stack",), "other weights": ("other",)}
    words = []
    for word, kind in kinds.items():
        found = [p for p in parts if p.kind in kind]
        if found:
            words.append(f"{sum(p.full_name in chosen for p in found)} of {len(found)} {word}")
    return " and ".join(words[:2]) if words else "0 of 0 linear layers"


def peft_task(model: Model, heads: Iterable[str] = ()) -> str | None:
    """PEFT's task type for this model, or None for a model of unknown task.

    By task PEFT trains modules of certain names whole. A head that holds one of them deeper inside (BigBird's) would be
    wrapped twice and saved in part, so such a model goes without a type.
    """
    from lora_kit import base

    inner = [path for head in heads for path, _ in model.get_submodule(head).named_modules() if path]
    if any(path.rpartition(".")[2] in ("classifier", "score", "qa_outputs") for path in inner):
        return None
    return PEFT_TASKS.get(base.task_of(model) or "")


def choose(
    model: Model,
    wanted: tuple[str, ...] | str | None,
    heads: list[str],
    *,
    rank: int,
    where: str = "language",
    experts: bool = True,
    try_out: bool = False,
) -> Choice:
    """The weights to adapt.

    Args:
        wanted: None for every linear map; or names, of which each must match; or one regular expression.
        heads: paths of modules that are trained whole and so carry no adapter.
        rank: rank of the update; a smaller matrix gets its own full rank.
        where: the tower of a multimodal model, one of `TOWERS`.
        experts: whether weights are adapted that no layer of their own can be replaced for: stacks of expert matrices.
        try_out: run the model once to see which modules are used; it needs its weights.

    Raises:
        TargetError: for a name that matches nothing.
        OptionError: for a rank larger than the matrices that hold half of the weights.
        UnsupportedError: for a model without any linear layer.
    """
    parts = tuple(p for p in structure.survey(model, heads) if p.reason not in (OUTPUT, HEAD))
    if wanted not in (None, "all-linear"):
        return _as_asked(model, wanted, parts, rank)
    skipped = {p.full_name: p.reason for p in parts if p.reason}
    _refuse_missing_tower(model, parts, where)
    for part in parts:
        if where not in ("all", part.tower):
            skipped.setdefault(part.full_name, f"{part.tower} tower")
        elif part.kind in ("stack", "own") and not experts:
            skipped.setdefault(part.full_name, "experts=False")
    probed = True
    if try_out:
        probed = _skip_unused(model, parts, skipped)
    left = [p for p in parts if p.full_name not in skipped]
    if not left:
        raise UnsupportedError(
            f"{type(model).__name__} has no linear layer that could carry an adapter. Use method='full'."
        )
    return Choice(
        {p.path: p.module for p in left if p.kind == "linear"},
        tuple(p.full_name for p in left if p.kind in ("stack", "own")),
        parts,
        frozenset(p.full_name for p in left),
        skipped,
        where,
        probed,
        _capped(left, rank),
    )


def _skip_unused(model: Model, parts: tuple[Part, ...], skipped: dict[str, str]) -> bool:
    """Add what a forward pass does not use to `skipped`; False if no forward could be run."""
    from lora_kit import probe

    candidates = {p.path: p.module for p in parts if p.full_name not in skipped}
    used = probe.used(model, candidates)
    if used is None:
        return False
    for part in parts:
        # the other towers do not run on text alone: that says nothing about them
        if part.tower == "language" and part.full_name not in skipped and part.path not in used:
            skipped[part.full_name] = UNUSED
    return True


def _refuse_missing_tower(model: Model, parts: tuple[Part, ...], where: str) -> None:
    towers = sorted({p.tower for p in parts})
    if where not in ("all", "language") and where not in towers:
        raise UnsupportedError(
            f"where={where!r}, but {type(model).__name__} has no such tower; it has: {listing(towers)}."
        )


def _capped(parts: list[Part], rank: int) -> dict[str, int]:
    """The matrices that a rank is too large for; an error where they are no exceptions but the rule."""
    small = [p for p in parts if min(p.rows, p.columns) < rank]
    # a gate with one output is no reason to refuse a model, a rank above its real matrices is
    if small and 2 * sum(p.entries for p in small) >= sum(p.entries for p in parts):
        first, side = small[0], min(small[0].rows, small[0].columns)
        raise OptionError(
            f"rank {rank} is larger than the matrix of {first.path!r}, {first.rows} × {first.columns}; "
            f"accepted there: 1 to {side}. Write rank={side} or less, or other target_modules."
        )
    return {p.full_name: min(p.rows, p.columns) for p in small}


def _as_asked(model: Model, wanted: Iterable[str] | str, parts: tuple[Part, ...], rank: int) -> Choice:
    """The user's own choice of modules and stacks."""
    matched = match(model, wanted)
    by_name = {p.full_name: p for p in parts}
    stacks = {name for name in matched if name in by_name and by_name[name].kind == "stack"}
    own = {f"{path}.weight" for path in matched if by_name.get(f"{path}.weight", None) in _own(parts)}
    modules = {path: m for path, m in matched.items() if path not in stacks and f"{path}.weight" not in own}
    chosen = stacks | own | {f"{path}.weight" for path in modules}
    capped = _capped([p for p in parts if p.full_name in chosen], rank)
    return Choice(modules, tuple(sorted(stacks | own)), parts, frozenset(chosen), where="all", capped=capped)


def _own(parts: tuple[Part, ...]) -> list[Part]:
    return [p for p in parts if p.kind == "own"]


def match(model: Model, wanted: Iterable[str] | str) -> dict[str, Model]:
    """The modules, and stacks of matrices, that the names (each at least one) or the regular expression stand for.

    A name matches as PEFT matches it: the full path, or its last parts.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear | Conv1D | nn.Embedding | nn.Conv1d | nn.Conv2d
    carriers = {p: m for p, m in model.named_modules() if isinstance(m, kinds)}
    carriers |= {p.full_name: p.module for p in structure.survey(model) if p.kind == "stack"}
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
    return f"{close} Accepted here: {listing(names)}. Leave target_modules out for every linear layer."
