"""Tiny models of four families, built from configs, and a tokenizer for them: nothing is downloaded."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 160
LABELS = 3
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **IDS,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, loss_type="ForCausalLM", **IDS)
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=LABELS,
            pad_token_id=0,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=3,
        )
    )


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model of the family with random weights large enough that every layer matters."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
            elif "bias" in name:
                parameter.normal_(0, 0.02)
    return model.to(dtype)


def batch(family: str, *, rows: int = 3, length: int = 11, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids of odd shape with padding at the end of two rows, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    mask[2, -1:] = 0
    ids = ids * mask
    found = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        found["labels"] = torch.arange(rows) % LABELS
    else:
        found["labels"] = ids.masked_fill(mask == 0, -100)
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0` … to ids, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {token: i for i, token in enumerate(SPECIAL)}
    words |= {f"w{i}": i + len(SPECIAL) for i in range(VOCABULARY - len(SPECIAL))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' else '' }}{{ m['content'] }}"
        "{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    )
    return made


def on_disk(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Save a tiny model and its tokenizer; returns the folder's path."""
    path = folder / f"{family}-{str(dtype).removeprefix('torch.')}"
    if not path.exists():
        build(family, dtype=dtype).save_pretrained(path)
        tokenizer().save_pretrained(path)
    return str(path)
