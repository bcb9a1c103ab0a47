"""Cross-entropy of a linear head without ever holding the logits of all tokens.

`loss = Σ -log softmax(z)[target]`, `z = post(head(h))`. Kept whole, the logits of one step cost 12 to 16 bytes for each
token and each entry of the vocabulary: bfloat16 logits, float32 log-probabilities, and the gradient of both. Here the
loss and its gradient are computed together, a few rows at a time, already in the forward pass; what stays is the
gradient of `h`, as large as `h`. Rows without a label are skipped. The factor from above is applied in the backward
pass, which is exact, because the loss is linear in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_kit.lean.device import kind_of

CHUNK_BYTES = {"cpu": 24 * 2**20}
"""How much the logits of one chunk, in all their copies, may occupy at a time."""
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 64
"""A chunk has at least so many rows: a narrower matrix product would cost more time than the memory is worth."""


@dataclass(frozen=True)
class Head:
    """What turns a hidden state into logits."""

    run: Callable[[Tensor], Tensor]
    """(rows, hidden) -> (rows, vocabulary)."""
    vocabulary: int
    weight: Tensor | None = None
    """(vocabulary, hidden): given where `run` is this matrix, frozen, and the bias, and nothing else."""
    bias: Tensor | None = None
    parameters: tuple[Tensor, ...] = ()
    """What `run` trains."""
    post: Callable[[Tensor], Tensor] | None = None
    """What is done to the logits before the loss, row by row: a scale, a cap, a rounding."""
    dtype: torch.dtype | None = None
    """The dtype that autocast runs the product in; None without autocast."""
    z_loss: float = 0.0
    """What `linear_cross_entropy` is to be given where the logits of this head meet a loss."""


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """As `torch.nn.functional.cross_entropy(post(head(hidden)), target, ...)`.

    Args:
        hidden: (rows, hidden size).
        head: the output head.
        target: (rows,) token ids.
        ignore_index: rows with this target have no part in the loss.
        reduction: as torch's; `"none"` gives (rows,), and only with a frozen head.
        label_smoothing: share of the target's weight that is spread over the vocabulary.
        z_loss: factor of `(log Σ exp z)²`, which keeps logits from drifting (Chowdhery et al. 2022).
        chunk_bytes: bytes that the logits of a chunk may take at a time; by default `CHUNK_BYTES`.

    Raises:
        ValueError: `reduction="none"` with a head that is trained.
    """
    if reduction == "none" and head.parameters:
        raise ValueError("reduction='none' needs a frozen head: its gradient cannot be known before the rows' weights.")
    labelled = (target != ignore_index).nonzero().squeeze(1)
    whole = labelled.numel() == target.numel()
    budget = chunk_bytes or CHUNK_BYTES.get(kind_of(hidden), CHUNK_BYTES_ELSEWHERE)
    losses = _LinearCrossEntropy.apply(
        hidden if whole else hidden.index_select(0, labelled),
        target if whole else target.index_select(0, labelled),
        head,
        label_smoothing,
        z_loss,
        budget,
        reduction == "none",
        *head.parameters,
    )
    if reduction == "none":
        return losses if whole else losses.new_zeros(target.shape).index_copy(0, labelled, losses)
    return losses / labelled.numel() if reduction == "mean" else losses


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor,
        head: Head,
        smoothing: float,
        z_loss: float,
        budget: int,
        each: bool,
        *parameters: Tensor,
    ) -> Tensor:
        need_hidden, need_head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[7:])
        gradient = need_hidden or need_head
        # cast once, not for every chunk
        frozen = (_cast(head.weight, head.dtype), _cast(head.bias, head.dtype)) if head.weight is not None else None
        mine = frozen is not None and head.post is None
        pulled = torch.empty_like(hidden) if need_hidden else None
        # sums over chunks in float32 at least: a 16-bit sum would round at every chunk
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        losses: list[Tensor] = []
        start = 0
        for rows in _chunks(hidden, head.vocabulary, budget):
            wanted = target[start : start + rows.shape[0]]
            logits, back = _logits(rows, head, frozen, parameters, need_hidden, need_head)
            loss, change = _loss(logits, wanted, smoothing, z_loss, gradient, scratch=mine)
            del logits
            losses.append(loss if each else loss.sum(0, keepdim=True))
            if change is not None:
                row_gradient, gradients = back(change)
                if pulled is not None:
                    pulled[start : start + rows.shape[0]] = row_gradient
                for total, found in zip(sums, gradients, strict=True):
                    if found is not None:
                        total += found
            del change, back
            start += rows.shape[0]
        ctx.each = each
        ctx.save_for_backward(pulled, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)))
        if each:
            return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
        return torch.cat(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        pulled, *sums = ctx.saved_tensors
        if pulled is not None:
            # a single number is not rounded to the dtype of what it multiplies
            pulled = (pulled * upstream[:, None]).to(pulled.dtype) if ctx.each else pulled * upstream
        parameters = [s * upstream for s in sums]
        return pulled, None, None, None, None, None, None, *parameters


def _chunks(hidden: Tensor, vocabulary: int, budget: int) -> tuple[Tensor, ...]:
    # the logits in float32, and beside them in 16 bit, as they come and then as their gradient
    row_bytes = vocabulary * (6 if hidden.element_size() == 2 else hidden.element_size())
    return hidden.split(max(FEWEST_ROWS, budget // row_bytes)) if hidden.shape[0] else ()


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def _logits(
    rows: Tensor,
    head: Head,
    frozen: tuple[Any, Tensor | None] | None,
    parameters: tuple[Tensor, ...],
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, list[Tensor | None]]]]:
    """Logits of a chunk, and what takes a gradient of them to one of the rows and of the parameters."""
    if frozen is not None:
        weight, bias = frozen
        raw = functional.linear(rows if head.dtype is None else rows.to(head.dtype), weight, bias)
        if head.post is None:
            return raw, lambda change: (change.to(weight.dtype) @ weight, [])
        with torch.enable_grad():
            leaf = raw.requires_grad_(need_hidden)
            shown = head.post(leaf)

        def through_post(change: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            (raw_change,) = torch.autograd.grad(shown, leaf, change.to(shown.dtype))
            return raw_change @ weight, []

        return shown.detach(), through_post

    with torch.enable_grad():
        leaf = rows.detach().requires_grad_(need_hidden)
        shown = head.run(leaf)
        shown = shown if head.post is None else head.post(shown)
    inputs = [leaf] * need_hidden + [p for p in parameters if p.requires_grad] * need_head

    def through_head(change: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        found = list(torch.autograd.grad(shown, inputs, change.to(shown.dtype), allow_unused=True))
        first = found.pop(0) if need_hidden else leaf
        rest = iter(found)
        return first, [next(rest) if p.requires_grad and need_head else None for p in parameters]

    return shown.detach(), through_head


def _loss(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, gradient: bool, *, scratch: bool
) -> tuple[Tensor, Tensor | None]:
    """(rows,) losses, and their gradient in the logits (rows, vocabulary), at least float32.

    `scratch`: the logits may be overwritten.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = target[:, None]
    loss = exact.gather(1, column) * (smoothing - 1)
    if smoothing:
        loss -= exact.mean(1, keepdim=True) * smoothing
    most = exact.amax(1, keepdim=True)
    # torch.logsumexp would make one more copy of this size
    change = (exact.sub_(most) if scratch or exact is not logits else exact - most).exp_()
    weight = change.sum(1, keepdim=True)
    total = weight.log() + most
    loss += total
    if z_loss:
        loss += z_loss * total.square()
    if not gradient:
        return loss.squeeze(1), None
    change.mul_((1 + 2 * z_loss * total) / weight)
    if smoothing:
        change.sub_(smoothing / change.shape[1])
    change.scatter_add_(1, column, torch.full_like(total, smoothing - 1))
    return loss.squeeze(1), change
