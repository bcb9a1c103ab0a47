"""The truths that tests and benchmarks compare with: plain torch, written for clarity alone."""

import torch
from torch.nn import functional

# The 16 values of NF4 (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, zero included.
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def lora_linear(x, weight, bias, a, b, scale):
    """`x Wᵀ + bias + scale · x Aᵀ Bᵀ`: (..., in) -> (..., out)."""
    return functional.linear(x, weight, bias) + scale * (x @ a.T @ b.T)


def nf4_round_trip(weight, block=64):
    """Each value to the nearest of the 16, after scaling its block of 64 to [-1, 1]; scales kept in float32."""
    blocks = weight.float().reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).reshape(weight.shape)


def int8_round_trip(weight):
    """Each row to whole steps of its largest magnitude / 127."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round() * scale


def token_loss(logits, labels):
    """(summed negative log-likelihood, labelled tokens) of next-token prediction, token by token."""
    total, count = 0.0, 0
    for row, wanted in zip(logits, labels, strict=True):
        for position in range(len(wanted) - 1):
            if wanted[position + 1] != -100:
                total -= row[position].double().log_softmax(-1)[wanted[position + 1]].item()
                count += 1
    return total, count


def adapted_stack(weight, a, b, scale, *, out_first):
    """Each expert's `W + scale · B A`, one at a time: (experts, out, in), or (experts, in, out) if not `out_first`.

    `a` is (rank · experts, in) with the experts' blocks one after the other, `b` (out, rank · experts) with the experts
    side by side: PEFT's layout.
    """
    experts = weight.shape[0]
    rank = a.shape[0] // experts
    found = []
    for e in range(experts):
        down = a[e * rank : (e + 1) * rank]
        up = b[:, [r * experts + e for r in range(rank)]]
        update = up @ down
        found.append(weight[e] + scale * (update if out_first else update.T))
    return torch.stack(found)


def prefix_attention(query, key, value, prefix_key, prefix_value, scale, sees=None, added=None):
    """`softmax(q [P_k; K]ᵀ · scale + [0, added]) [P_v; V]`, head by head: (batch, heads, tokens, width).

    `sees` (batch or 1, heads or 1, queries, keys) is True where a query may look; all of them see the whole prefix.
    """
    batch, heads, queries, _ = query.shape
    size, tokens = prefix_key.shape[1], key.shape[2]
    shared = heads // key.shape[1]
    full = (batch, heads, queries, tokens)
    sees = torch.ones(full, dtype=torch.bool) if sees is None else sees.expand(full)
    added = query.new_zeros(full) if added is None else added.expand(full)
    rows = []
    for b in range(batch):
        found = []
        for h in range(heads):
            keys = torch.cat([prefix_key[h // shared], key[b, h // shared]])
            values = torch.cat([prefix_value[h // shared], value[b, h // shared]])
            scores = query[b, h] @ keys.T * scale
            scores = scores + functional.pad(added[b, h], (size, 0))
            hidden = functional.pad(~sees[b, h], (size, 0), value=False)
            found.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        rows.append(torch.stack(found))
    return torch.stack(rows)
