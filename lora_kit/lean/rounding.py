"""Stochastic rounding to bfloat16: up or down by chance, so that the mean of many roundings is the number itself.

A small update of a bfloat16 weight is smaller than half its rounding step, and rounding to the nearest loses it every
time. Rounded by chance it arrives with the probability that makes up for its size (Zamirai et al. 2020,
https://arxiv.org/abs/2010.06192).
"""

import torch
from torch import Tensor


def stochastic_round(x: Tensor) -> Tensor:
    """`x` in bfloat16, each entry rounded to one of its two neighbours so that the expected value is `x`.

    The random bits come from torch's generator of the tensor's device: `torch.manual_seed` repeats them.

    Args:
        x: float32. What bfloat16 holds exactly comes back as it is, infinities and NaN too.

    Returns:
        A new tensor of the same shape, bfloat16.

    Raises:
        TypeError: for another dtype.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.full((100_000,), 1 + 2**-10)  # between 1 and 1 + 2**-7
        >>> rounded = stochastic_round(x).float()
        >>> rounded.unique().tolist()
        [1.0, 1.0078125]
        >>> bool((rounded.mean() - x[0]).abs() < 1e-4)
        True
    """
    if x.dtype != torch.float32:
        raise TypeError(f"stochastic_round takes float32, got {x.dtype}")
    # bfloat16 is the upper half of a float32's bits: a random number added to the lower half carries into the upper
    # one as often as the lower half is large. Sign and magnitude are apart, so this rounds away from zero or towards it
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    rounded = noise.add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))
