"""Tiny random models of (almost) any architecture in transformers, built from its own config class.

`recipe("qwen3", "causal-lm")` shrinks the default config by rules for the names of its fields, builds the model and
finds a batch that it takes. Nothing is downloaded. A few architectures need values of their own: `OWN`.
"""

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from lora_kit.base import GENERATING, TASKS

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, WORDS, LABELS = 64, 4, 2, 16, 128, 128, 3
LARGEST = 40_000_000

# value → names of config fields (each a full match) that take it
_SIZES: list[tuple[Any, str]] = [
    (
        HIDDEN,
        r"hidden_sizes?_out|hidden_size|d_model|n_embd|model_dim|emb(ed)?_dim|embedding_size|embed_size|dim|dim_model|d_embed"
        r"|(encoder|decoder|out|output|mm|cross_attention|encoder_hidden)_hidden_(size|dim)|hidden_dim|hidden_size_per_layer_input"
        r"|(word_embed_)?proj(ection)?_dim|text_embed_dim|image_embed_dim|width|feat_proj_dim|(vision_)?output_dim|lru_width"
        r"|encoder_hidden_size|decoder_hidden_size|d_latents",
    ),
    (
        2,
        r"num_hidden_layers?|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|(en|de)coder_num_layers|n_blocks"
        r"|num_blocks|num_hidden_groups?|depth|num_local_layers|n_mamba_layers",
    ),
    (
        KV_HEADS,
        r"num_key_value_heads|n_kv_heads?|num_kv_heads|attention_num_key_value_heads|multi_query_group_num|num_query_groups"
        r"|n_head_kv|swa_num_key_value_heads|num_global_key_value_heads",
    ),
    (
        HEADS,
        r"num_attention_heads|n_heads?|num_heads|((en|de)coder_)?attention_heads|num_(en|de)coder_attention_heads|num_attn_heads"
        r"|nhead|swa_num_attention_heads|linear_num_(key|value)_heads|index_n_heads",
    ),
    (
        HEAD,
        r"(attention_|global_|swa_|swa_v_|v_|qk_|index_)?head_dim|d_kv|dim_head|(attention_)?head_size|kv_channels|size_per_head"
        r"|qk_nope_head_dim|linear_(key|value)_head_dim|num_mel_bins|n_mels|mamba_(d_)?head(_?dim)?|mamba_d_head",
    ),
    (8, r"qk_rope_head_dim|rotary_dim|(mamba_|ssm_)?(d_)?state(_size)?|(mamba_)?chunk_size|index_topk"),
    (
        8,
        r"mamba_n(um)?_heads|n_mamba_heads|(attention|swa|local)_window(_size)?|sliding_window(_size)?|window_size_attn",
    ),
    (32, r"(q|kv|o)_lora_rank"),
    (
        INNER,
        r".*intermediate_size(_mlp)?|(en|de)coder_ffn_dim|ffn_dim|d_ff|n_inner|(expert_)?ffn_hidden_size|feed_forward_size|dim_ff"
        r"|inner_dim|mlp_dim|hidden_dim_ff|block_ff_dim|intermediate_dim|feed_forward_proj_dim|ff_dim|mamba_d_ssm",
    ),
    (WORDS, r".*vocab_size|vocab_size_per_layer_input"),
    (
        4,
        r".*num_experts|n_(routed_)?experts|num_local_experts|num_experts_total|num_routed_experts|num_(queries|latents)",
    ),
    (4, r"num_query_tokens|n_latents|mamba_dt_rank|time_step_rank"),
    (2, r"num_experts_per_tok(en)?|top_k|moe_(topk|k|top_k)|n_activated_experts|num_(selected|activated)_experts"),
    (
        1,
        r"(moe_)?(n|num)_shared_experts|n_group|topk_group|num_expert_group|n_expert_groups|num_limited_groups"
        r"|first_k_dense_replace|num_dense_layers|moe_layer_start_index|(num_zero_experts|zero_expert_num)|(mamba_)?n_?groups",
    ),
    (
        128,
        r"max(_(en|de)coder)?_position_embeddings|n_positions|n_ctx|max_seq_len|(max_)?seq_length|max_(source|target)_positions"
        r"|max_sequence_length|max_2d_position_embeddings",
    ),
    (0, r"layernum|mtp_num_layers|num_nextn_predict_layers|num_mtp_(layers|modules)"),
]
_RULES = [(value, re.compile(pattern)) for value, pattern in _SIZES]
_PICTURE = {"image_size": 32, "img_size": 32, "patch_size": 8}
_NOISE = re.compile(r".*dropout.*|.*_pdrop|.*layerdrop|drop_path_rate|.*jitter.*|drop_rate|.*drop_prob")
_TOKEN = re.compile(r".*_(token_id|token_index|id|ids|idx|index)")
_FILLED_IF_NONE = re.compile(r"head_dim|num_key_value_heads|vocab_size|intermediate_size")
_SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "image": 5, "video": 6, "audio": 7}


@dataclass
class Recipe:
    """A config, a batch that the model takes, and how to build it."""

    architecture: str
    task: str
    config: Any
    batch: dict[str, torch.Tensor]

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = auto_class(self.task).from_config(copy.deepcopy(self.config), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # what starts at zero in one place keeps gradients from another
                    parameter.normal_(0, 0.05)
        return model


class CannotBuild(Exception):
    """Why no tiny model of an architecture could be made; `.reasons` has every attempt's."""

    def __init__(self, message: str, reasons: list[str] | None = None):
        super().__init__(message)
        self.reasons = reasons or [message]


def architectures(task: str) -> list[str]:
    """Every model type in transformers' table for the task."""
    return list(getattr(modeling_auto, TASKS[task][1]))


def auto_class(task: str) -> Any:
    return getattr(transformers, TASKS[task][0])


def recipe(architecture: str, task: str) -> Recipe:
    """Find a tiny config and a batch on which the model runs forward and backward with a finite loss."""
    reasons = []
    for way in range(4):
        try:
            config = tiny_config(architecture, task, way)
            with torch.device("meta"):
                size = sum(p.numel() for p in auto_class(task).from_config(copy.deepcopy(config)).parameters())
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if size > LARGEST:
            reasons.append(f"{size / 1e6:.0f} M parameters after shrinking")
            continue
        made = Recipe(architecture, task, config, {})
        try:
            model = made.build()
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        for batch in batches(model, config, task):
            try:
                _try(model, batch)
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            made.batch = batch
            return made
    reasons = [" ".join(reason.split())[:200] for reason in reasons]
    raise CannotBuild(reasons[0], reasons)


def _try(model: Any, batch: dict[str, torch.Tensor]) -> None:
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(training):
            value, _ = loss(model, batch)
        if value.dim() or not torch.isfinite(value):
            raise CannotBuild(f"the loss is {value}")
    value.backward()
    model.zero_grad()


def loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """(the model's loss, or cross-entropy of its logits where it gives none; its output)."""
    output = model(**batch)
    found = getattr(output, "loss", None)
    if found is not None:
        return found, output
    labels, logits = batch["labels"], output.logits.float()
    if labels.dim() == 1:
        return torch.nn.functional.cross_entropy(logits, labels), output
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1)), output


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**batch)
    for name in ("logits", "start_logits"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).float()
    return output[1].float()


def tiny_config(architecture: str, task: str, way: int = 0) -> Any:
    """The default config made small: `way` 0 and 1 through the constructor, 2 and 3 field by field."""
    if architecture == "encoder-decoder":
        return _pair()
    cls = CONFIG_MAPPING[architecture]
    default = cls().to_dict()
    small = shrink(default, one_of_each=way in (0, 2))
    small = _own(architecture, task, default, small)
    if way < 2:
        config = cls(**small)
    else:
        config = cls()
        _set(config, small)
    if "classification" in task:
        config.num_labels = LABELS
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for each in (config, text):
        if getattr(each, "pad_token_id", None) is None:
            try:
                each.pad_token_id = 0
            except Exception:
                continue
    starts = task in ("seq2seq-lm", "speech", "question-answering") or architecture in ("t5", "mt5", "umt5", "udop")
    starts = starts or architecture == "vision-encoder-decoder"
    if starts and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def _set(config: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        inner = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            _set(inner, value)
            continue
        try:
            setattr(config, key, value)
        except Exception:
            continue


def _pair() -> Any:
    from transformers import BertConfig, EncoderDecoderConfig

    one = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": INNER}
    one |= {"vocab_size": WORDS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**one), BertConfig(**one))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def shrink(fields: dict[str, Any], *, one_of_each: bool = True) -> dict[str, Any]:
    """What to override in a config, given as a dict, to make it tiny."""
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key in ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"):
            continue
        if isinstance(value, dict):
            if (key.endswith("_config") or key in ("encoder", "decoder")) and "quant" not in key:
                small[key] = shrink(value, one_of_each=one_of_each)
                if "model_type" in value:
                    small[key]["model_type"] = value["model_type"]
            continue
        if isinstance(value, bool):
            if key == "apply_spec_augment":  # masks more frames than a tiny input has
                small[key] = False
            continue
        new = _smaller(key, value, fields)
        if new is not None:
            small[key] = new
    if one_of_each:
        _one_layer_of_each_type(fields, small)
    _tokens_within_vocabulary(fields, small)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(key), dict):
            small[key] = _rope(copy.deepcopy(fields[key]), small.get("head_dim") or HEAD)
            break
    return small


def _smaller(key: str, value: Any, fields: dict[str, Any]) -> Any:
    if _NOISE.fullmatch(key):
        return 0.0 if isinstance(value, int | float) else None
    if key in _PICTURE and value:
        return _PICTURE[key] if isinstance(value, int) else [_PICTURE[key]] * len(value)
    if isinstance(value, list | tuple):
        return None
    for size, pattern in _RULES:
        if not pattern.fullmatch(key):
            continue
        if value is None and not _FILLED_IF_NONE.fullmatch(key):
            return None
        if (size == KV_HEADS and "head" in key) or "query_group" in key:
            heads = next(
                (fields[k] for k in ("num_attention_heads", "n_head", "n_heads", "num_heads") if k in fields), 0
            )
            return HEADS if value == heads else KV_HEADS
        return size
    return None


def _one_layer_of_each_type(fields: dict[str, Any], small: dict[str, Any]) -> None:
    layers = None
    types = fields.get("layer_types")
    counts = [k for k in small if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", k)]
    if isinstance(types, list | tuple) and types:
        kinds = list(dict.fromkeys(types))
        layers = max(2, len(kinds))
        small["layer_types"] = (kinds * layers)[:layers]
        small |= dict.fromkeys(counts, layers)
    for key in ("mlp_layer_types", "mlp_types", "ffn_types"):
        types = fields.get(key)
        if isinstance(types, list | tuple) and types:
            kinds = list(dict.fromkeys(types))
            small[key] = (kinds * (layers or 2))[: layers or 2]


def _tokens_within_vocabulary(fields: dict[str, Any], small: dict[str, Any]) -> None:
    words = small.get("vocab_size") or WORDS
    for key, value in fields.items():
        if not _TOKEN.fullmatch(key) or isinstance(value, bool):
            continue
        if isinstance(value, int) and value >= words:
            named = next((i for word, i in _SPECIAL.items() if word in key), None)
            small[key] = 8 + sum(map(ord, key)) % 40 if named is None else named
        elif isinstance(value, list) and any(isinstance(x, int) and x >= words for x in value):
            small[key] = [2]


def _rope(rope: Any, head: int) -> Any:
    if isinstance(rope, dict):
        for value in rope.values():
            _rope(value, head)
        if "mrope_section" in rope:
            rope["mrope_section"] = [2, 3, 3]
        for key in ("short_factor", "long_factor"):
            if key in rope:
                rope[key] = [1.0] * (head // 2)
    return rope


def _latent_attention(fields: dict[str, Any], small: dict[str, Any]) -> None:
    """Sizes that follow from others in multi-head latent attention, and expert counts that default to None."""
    rope = fields.get("qk_rope_head_dim")
    if rope and "head_dim" in fields and fields["head_dim"] in (None, rope):
        small["head_dim"] = 8
    if "qk_head_dim" in fields:
        small["qk_head_dim"] = HEAD + 8
    defaults = {"n_routed_experts": 4, "num_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    for key, value in defaults.items():
        if key in fields and fields[key] is None:
            small[key] = value
    if "num_experts_per_tok" in fields and "n_group" in fields and fields["n_group"] is None:
        small |= {"n_group": 1, "topk_group": 1}


_GEMMA_3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [INNER] * 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "vocab_size_per_layer_input": WORDS,
}
_QWEN_4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
    "layer_types": ["linear_attention", "indexed_attention"],
    "num_hidden_layers": 2,
    "ngram_vocab_size_base": 128,
}
_HYBRID = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
_HYBRID |= {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention"]

_COMPASS = {
    "layer_types": _FULL_AND_SLIDING,
    "rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in _FULL_AND_SLIDING},
}


def _three_axes(*sections: int) -> dict[str, Any]:
    """Rotary positions in time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"text_config": {"rope_parameters": rope}}


# what the rules cannot know
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "num_hidden_layers": 2},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "deberta": {"max_relative_positions": None},
    "deberta-v2": {"max_relative_positions": None},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "gemma3n_text": _GEMMA_3N,
    "glm5_next": {"text_config": {"index_kpool": 8}},
    "glm46v": _three_axes(2, 3, 3),
    "glm4v": _three_axes(2, 3, 3),
    "glm4v_moe": _three_axes(1, 1, 2),
    "glm_ocr": _three_axes(2, 3, 3),
    "glmga": _three_axes(2, 3, 3),
    "paddleocr_vl": _three_axes(2, 3, 3),
    "qwen2_5_vl": _three_axes(2, 3, 3),
    "qwen2_vl": _three_axes(2, 3, 3),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "ibert": {"quant_mode": False},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}, "audio_config": {"text_hidden_size": HIDDEN}},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 2,
        "num_experts": 4,
        "layer_types": None,
    },
    "led": {"attention_window": [4, 4]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24, "num_layers": 2, "num_hidden_layers": 4},
    "longformer": {"attention_window": [4, 4]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "muse_spark": {"vision_config": {"num_hidden_layers": 4}},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": HIDDEN}}}},
    "qwen4_exp_text": _QWEN_4,
    "qwen4_exp": {"text_config": _QWEN_4},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": KV_HEADS, "layer_types": None},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
        "num_hashes": 1,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {**_HYBRID, "n_mamba_heads": 2, "num_key_value_heads": HEADS},
    "zamba2": {
        **_HYBRID,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1, 2],
        "kv_channels": HEAD,
        "num_query_groups": HEADS,
        "num_key_value_heads": HEADS,
        "chunk_size": 8,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def _own(architecture: str, task: str, fields: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    _latent_attention(fields, small)
    for key, value in fields.items():
        if isinstance(value, dict) and isinstance(small.get(key), dict) and key.endswith("_config"):
            _latent_attention(value, small[key])
    _merge(small, OWN.get(architecture, {}))
    if architecture == "reformer":
        small["is_decoder"] = task == "causal-lm"
    return small


def _merge(small: dict[str, Any], own: dict[str, Any]) -> None:
    for key, value in own.items():
        if value is None:
            small.pop(key, None)
        elif isinstance(value, dict) and isinstance(small.get(key), dict):
            _merge(small[key], value)
        else:
            small[key] = copy.deepcopy(value)


def batches(model: Any, config: Any, task: str) -> Any:
    """Batches that the model may take, the most ordinary first."""
    draw = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None)
    words = min(words if isinstance(words, int) else WORDS, WORDS)
    for length in (12, 16, 32, 64):
        # the upper half of the vocabulary holds no special tokens
        ids = torch.randint(60 if words > 64 else 3, max(words - 1, 4), (2, length), generator=draw)
        basic = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task in GENERATING:
            basic["labels"] = ids.clone()
        elif task == "classification":
            basic["labels"] = torch.tensor([0, 2])
        elif task == "token-classification":
            basic["labels"] = torch.randint(0, LABELS, (2, length), generator=draw)
        else:
            basic |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
        if "bbox" in takes:
            basic["bbox"] = torch.randint(0, 20, (2, length, 2), generator=draw).repeat(1, 1, 2)
        senses = list(_senses(config, takes, draw))
        if task == "speech":
            for sense in senses:
                yield {"labels": basic["labels"], **sense}
        yield basic
        for sense in senses:
            yield {**basic, **sense}
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int):  # the BART family classifies by the state of the last one; LongFormer wants three
            closed = ids.clone()
            closed[:, -1] = end
            yield {**basic, "input_ids": closed}
            closed[:, [2, 4, 6]] = getattr(text, "sep_token_id", None) or end
            yield {**basic, "input_ids": closed}
        if length == 12:
            yield {k: v for k, v in basic.items() if k != "attention_mask"}
            if "decoder_input_ids" in takes:
                yield {**basic, "decoder_input_ids": ids}


def _senses(config: Any, takes: Any, draw: torch.Generator) -> Any:
    """Images and sound."""
    inner = getattr(config, "vision_config", None) or config
    size = next((getattr(inner, k) for k in ("image_size", "img_size", "input_size") if getattr(inner, k, None)), 32)
    size = size if isinstance(size, int) else size[0]
    bins = getattr(config, "num_mel_bins", None) or getattr(getattr(config, "audio_config", None), "num_mel_bins", None)
    bins = (
        bins or getattr(config, "input_feat_per_channel", None) or getattr(config, "feature_projection_input_dim", None)
    )
    if "pixel_values" in takes:
        channels = getattr(inner, "num_channels", 3) or 3
        yield {"pixel_values": torch.randn(2, channels, size, size, generator=draw)}
    if "input_features" in takes:
        for frames in (64, 2 * getattr(config, "max_source_positions", 32)):
            yield {"input_features": torch.randn(2, bins or 16, frames, generator=draw)}
            yield {"input_features": torch.randn(2, frames, bins or 16, generator=draw)}
    if "input_values" in takes:
        yield {"input_values": torch.randn(2, 4000, generator=draw)}
