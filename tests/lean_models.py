"""Small models of the six architectures that the lean step is compared on, with and without it."""

import torch
import transformers

from lora_kit import adapt

WORDS = 96
_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, attention_bias=True))


def _qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True))


def _gemma3():
    config = transformers.Gemma3TextConfig(
        **_SIZES, head_dim=12, final_logit_softcapping=20.0, sliding_window=8, query_pre_attn_scalar=12
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=48,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            loss_type="ForCausalLM",
        )
    )


def _mixtral():
    config = transformers.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return transformers.MixtralForCausalLM(config)


def _bert():
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))


MODELS = {"llama": _llama, "qwen2": _qwen2, "gemma3": _gemma3, "gpt2": _gpt2, "mixtral": _mixtral, "bert": _bert}


def build(architecture, *, dtype=torch.float32, seed=0):
    """A model with weights large enough that every layer matters, norms among them."""
    torch.manual_seed(seed)
    model = MODELS[architecture]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.1)
            if parameter.dim() == 1 and "bias" not in name:
                parameter.add_(1)
    return model.to(dtype)


def adapted(architecture, *, lean, dtype=torch.float32, seed=0, method="lora", **options):
    """The model with adapters that do something: B is random too."""
    if method == "lora":
        options = {"rank": 5, **options}
    torch.manual_seed(seed)
    model = adapt(build(architecture, dtype=dtype, seed=seed), method, lean=lean, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if dtype == torch.float64:
        model.double()
    return model


def batch(architecture, *, rows=3, length=13, labels="some", seed=2):
    """Token ids of odd shape, rows two and three padded; the first labels of each row are ignored, or all are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    mask[2:, -1:] = 0
    found = {"input_ids": ids * mask, "attention_mask": mask}
    if architecture == "bert":
        # not one of each: the gradient of the classifier's bias would be what is left where its terms cancel
        found["labels"] = (torch.arange(rows) % 3).clamp_min(1)
        if labels == "none":
            found["labels"] = torch.full((rows,), -100)
        return found
    wanted = ids.masked_fill(mask == 0, -100)
    wanted[:, :3] = -100
    if labels == "none":
        wanted.fill_(-100)
    return {**found, "labels": wanted}


def step(model, inputs, *, seed=3, factor=1.7):
    """(loss, gradients in float64 by name) of one forward and backward pass."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    (loss * factor).backward()
    return loss.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, truth):
    """The largest relative difference, of the loss and of each gradient."""
    (loss, gradients), (wanted, right) = found, truth
    if gradients.keys() != right.keys():
        raise AssertionError(f"gradients differ: {sorted(gradients.keys() ^ right.keys())}")
    most = ((loss - wanted).abs() / wanted.abs().clamp_min(1e-30)).item() if wanted.isfinite() else 0.0
    for name, gradient in right.items():
        most = max(most, ((gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)).item())
    return most


def overall(found, truth):
    """Relative difference of all gradients taken together."""
    missed = sum((found[1][name] - gradient).square().sum() for name, gradient in truth[1].items())
    return (missed / sum(gradient.square().sum() for gradient in truth[1].values())).sqrt().item()


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """transformers' loss of next tokens, without its cast to float32."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), shifted)
