"""Where a model computes attention: one trial forward that finds each place and the shapes of its keys and values.

Most models call transformers' attention interface; what they hand to it is seen as it is. Older ones write attention
out by hand, and `Look` recognises it by its products (see `lean.watched`).
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_kit import structure
from lora_kit.types import Model

if TYPE_CHECKING:
    from torch import Tensor

    from lora_kit.watching import Seen

Role = Literal["decoder", "encoder", "cross"]
ROLES: tuple[Role, ...] = ("decoder", "encoder", "cross")

# they approximate attention, or compute it in blocks of which most would not see a key in front of the others
APPROXIMATE = ("longformer", "mra", "nystromformer", "reformer", "yoso")


@dataclass(frozen=True)
class Site:
    """One attention of the model, with the shape of its keys and values without batch and tokens."""

    path: str
    call: int
    """Which attention of the module's forward this is, counted from 0; more than one only where written by hand."""
    watched: bool
    """Whether it is written out by hand rather than called through transformers' interface."""
    role: Role
    key_shape: tuple[int, ...]
    """(*heads, width)."""
    value_shape: tuple[int, ...]
    scale: float = 1.0
    """What the products of queries and keys are multiplied with, for one written by hand."""
    window: int | None = None
    repeated: bool = False
    """Whether it runs more than once in one forward of the model, with the same prefix each time."""
    turn: tuple[tuple[float, ...], tuple[int, bool]] | None = None
    """Rotary positions: radians a token for each pair of the width, and the layout as in `lean.turned`."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.key_shape, self.value_shape

    @property
    def size(self) -> int:
        """How many numbers one virtual token has here."""
        return math.prod(self.key_shape) + math.prod(self.value_shape)


@dataclass(frozen=True)
class Found:
    """The sites of a model in the order in which they run, and what else one pass shows."""

    sites: tuple[Site, ...]
    moved: bool
    """Whether the model's values depend on absolute positions, as with a table of position embeddings."""


def find(model: Model) -> Found | None:
    """Every attention of the language model; None where no trial forward could be run. The model is left as it was."""
    seen = look(model)
    if seen is None:
        return None
    towers = structure.Towers(model)
    runs = Counter((one.path, one.call) for one in seen)
    if any(one.watched for one in seen):
        # what looks like attention over tokens but has other shapes for more of them is none
        seen = [*seen, *(look(model, lengths=(24, 32, 128)) or ())]
    kept: dict[tuple[str, int], Seen] = {}
    broken: set[tuple[str, int]] = set()
    for one in seen:
        key = one.path, one.call
        if one.values is None or not one.used or towers.of(one.path) != "language":
            continue
        first = kept.setdefault(key, one)
        if _shape(first.keys) != _shape(one.keys) or _shape(first.values) != _shape(one.values):
            broken.add(key)  # one module with several shapes: no prefix fits all of its calls
    kept = {key: one for key, one in kept.items() if key not in broken}
    turns, moved = _turns(model, kept)
    sites = [
        Site(
            one.path,
            one.call,
            one.watched,
            role_of(model, one.path),
            _shape(one.keys),
            _shape(one.values),
            one.scale,
            one.window,
            runs[key] > 1,
            turns.get(key),
        )
        for key, one in kept.items()
    ]
    return Found(tuple(sites), moved)


def states_of(model: Model, sites: tuple[Site, ...], text: list[int]) -> "list[tuple[Tensor, Tensor]] | None":
    """Keys and values (*heads, len(text), width) of each site for a text; None if no forward could be run on it."""
    import torch

    seen = look(model, text)
    if seen is None:
        return None
    first: dict[tuple[str, int], Seen] = {}
    for one in seen:
        first.setdefault((one.path, one.call), one)
    found = []
    for site in sites:
        mine = first.get((site.path, site.call))
        if mine is None or mine.values is None or _shape(mine.keys) != site.key_shape:
            return None
        index = torch.arange(len(text), device=mine.keys.device) % mine.keys.shape[-2]
        found.append((mine.keys[0][..., index, :], mine.values[0][..., index, :]))
    return found


def role_of(model: Model, path: str) -> Role:
    """Whose tokens attend to whose: a decoder's (or an encoder's alone) to its own, or to what an encoder read."""
    config: Any = getattr(model, "config", None)
    if re.search(r"encoder_?attn|encdec|cross_?att", path, re.I):
        return "cross"
    if getattr(config, "is_encoder_decoder", False) and re.search(r"(^|\.)(\w*_)?encoder\.", path):
        return "encoder"
    return "decoder"


def look(
    model: Model,
    text: list[int] | None = None,
    *,
    shift: int | None = None,
    lengths: tuple[int, ...] | None = None,
) -> "list[Seen] | None":
    """Every attention of one trial forward, on random tokens or a text; None if none could be run.

    `shift` numbers the tokens from there on instead of from 0, where the model takes position ids. `lengths` are the
    numbers of tokens to try.
    """
    import torch

    from lora_kit import probe, routing
    from lora_kit.watching import Look

    with probe.trial(model):
        for inputs in probe.trial_inputs(model, text, lengths):
            ids = inputs.get("input_ids")
            if shift is not None:
                if ids is None:
                    continue
                place = torch.arange(ids.shape[1], device=ids.device) + shift
                inputs["position_ids"] = place.expand(ids.shape[0], -1)
            looking = Look(rows=next(iter(inputs.values())).shape[0])
            try:
                with routing.around(looking, model), looking:
                    output = model(**inputs)
            except Exception:  # whatever a model raises that does not like these inputs
                continue
            marks = {i: [s.mark] for i, s in enumerate(looking.seen) if s.mark is not None}
            reached = probe.reached(output, marks, really=True)
            for i, one in enumerate(looking.seen):
                one.used = reached is None or i in reached
            return looking.seen
    return None


def _shape(states: "Tensor | None") -> tuple[int, ...]:
    return () if states is None else (*states.shape[1:-2], states.shape[-1])


def _turns(model: Model, kept: "dict[tuple[str, int], Seen]") -> tuple[dict[tuple[str, int], Any], bool]:
    """The rotary layout of each site that has one, and whether anything else depends on positions.

    Two passes over the same tokens, numbered from 0 and from `SHIFT` on, must give keys that differ by the rotation of
    one of the model's own tables of frequencies, and equal values.
    """
    from lora_kit import probe

    with probe.trial(model):
        tables = [b.float().flatten() for name, b in model.named_buffers() if "inv_freq" in name]
        tables = list({tuple(t.tolist()): t for t in tables if t.numel()}.values())
    config: Any = model.config
    if not tables or getattr(config, "is_encoder_decoder", False):
        return {}, True
    passes = [look(model, shift=start) for start in (0, SHIFT)]
    if passes[0] is None or passes[1] is None or len(passes[0]) != len(passes[1]):
        return {}, True
    turns: dict[tuple[str, int], Any] = {}
    moved = False
    for before, after in zip(passes[0], passes[1], strict=True):
        key = before.path, before.call
        if key not in kept or before.values is None or after.values is None:
            continue
        size = float(before.values.abs().max())
        moved |= float((before.values - after.values).abs().max()) > 2e-2 * size
        change = float((before.keys - after.keys).float().norm())
        if change > 2e-2 * float(before.keys.float().norm()):
            found = _turn(before.keys.float(), after.keys.float(), tables)
            moved |= found is None
            if found is not None:
                turns[key] = found
    return turns, moved


SHIFT = 3


def _turn(
    before: "Tensor", after: "Tensor", tables: "list[Tensor]"
) -> tuple[tuple[float, ...], tuple[int, bool]] | None:
    from lora_kit.lean.prefix_attention import turned

    width = before.shape[-1]
    fits = []
    for table in tables:
        angles = SHIFT * table.to(before.device)
        for start in {0, width - 2 * table.numel()} if 2 * table.numel() <= width else ():
            for neighbours in (False, True):
                guess = turned(before, angles.cos(), angles.sin(), (start, neighbours))
                fits.append((float((guess - after).norm()), tuple(table.tolist()), (start, neighbours)))
    if not fits:
        return None
    error, frequencies, layout = min(fits)
    return (frequencies, layout) if error < 5e-2 * float((after - before).norm()) else None
