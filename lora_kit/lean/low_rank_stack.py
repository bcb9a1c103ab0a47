"""A stack of matrices with a low-rank update, `W + s · L R`, whose sum is not formed unless somebody needs it.

Models hold experts as one parameter (experts, ·, ·) and multiply by all of it, by one of its matrices, or by groups of
rows, each in code of its own. `LowRankStack` stands in the parameter's place: where it meets a matrix product, the
product is taken as `x W + s · (x L) R`, which forms neither the sum nor, in the backward pass, a gradient as large as
the stack. Any other operation gets the sum itself, with its gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_kit.lean.waiting import answer, asks, read


class LowRankStack(torch.Tensor):
    """(..., p, q): `base + scale · left @ right`, with left (..., p, rank) and right (..., rank, q)."""

    base: Tensor
    left: Tensor
    right: Tensor
    scale: float
    tell: Callable[[], None]

    @staticmethod
    def of(base: Tensor, left: Tensor, right: Tensor, scale: float, tell: Callable[[], None]) -> "LowRankStack":
        """The sum of a frozen stack and an update, whose factors may have another dtype.

        `tell` is called where the sum has to be formed after all.
        """
        made: LowRankStack = _Reached.apply(base.detach(), left, right, scale)
        made.base, made.left, made.right, made.scale, made.tell = base.detach(), left, right, scale, tell
        return made

    def whole(self) -> Tensor:
        """The sum."""
        self.tell()
        left, right = self.left.to(self.base.dtype), self.right.to(self.base.dtype)
        with torch.autocast(self.base.device.type, enabled=False):
            add = torch.addmm if self.base.dim() == 2 else torch.baddbmm
            return add(self.base, left, right, alpha=self.scale)

    def turned(self) -> "LowRankStack":
        """Each matrix transposed."""
        return LowRankStack.of(self.base.mT, self.right.mT, self.left.mT, self.scale, self.tell)

    def some(self, index: Any) -> "LowRankStack":
        """One matrix, or a stack of some."""
        return LowRankStack.of(self.base[index], self.left[index], self.right[index], self.scale, self.tell)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        found = _PRODUCTS[func](*args, **kwargs) if func in _PRODUCTS else None
        if found is not None:
            return found
        if asks(func):
            return answer(func, args, kwargs)
        if func is torch.Tensor.data_ptr:  # asked to see whether memory is aligned
            return args[0].base.data_ptr()
        return func(*_wholes(args), **_wholes(kwargs))

    # torch's stubs declare it as a plain function, though it has to be a class method
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # what goes past Python's operators; the graph is `_Reached`'s
        with torch.no_grad():
            return func(*_wholes(args), **_wholes(kwargs or {}))


class _Reached(Function):
    """Ties the sum that does not exist to the graph, for code that never asks Python."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, left: Tensor, right: Tensor, scale: float) -> LowRankStack:
        ctx.scale = scale
        ctx.save_for_backward(left, right)
        made: LowRankStack = torch.Tensor._make_wrapper_subclass(
            LowRankStack, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        return made

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> tuple:
        left, right = ctx.saved_tensors
        dleft = ctx.scale * (change @ right.to(change.dtype).mT)
        dright = ctx.scale * (left.to(change.dtype).mT @ change)
        return None, dleft.to(left.dtype), dright.to(right.dtype), None


class _Update(Function):
    """`x L R`, which keeps x and the factors as they are, no copy of them in another dtype or order."""

    @staticmethod
    def forward(
        ctx: Any, product: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, left: Tensor, right: Tensor
    ) -> Tensor:
        ctx.product, ctx.dtype = product, dtype
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.save_for_backward(x, left, right)
        return product(x, left.to(dtype), right.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        need = ctx.needs_input_grad[2:]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            leaves = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, need, strict=True)]
            x, left, right = leaves
            y = ctx.product(x, left.to(ctx.dtype), right.to(ctx.dtype))
        found = iter(torch.autograd.grad(y, [t for t, n in zip(leaves, need, strict=True) if n], dy))
        return None, None, *(next(found) if n else None for n in need)


def _wholes(given: Any) -> Any:
    """The same arguments with sums that exist."""
    return read(given, LowRankStack, LowRankStack.whole)


def _plus_update(product: Tensor, stack: LowRankStack, update: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`x W + s · x L R`, given the first."""
    return torch.add(product, _Update.apply(update, stack.base.dtype, x, stack.left, stack.right), alpha=stack.scale)


def _is_stack(value: Any, dims: int) -> bool:
    return isinstance(value, LowRankStack) and value.dim() == dims


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if isinstance(x, LowRankStack) or isinstance(bias, LowRankStack) or not _is_stack(weight, 2):
        return None
    product = functional.linear(x, weight.base, bias)
    return _plus_update(product, weight, _linear_update, x)


def _linear_update(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, right), left)


def _matmul(x: Any, weight: Any) -> Tensor | None:
    if isinstance(x, LowRankStack) and not isinstance(weight, LowRankStack):
        return _plus_update(x.base @ weight, x, lambda v, left, right: left @ (right @ v), weight)
    if isinstance(x, LowRankStack) or not isinstance(weight, LowRankStack):
        return None
    return _plus_update(x @ weight.base, weight, lambda v, left, right: (v @ left) @ right, x)


def _grouped(x: Any, weight: Any, *, offs: Any = None, **more: Any) -> Tensor | None:
    if isinstance(x, LowRankStack) or not _is_stack(weight, 3) or offs is None or any(more.values()):
        return None

    def update(v: Tensor, left: Tensor, right: Tensor) -> Tensor:
        # these kernels want rows of whole 16 bytes, so a rank between is filled up with zeros; and no gaps
        missing = -left.shape[-1] % (16 // left.element_size())
        left, right = functional.pad(left, (0, missing)), functional.pad(right, (0, 0, 0, missing))
        return _grouped_mm(_grouped_mm(v, left.contiguous(), offs=offs), right.contiguous(), offs=offs)

    return _plus_update(_grouped_mm(x, weight.base, offs=offs), weight, update, x)


def _item(stack: Any, index: Any) -> LowRankStack | None:
    numbers = torch.is_tensor(index) and index.dim() < 2 and index.dtype != torch.bool
    return stack.some(index) if _is_stack(stack, 3) and (isinstance(index, int) or numbers) else None


def _transposed(stack: Any, first: Any = 0, second: Any = 1) -> LowRankStack | None:
    if not isinstance(stack, LowRankStack):
        return None
    dims = stack.dim()
    return stack.turned() if {first % dims, second % dims} == {dims - 1, dims - 2} else None


def _matrix_transposed(stack: Any) -> LowRankStack | None:
    return stack.turned() if isinstance(stack, LowRankStack) else None


_grouped_mm: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
# under every name that the same product has
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.matmul: _matmul, torch.Tensor.matmul: _matmul, torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul, torch.Tensor.mm: _matmul, torch.bmm: _matmul, torch.Tensor.bmm: _matmul,
    torch.Tensor.__getitem__: _item,
    torch.Tensor.transpose: _transposed, torch.transpose: _transposed,
    torch.Tensor.t: _matrix_transposed, torch.t: _matrix_transposed,
    torch.Tensor.T.__get__: _matrix_transposed, torch.Tensor.mT.__get__: _matrix_transposed,  # type: ignore[attr-defined]  # properties, which the stubs have as tensors
}  # fmt: skip
_PRODUCTS |= {
    product: _grouped
    for product in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if product is not None
}
