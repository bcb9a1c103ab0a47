"""One training step of the installed code, run on fake tensors: every size and lifetime is real, no memory is.

Weights and all that comes from them are fake; token ids, masks and positions are real, so that code which looks at
them (whether anything is padded, which rows have labels) decides as it will in training. Depth is not simulated in
full: the peak of every phase grows by the same bytes with every layer more, so that two depths tell all others.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from lora_kit.adaptation import base_of
from lora_kit.lean import switch
from lora_kit.memory import step as steps
from lora_kit.memory.allocator import replay
from lora_kit.memory.blueprint import Axis, Blueprint, layer_lists
from lora_kit.memory.collector import uncollected
from lora_kit.memory.ledger import Key, Ledger, Moment, Phase, Workspace, tensors_in
from lora_kit.types import Model

LARGEST_REAL = 64 * 2**20
"""Bytes up to which a tensor that depends on no weight, such as a mask, is really made."""


@dataclass(frozen=True)
class World:
    """How the device that is planned for differs from the one that simulates."""

    block: int = 1
    """Bytes that the allocator rounds up to."""
    held: int = 0
    """Bytes that libraries get from the allocator at the first product, and keep."""
    workspaces: Mapping[str, Workspace] = field(default_factory=dict)
    shapes: Callable[[], Any] = nullcontext
    """A context in which operations keep what they would keep there."""
    prepare: Callable[[Model], None] = lambda model: None
    """What the model's modules have to be told to run as they would there."""


@dataclass(frozen=True)
class Trace:
    """Bytes alive while each operation of a step runs."""

    moments: dict[Key, Moment]
    resident: dict[str, int]
    """Between steps: kind → bytes."""
    slack: float = 0.0
    """What CUDA's allocator reserves beyond what is allocated at the peak, as a share of what is not resident."""

    @property
    def peak(self) -> tuple[Phase, Moment]:
        key = max(self.moments, key=lambda key: self.moments[key].bytes)
        return key[0], self.moments[key]


def unpacked(args: tuple, kwargs: dict[str, Any], *, a_scale: int) -> int:
    """What bitsandbytes takes for a 4-bit product: the matrix in 16 bit, and bytes a scale if they are packed again."""
    x, entries = args[0], math.prod(args[2])
    return entries * x.element_size() + (a_scale * entries // 64 if kwargs.get("absmax_8bit") is not None else 0)


class _Simulation(Ledger):
    """A ledger that really computes what depends on no weight, as long as it is small."""

    def __init__(self, mode: FakeTensorMode, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = mode

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
                # its shape function knows bfloat16 alone, the product itself more
                return _grouped(*args, **kwargs)
            if func is torch.ops.aten.index.Tensor:
                args = args[0], [place for index in args[1] for place in _places(index)]
            result = func(*args, **kwargs)
            # what was written to may come back on a fake storage of its own, which would count as another tensor
            in_place = func._schema.name.endswith("_") and isinstance(result, torch.Tensor)
            return args[0] if in_place else kwargs.get("out", result)
        if not func.is_view and self._could_be_large(given, args) and self._is_large(func, args, kwargs):
            return self._faked(func, args, kwargs)
        return func(*args, **kwargs)

    def _faked(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self.mode.from_tensor, (args, kwargs))
        with self.mode:
            return func(*args, **kwargs)

    def _could_be_large(self, given: list[torch.Tensor], args: Any) -> bool:
        """Whether the result could be, by the sizes of what comes in and the sizes asked for."""
        bound = 8
        for tensor in given:
            bound *= max(tensor.numel(), 1)
        for asked in args:
            if isinstance(asked, list | tuple) and all(isinstance(n, int) for n in asked):
                bound *= max(math.prod(n for n in asked if n > 1), 1)
        return bound > LARGEST_REAL

    def _is_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        try:
            result = self._faked(func, args, kwargs)
        except Exception:  # an operation whose shape depends on values: it is run on them
            return False
        return any(made.untyped_storage().nbytes() > LARGEST_REAL for made in tensors_in((result,)))


def _places(index: Any) -> tuple[Any, ...]:
    """A mask that is really there as the places that it marks, whose number can be known."""
    if isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
        return index.nonzero().unbind(1)
    return (index,)


def _grouped(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """The shape of a product by groups: one matrix a group, rows in groups, columns in groups, or both."""
    shape: tuple[int, ...] = (a.shape[-2], b.shape[-1])
    if a.dim() == b.dim():
        shape = (len(offs) if a.dim() == 2 else a.shape[0], *shape)
    return a.new_empty(shape, dtype=out_dtype)


def make_fake(model: Model, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU in the place of everything that is on `meta`, in place; shared stays shared."""
    known: dict[int, tuple[Any, Any]] = {}

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
            return tensor
        if id(tensor) not in known:
            plain = tensor.detach().as_subclass(torch.Tensor)
            # two tensors on one storage, as 8-bit codes are held twice, must stay on one
            key = plain.untyped_storage()._cdata
            if key not in known or known[key][1].shape != plain.shape:
                known[key] = plain, FakeTensor(mode, plain, torch.device("cpu"))
            made = known[key][1]
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                for name, value in vars(tensor).items():
                    setattr(made, name, fake_inside(value))
            known[id(tensor)] = tensor, made
        return known[id(tensor)][1]

    def fake_inside(value: Any) -> Any:
        if type(value).__name__ == "QuantState":
            for name in ("absmax", "code", "offset"):
                setattr(value, name, fake(getattr(value, name)))
            if value.state2 is not None:
                value.state2 = fake_inside(value.state2)
        return fake(value)

    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in list(holder.items()):
                if tensor is not None:
                    holder[name] = fake(tensor)
        if getattr(module, "compute_dtype", None) is not None and getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)  # as `quantization.settle` does


def weights_of(model: Model) -> list[tuple[torch.Tensor, str]]:
    """Every tensor that a model holds, with its kind; quantization constants and buffers are weights."""
    from lora_kit.memory.tracker import resident_tensors

    kinds = {id(p): "trained" for p in model.parameters() if p.requires_grad}
    return [(tensor, kinds.get(id(tensor), "weights")) for tensor in resident_tensors(model)]


def simulate(
    blueprint: Blueprint,
    step: steps.Step,
    lean: bool | str = True,
    *,
    depths: "dict[Axis, int] | None" = None,
    world: World | None = None,
    instead: "Callable[[Model, dict[str, Any], steps.Step], None] | None" = None,
) -> Trace:
    """A training step of the blueprint's model at these depths, or what is to be run instead of one."""
    world = world or World()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), uncollected(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        model = blueprint.build(depths)
        make_fake(model, mode)
        if blueprint.checkpointing and blueprint.method.word != "full":
            model.enable_input_require_grads()
        switch.enable(model, lean)
        world.prepare(model)
        ledger = _Simulation(mode, block=world.block, workspaces=world.workspaces, detailed=True)
        ledger.phase = ("load",)
        ledger.hold(world.held, "libraries")
        for tensor, kind in weights_of(model):
            ledger.add(tensor, kind)
        parameters = steps.trained(model)
        batch = steps.batch_of(model, blueprint.task, step)
        with ExitStack() as stack:
            stack.enter_context(world.shapes())
            stack.enter_context(ledger)
            if instead is not None:
                with _phases(model, ledger, []):
                    instead(model, batch, step)
                return Trace(ledger.moments, {})
            optimizer = steps.OPTIMIZERS[step.optimizer](parameters)
            ledger.phase = ("start",)
            ledger.kind = "optimizer"
            steps.settle(parameters, optimizer)
            for state in optimizer.state.values():
                for tensor in tensors_in(state.values()):
                    ledger.add(tensor, "optimizer")
            ledger.moments.clear()
            ledger.start_events()
            resident = {kind: size for kind, size in ledger._kinds.items() if size}
            stack.enter_context(_phases(model, ledger, parameters))
            for tensor in tensors_in(batch.values()):
                ledger.add(tensor, "data")
            steps.run(model, batch, optimizer, step, lambda phase: _enter(ledger, phase))
    return Trace(ledger.moments, resident, _slack(ledger, sum(resident.values())))


def _slack(ledger: Ledger, resident: int) -> float:
    found = replay(ledger.events or ())
    moving = found.peak_allocated - resident
    return (found.peak_reserved - found.peak_allocated) / moving if moving > 0 else 0.0


_KINDS = {"forward": "activations", "backward": "temporaries", "clip": "temporaries", "optimizer": "temporaries"}


def _enter(ledger: Ledger, phase: str) -> None:
    ledger.phase = (phase,)
    if phase == "log":
        ledger.mark()
    ledger.kind = _KINDS.get(phase, "temporaries")


@contextmanager
def _phases(model: Model, ledger: Ledger, parameters: list[Any]) -> Iterator[None]:
    """Have the ledger note which layer runs, forward or backward, and what gradients are."""
    handles = []

    def gradient(parameter: Any) -> None:
        ledger.add(parameter.grad, "gradients")

    for parameter in parameters:
        handles.append(parameter.register_post_accumulate_grad_hook(gradient))
    for path, layers in layer_lists(base_of(model)).items():
        for number, layer in enumerate(layers):
            handles += _watch_layer(ledger, layer, (path, number, len(layers)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_layer(ledger: Ledger, layer: nn.Module, place: tuple[str, int, int]) -> list[Any]:
    path, number, count = place

    def before(module: Any, args: Any) -> None:
        if ledger.phase[0] != "backward":
            ledger.phase = ("forward", *place)

    def after(module: Any, args: Any, output: Any) -> None:
        if ledger.phase[0] == "backward":
            return
        first = output[0] if isinstance(output, tuple) else output
        if number == count - 1:
            ledger.phase = ("head", path)
        if isinstance(first, torch.Tensor) and first.requires_grad:
            first.register_hook(entered)

    def entered(gradient: Any) -> None:
        ledger.phase = ("backward", *place)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


# ---- depth


def at_depth(blueprint: Blueprint, axes: tuple[Axis, ...], step: steps.Step, lean: bool | str, **options: Any) -> Trace:
    """The step at the blueprint's own depth: simulated shorter and carried on where layers repeat, else in full.

    Each operation of each phase is carried on by itself: what is alive while it runs grows by the same bytes with
    every period of layers more, which a peak over several operations does not.
    """
    if not axes:
        return simulate(blueprint, step, lean, **options)
    base = {axis: axis.least for axis in axes}
    first = _matched(simulate(blueprint, step, lean, depths=base, **options))
    deeper: list[tuple[float, dict[Key, Moment]]] = []
    slack = 0.0
    for axis in axes:
        trace = simulate(blueprint, step, lean, depths={**base, axis: axis.least + axis.period}, **options)
        slack = trace.slack
        deeper.append(((axis.depth - axis.least) / axis.period, _matched(trace)))
    found: dict[Key, Moment] = {}
    for key, moment in first.items():
        if all(key in other for _, other in deeper):
            found[key] = _carried_on(moment, [(times, other[key]) for times, other in deeper])
    return Trace(found, found.pop(_RESIDENT).kinds, slack)


def _carried_on(start: Moment, deeper: list[tuple[float, Moment]]) -> Moment:
    size = start.bytes + sum((other.bytes - start.bytes) * times for times, other in deeper)
    kinds = {}
    for kind in {*start.kinds, *(kind for _, other in deeper for kind in other.kinds)}:
        here = start.kinds.get(kind, 0)
        kinds[kind] = round(here + sum((other.kinds.get(kind, 0) - here) * times for times, other in deeper))
    return Moment(round(size), kinds, start.operation)


_RESIDENT: Key = (("resident",), "", 0)


def _matched(trace: Trace) -> dict[Key, Moment]:
    """Layers of the first half counted from the first, the others from the last, so that they match between depths."""
    found: dict[Key, Moment] = {_RESIDENT: Moment(sum(trace.resident.values()), trace.resident)}
    for (phase, operation, run), moment in trace.moments.items():
        if len(phase) != 4:
            found[phase, operation, run] = moment
            continue
        name, path, number, count = phase
        if 2 * number < count:
            found[(name, path, "first", number), operation, run] = moment
        if 2 * number >= count - 1:
            found[(name, path, "last", count - 1 - number), operation, run] = moment
    return found
