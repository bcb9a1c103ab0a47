"""A second device, made of this machine's memory, on which tensors of the CPU do not mix with its own.

What it is for: code that has only seen one device makes a tensor on the CPU and never notices. Operations on
`pretend:0` run on the CPU with real numbers, after a look at where their operands are. It stays registered for as long
as the process lives; use it in one of its own.
"""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "pretend"
aten = torch.ops.aten
# a GPU takes indices from the CPU too, and copies of course
MIXED = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class There(torch.Tensor):
    """A tensor on the device; the numbers are in `inner`."""

    inner: Tensor
    __slots__ = ["inner"]

    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"There({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def storage(self):
        return self.inner.storage()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def numpy(self, **kwargs):
        raise TypeError(f"a tensor on {NAME} is no array of numpy's; move it to the CPU first")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = There(self.inner.clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]


class Here(TorchDispatchMode):
    """While entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    # a number in a tensor without dimensions goes everywhere
    stray = [t for t in tensors if not isinstance(t, There) and t.dim() > 0]
    if there and stray and func not in MIXED:
        raise RuntimeError(f"{func}: a tensor of {tuple(stray[0].shape)} on the CPU among tensors on {NAME}")
    if func is aten.copy_.default:
        target, source = (t.inner if isinstance(t, There) else t for t in args[:2])
        target.copy_(source)
        return args[0]
    inner_args, inner = pytree.tree_map_only(There, lambda t: t.inner, (args, kwargs))
    wanted = kwargs.get("device")
    leaves = torch.device(wanted).type != NAME if wanted is not None else not there
    if wanted is not None:
        inner = {**inner, "device": "cpu", "pin_memory": None} if "pin_memory" in inner else {**inner, "device": "cpu"}
    result = func(*inner_args, **inner)
    if leaves:
        return result
    wrapped = pytree.tree_map_only(Tensor, There, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def install():
    """Register the device with this process; the result has to be kept."""
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        default_generators = (torch.default_generator,)

        def get_rng_state(self, device=0):
            return torch.get_rng_state()

        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

        def set_rng_state(self, state, device=0):
            torch.set_rng_state(state)

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    # its random numbers are the CPU's
    generator = torch.Generator
    torch.Generator = lambda device=None: generator("cpu")
    torch.autograd.set_multithreading_enabled(False)

    def copied(source, target, non_blocking=False):
        target.inner.copy_(source.inner if isinstance(source, There) else source)
        return target

    # `torch.tensor(..., device=)` passes modes by
    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", copied, "PrivateUse1")
    library.impl(
        "empty_strided",
        lambda size, stride, **kwargs: There(torch.empty_strided(size, stride, dtype=kwargs.get("dtype"))),
        "PrivateUse1",
    )
    return library
