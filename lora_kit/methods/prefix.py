"""Prefix tuning: trained keys and values in front of each layer's own, by PEFT."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_kit.errors import OptionError, UnsupportedError
from lora_kit.messages import quiet, say
from lora_kit.methods.method import Attached, Method, Rate, positive_integer
from lora_kit.types import Model

if TYPE_CHECKING:
    import torch

TASKS = ("causal-lm", "seq2seq-lm", "classification")


@dataclass(frozen=True)
class Prefix(Method):
    """Train keys and values that every layer's attention sees in front of its own; the base stays frozen.

    `softmax(q [P_k; K]ᵀ / √d) [P_v; V]`, with P_k and P_v of shape (num_virtual_tokens, heads, head size) for each
    layer (Li & Liang 2021). They start as the keys and values that the model itself computes for a short text.

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
    language_rate: ClassVar[Rate] = Rate(3e-2, 0.3)
    head_factor: ClassVar[float] = 1.0
    weight_decay: ClassVar[float] = 0.0
    warmup: ClassVar[float] = 0.1

    num_virtual_tokens: int = 20
    """How many keys and values each layer gets."""
    init: Literal["text", "random", "zero"] = "text"
    """What training starts from: the model's own keys and values for a text, random ones, or zeros."""
    init_text: str | tuple[int, ...] | None = None
    """The text for `init="text"`, or its token ids. None: the first words of the task's data where they are known
    (`finetune`, `compare`), else tokens spread over the vocabulary."""

    def __post_init__(self) -> None:
        positive_integer("prefix", "num_virtual_tokens", self.num_virtual_tokens)
        if self.init not in ("text", "random", "zero"):
            raise OptionError(f"prefix: init must be 'text', 'random' or 'zero', got {self.init!r}.")
        if self.init_text is not None and self.init != "text":
            raise OptionError(f"prefix: init_text needs init='text', got init={self.init!r}.")
        if isinstance(self.init_text, list):
            object.__setattr__(self, "init_text", tuple(self.init_text))

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
        from lora_kit import base

        task = base.task_of(model)
        if task not in TASKS:
            raise UnsupportedError(
                f"prefix tuning needs a model of transformers for one of the tasks {', '.join(TASKS)}; "
                f"{type(model).__name__} is {'for ' + task if task else 'none of its classes'}. Use method='lora'."
            )
        if not _takes_cache(model):
            raise UnsupportedError(
                f"{type(model).__name__} has no attention that takes a key/value prefix (no past_key_values in its "
                "forward). Use method='lora'."
            )
        others = [head for head in heads if head not in ("classifier", "score")]
        if others:
            # PEFT's prefix finds a classification head by these two names only
            raise UnsupportedError(
                f"prefix tuning cannot train the head {others[0]!r} of {type(model).__name__} (only heads called "
                "'classifier' or 'score'). Use method='lora'."
            )
        refuse_checkpointing(model)

    def attach(self, model: Model, heads: list[str], name: str) -> Attached:
        from peft import PrefixTuningConfig

        from lora_kit import targets
        from lora_kit.methods.native import wrap

        states = self._start_states(model) if self.init == "text" else None
        config = PrefixTuningConfig(task_type=targets.peft_task(model), num_virtual_tokens=self.num_virtual_tokens)
        adapted = wrap(model, config, name)
        embedding = adapted.prompt_encoder[name].embedding.weight
        if self.init == "zero":
            embedding.data.zero_()
        elif states is not None:
            if states.shape != embedding.shape:
                # PEFT provisions one shape for all layers; where a model's layers differ, random values must do
                say(
                    f"prefix: the states of the text have shape {tuple(states.shape)}, the prefix "
                    f"{tuple(embedding.shape)}; starting from random values instead."
                )
            else:
                embedding.data.copy_(states)
        return Attached(adapted, f"{self.num_virtual_tokens} keys and values in each of {config.num_layers} layers")

    def _start_states(self, model: Model) -> "torch.Tensor":
        """The model's own keys and values for the start text: (num_virtual_tokens, layers · 2 · heads · head size)."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        ids = torch.tensor([self._start_ids(model)], device=model.device)
        cache = DynamicCache()
        was_training = model.training
        model.eval()
        try:
            # An empty cache handed to the forward collects each layer's keys and values, in encoders too: it is the
            # same door through which PEFT will later hand in the trained ones.
            with torch.no_grad(), quiet("bitsandbytes.autograd._functions"):
                if model.config.is_encoder_decoder:
                    both = EncoderDecoderCache(cache, DynamicCache())
                    model(input_ids=ids, decoder_input_ids=ids, past_key_values=both, use_cache=True)
                elif "past_key_values" in _parameters(model.forward):
                    model(input_ids=ids, past_key_values=cache, use_cache=True)
                else:
                    model.base_model(input_ids=ids, past_key_values=cache)
        finally:
            model.train(was_training)
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # each (heads, tokens, head size)
        stacked = torch.stack([state for pair in layers for state in pair])
        return stacked.permute(2, 0, 1, 3).reshape(stacked.shape[2], -1).float()

    def _start_ids(self, model: Model) -> list[int]:
        """Exactly `num_virtual_tokens` token ids."""
        wanted = self.num_virtual_tokens
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if isinstance(self.init_text, str):
            ids = _tokenize(self.init_text, model)
        elif self.init_text is not None:
            ids = [int(i) for i in self.init_text]
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


def _parameters(forward: Callable[..., Any]) -> list[str]:
    import inspect

    return list(inspect.signature(forward).parameters)


def _takes_cache(model: Model) -> bool:
    backbone: Any = getattr(model, "base_model", model)
    return "past_key_values" in _parameters(model.forward) or "past_key_values" in _parameters(backbone.forward)


CHECKPOINTING = (
    "prefix tuning with gradient checkpointing: the prefix travels in the key/value cache, which a checkpointed layer "
    "drops, so it would crash or train nothing. Switch checkpointing off, or use method='lora'."
)


def refuse_checkpointing(model: Model) -> None:
    """Raise if the model recomputes its activations."""
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise UnsupportedError(CHECKPOINTING)


def refuse_later_checkpointing(model: Model) -> None:
    """Make `model.gradient_checkpointing_enable()`, which trainers call, raise from now on: this instance only."""
    for enable in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(model, enable):
            setattr(model, enable, _raise_checkpointing)


def _raise_checkpointing(*_args: object, **_kwargs: object) -> None:
    raise UnsupportedError(CHECKPOINTING)
