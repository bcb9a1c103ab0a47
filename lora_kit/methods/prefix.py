"""Prefix tuning: trained keys and values in front of each layer's own, inside attention."""

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_kit.attention import ROLES
from lora_kit.errors import OptionError, UnsupportedError, listing
from lora_kit.messages import quiet
from lora_kit.methods.method import Attached, Method, Rate, positive_integer
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

    from lora_kit.attention import Found, Site


@dataclass(frozen=True)
class Prefix(Method):
    """Train keys and values that every layer's attention sees in front of its own; the base stays frozen.

    `softmax(q [P_k; K]ᵀ / √d) [P_v; V]`, with P_k and P_v of shape (num_virtual_tokens, heads, head size) for each
    attention (Li & Liang 2021). They start as the keys and values that the model itself computes for a short text.
    The prefix never enters the key/value cache and moves no position. It works with gradient checkpointing, on a
    quantized base and on every model whose attention is a softmax over keys; of a model that mixes attention with
    other layers, the attention gets it.

    Example:
        >>> Prefix(num_virtual_tokens=32).size
        '32 tokens'
    """

    word: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    summary: ClassVar[str] = "keys and values in front of every layer's own"
    mergeable: ClassVar[bool] = False
    quantizable: ClassVar[bool] = True
    rate: ClassVar[Rate] = Rate(3e-2, 0.3)
    language_rate: ClassVar[Rate] = Rate(5e-2, 0.4)
    head_factor: ClassVar[float] = 1.0
    weight_decay: ClassVar[float] = 0.0
    warmup: ClassVar[float] = 0.1
    also_called: ClassVar[dict[str, str]] = {
        "prefix_projection": "reparametrization",
        "prefix_length": "num_virtual_tokens",
        "init_weights": "init",
    }

    num_virtual_tokens: int = 20
    """How many keys and values each attention gets."""
    init: Literal["text", "random", "zero"] = "text"
    """What training starts from: the model's own keys and values for a text, random ones, or zeros."""
    init_text: str | tuple[int, ...] | None = None
    """The text for `init="text"`, or its token ids. None: the first words of the task's data where they are known
    (`finetune`, `compare`), else tokens spread over the vocabulary."""
    attention: tuple[str, ...] | None = None
    """For an encoder-decoder: which attention gets a prefix, of `"encoder"`, `"decoder"` (its attention to itself) and
    `"cross"` (the decoder's to the encoder). None: all three, as in the paper."""
    reparametrization: int | None = None
    """Width of a two-layer network through which the prefix is trained (Li & Liang 2021, section 4.3), folded into
    plain keys and values when saved. None: none."""

    def __post_init__(self) -> None:
        positive_integer("prefix", "num_virtual_tokens", self.num_virtual_tokens)
        if self.reparametrization is not None:
            positive_integer("prefix", "reparametrization", self.reparametrization)
        if self.init not in ("text", "random", "zero"):
            raise OptionError(f"prefix: init must be 'text', 'random' or 'zero', got {self.init!r}.")
        if self.init_text is not None and self.init != "text":
            raise OptionError(f"prefix: init_text needs init='text', got init={self.init!r}.")
        if isinstance(self.init_text, list):
            object.__setattr__(self, "init_text", tuple(self.init_text))
        ids = self.init_text if isinstance(self.init_text, tuple) else ()
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise OptionError(f"prefix: init_text must be one text or a list of token ids, got {self.init_text!r}.")
        if self.attention is not None:
            chosen = (self.attention,) if isinstance(self.attention, str) else tuple(self.attention)
            if not chosen or set(chosen) - set(ROLES):
                raise OptionError(f"prefix: attention must be some of {listing(ROLES)}, got {self.attention!r}.")
            object.__setattr__(self, "attention", chosen)

    @property
    def size(self) -> str:
        return f"{self.num_virtual_tokens} tokens"

    def start_from(self, texts: list[str]) -> "Prefix":
        if self.init != "text" or self.init_text is not None or not texts:
            return self
        # a few times more words than tokens needed: whatever the tokenizer, that is enough
        words = " ".join(texts[: 4 * self.num_virtual_tokens]).split()[: 8 * self.num_virtual_tokens]
        return dataclasses.replace(self, init_text=" ".join(words))

    def check(self, model: Model, heads: list[str]) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise UnsupportedError(
                f"prefix tuning needs a model of transformers, whose attention it finds; {type(model).__name__} is "
                "none. Use method='lora'."
            )
        if self.attention is not None and not model.config.is_encoder_decoder and self.attention != ("decoder",):
            raise OptionError(
                f"prefix: attention={self.attention!r} is for encoder-decoders; {type(model).__name__} is none. Leave "
                "attention out."
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            # what can be said before the weights are there; `attach` looks at the attention itself
            if not any(re.search(r"att(entio)?n", path, re.I) for path, _ in model.named_modules()):
                raise UnsupportedError(_without_attention(model))
            return
        self._sites(model)
        if self.init == "text":
            self._start_ids(model)

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        from functools import partial

        from lora_kit import attention, insertion, targets
        from lora_kit.methods.native import wrap
        from lora_kit.methods.reparametrized import Reparametrized

        insertion.attend_in_full(model)
        found, sites = self._sites(model)
        states = None
        weightless = any(parameter.is_meta for parameter in model.parameters())
        if self.init == "text" and not weightless:
            with quiet("bitsandbytes.autograd._functions"):
                states = attention.states_of(model, sites, self._start_ids(model))
            if states is None:
                raise UnsupportedError(
                    f"prefix: {type(model).__name__} could not be run on the start text. Use init='random'."
                )
        reason = insertion.unreadable(model, found, sites)
        task = targets.peft_task(model, heads)
        config = insertion.config_for(task, sites, self.num_virtual_tokens, heads, reason)
        adapted, fits = insertion.wrap(model, config, sites, name, partial(wrap, exactly=True))
        starts = insertion.starts(sites)
        weight = adapted.prompt_encoder[name].embedding.weight
        if self.init != "random" and not weightless:
            weight.data.zero_()
        if states is not None:
            flat = [state.movedim(-2, 0).flatten(1) for pair in states for state in pair]
            weight.data[:, : starts[-1]] = _cat(flat).to(weight)
        if reason is None and not weightless and not (fits and insertion.agrees(adapted)):
            reason = "PEFT's cache leads to other numbers"
            insertion.flatten(adapted.peft_config[name], starts[-1])
        if self.reparametrization is not None:
            through = Reparametrized(adapted.prompt_encoder[name].embedding, starts, self.reparametrization)
            adapted.prompt_encoder[name] = through.to(adapted.device)
        facts = insertion.facts(sites, reason)
        return Attached(adapted, self._coverage(model, sites, reason), facts={"prefix": facts})

    def _sites(self, model: Model) -> "tuple[Found, tuple[Site, ...]]":
        """The attention that gets a prefix, after refusing models that have none."""
        from lora_kit import attention

        if model.config.model_type in attention.APPROXIMATE:
            raise UnsupportedError(
                f"{type(model).__name__} approximates attention, or computes it in blocks, in a way that has no place "
                "for a prefix. Use method='lora'."
            )
        with quiet("bitsandbytes.autograd._functions"):
            found = attention.find(model)
        if found is None:
            raise UnsupportedError(
                f"prefix tuning finds a model's attention in a trial forward, and {type(model).__name__} could not be "
                "run on token ids alone. Use method='lora'."
            )
        if not found.sites:
            raise UnsupportedError(_without_attention(model))
        sites = tuple(site for site in found.sites if self.attention is None or site.role in self.attention)
        if not sites:
            has = listing(sorted({site.role for site in found.sites}))
            raise OptionError(
                f"prefix: {type(model).__name__} has no {listing(self.attention or ())} attention: {has}."
            )
        return found, sites

    def _coverage(self, model: Model, sites: "tuple[Site, ...]", reason: str | None) -> str:
        roles = [f"{sum(site.role == role for site in sites)} {role}" for role in ROLES]
        text = f"{self.num_virtual_tokens} keys and values in each of {len(sites)} attentions"
        if model.config.is_encoder_decoder:
            text += f" ({listing(role for role in roles if not role.startswith('0 '))})"
        else:
            inner = model.config.get_text_config()
            others = (getattr(inner, "num_hidden_layers", None) or 0) - len({site.path for site in sites})
            text += f" ({others} layers have none)" if others > 0 else ""
        return text + (f"; plain PEFT cannot use its file ({reason})" if reason else "")

    def _start_ids(self, model: Model) -> list[int]:
        """Exactly `num_virtual_tokens` token ids."""
        wanted = self.num_virtual_tokens
        vocabulary = _vocabulary(model)
        if isinstance(self.init_text, str):
            ids = _tokenize(self.init_text, model)
        elif self.init_text is not None:
            ids = list(self.init_text)
        else:
            # No text is known. Vocabularies are ordered by merge rank or frequency: after the special and
            # single-byte entries at the front come the common words.
            first = min(1000, vocabulary // 3)
            last = min(4000, vocabulary - 1)
            ids = [first + (last - first) * i // wanted for i in range(wanted)]
        wrong = [i for i in ids if not 0 <= i < vocabulary]
        if wrong or not ids:
            raise OptionError(
                f"prefix: init_text gives token ids {wrong[:5] or 'of length 0'}; needed are ids below the "
                f"vocabulary's {vocabulary}."
            )
        return (ids * -(-wanted // len(ids)))[:wanted]


def _tokenize(text: str, model: Model) -> list[int]:
    from lora_kit import base

    tokenizer = base.tokenizer_of(model)
    if tokenizer is None:
        raise OptionError(
            "prefix: init_text is a string, but no tokenizer is known for this model (its config names no folder or "
            "hub id that has one). Pass the token ids: init_text=tokenizer(text)['input_ids']."
        )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _vocabulary(model: Model) -> int:
    """How many token ids there are; models that hash characters or start from latents do not say."""
    config = model.config.get_text_config()
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return int(getattr(config, "vocab_size", None) or 256)


def _cat(parts: "list[torch.Tensor]") -> "torch.Tensor":
    import torch

    return torch.cat([part.float() for part in parts], 1)


def _without_attention(model: Model) -> str:
    return (
        f"{type(model).__name__} has no attention that a prefix could be put into (no softmax over keys was seen in a "
        "trial forward). Use method='lora'."
    )
