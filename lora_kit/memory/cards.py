"""How much memory a graphics card has, by its name or as a number."""

import re

from lora_kit.errors import OptionError, listing, nearest

GIB = 2**30

CARDS = {
    "RTX 3060": 12, "RTX 3060 Ti": 8, "RTX 3070": 8, "RTX 3080": 10, "RTX 3080 Ti": 12, "RTX 3090": 24,
    "RTX 3090 Ti": 24, "RTX 4060": 8, "RTX 4060 Ti": 8, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12, "RTX 4070 Ti": 12,
    "RTX 4070 Ti Super": 16, "RTX 4080": 16, "RTX 4090": 24, "RTX 5060 Ti 16GB": 16, "RTX 5070": 12, "RTX 5070 Ti": 16,
    "RTX 5080": 16, "RTX 5090": 32, "RTX A4000": 16, "RTX A5000": 24, "RTX A6000": 48, "RTX 6000 Ada": 48,
    "RTX PRO 6000": 96, "T4": 16, "P100": 16, "V100": 16, "V100 32GB": 32, "A10": 24, "A10G": 24, "A30": 24, "A40": 48,
    "A100": 40, "A100 80GB": 80, "L4": 24, "L40": 48, "L40S": 48, "H100": 80, "H100 NVL": 94, "H200": 141, "B200": 180,
}  # fmt: skip
"""Name → memory as its maker gives it, in GiB."""


def size_of(card: str | int) -> int:
    """Bytes of a card: its name, a size such as `"12GB"` (taken as 2³⁰ bytes each, as card makers do), or bytes.

    Example:
        >>> size_of("12GB") == size_of("RTX 3060") == 12 * 2**30
        True
    """
    if isinstance(card, int) and not isinstance(card, bool):
        if card < 2**20:
            raise OptionError(f"card={card!r} is a number of bytes, and that is less than 1 MiB; for GiB: '{card}GB'.")
        return card
    if isinstance(card, str):
        number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(G|GB|GiB|M|MB|MiB)\s*", card, re.I)
        if number and float(number[1]) > 0:
            return int(float(number[1]) * (GIB if number[2][0] in "gG" else 2**20))
        known = {_plain(name): size for name, size in CARDS.items()}
        if _plain(card) in known:
            return known[_plain(card)] * GIB
    raise OptionError(
        f"unknown card {card!r}; accepted: a size such as '12GB', a number of bytes, or one of {listing(CARDS, 50)}."
        f"{nearest(str(card), CARDS)}"
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())
