"""The network through which a prefix may be trained, in the place of PEFT's `PrefixEncoder`."""

import torch
from peft import PrefixEncoder
from torch import Tensor, nn


class Reparametrized(PrefixEncoder):
    """`prefix = start + W₂ tanh(W₁ e + b₁) + b₂`, with an `e` for each virtual token (Li & Liang 2021).

    `start` stays as it is, and W₂ starts at zero, so that the prefix is the start's at first. W₂ is held site by site:
    each attention asks for its own columns only. To PEFT, which asks for the whole when it saves, it is a plain prefix.
    """

    def __init__(self, embedding: nn.Embedding, starts: list[int], width: int):
        nn.Module.__init__(self)
        self.prefix_projection = False
        self.embedding = embedding.requires_grad_(False)
        tokens, total = embedding.weight.shape
        self.seeds = nn.Parameter(torch.randn(tokens, width))
        self.inner = nn.Linear(width, width)
        ends = [*starts[1:-1], total]
        outer = {str(start): nn.Linear(width, end - start) for start, end in zip(starts, ends, strict=False)}
        for layer in outer.values():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.outer = nn.ModuleDict(outer)

    def columns(self, start: int, size: int) -> Tensor:
        """(virtual tokens, size), from column `start`, where a site begins."""
        change = self.outer[str(start)](torch.tanh(self.inner(self.seeds)))
        return self.embedding.weight[:, start : start + size] + change[:, :size]

    def forward(self, prefix: Tensor) -> Tensor:
        """The plain prefix that it comes to, (batch, virtual tokens, everything)."""
        hidden = torch.tanh(self.inner(self.seeds))
        change = torch.cat([layer(hidden) for layer in self.outer.values()], -1)
        return (self.embedding.weight + change)[prefix]
