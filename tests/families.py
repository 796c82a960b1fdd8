"""Every family of causal language models that transformers knows, as a tiny random model."""

from __future__ import annotations

import re

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WORDS = 64  # of the vocabulary
# Windows, chunks and top-k choices are given this length: more than the trainer's proof has
# tokens, as in real models, so what it cannot see must be refused by name.
REACH = 128

# What a config's numbers become, by their name; anything else keeps its default.
SIZES = {
    r"(decoder_)?vocab_size(_per_layer_input)?|ngram_vocab_size_base|unpadded_vocab_size": WORDS,
    r"\w*(hidden|embedding)_size|d_model|n_embd|emb_dim|word_embed_proj_dim|lru_width": 32,
    r"(\w+_)?intermediate_size(_mlp)?|\w*(ffn|feed_forward|ffn_hidden)_size|"
    r"(\w+_)?ffn_dim|n_inner|dff|dim_ff|d_inner": 64,
    r"(\w+_)?(num_|n_)?(attention_|value_|key_)?heads?(_per_layer)?|(num|n)_heads|index_n_heads": 4,
    r"num_key_value_heads|num_kv_heads|num_query_groups|swa_num_key_value_heads": 2,
    r"(\w+_)?head_dim|d_head|dim_head|kv_channels|rotary_dim": 8,
    r"(kv|q|o)_lora_rank": 16,
    r"(\w+_)?(num_|n_)?(hidden_)?layers?": 2,
    r"\w*num_(local_|routed_)?experts|n_routed_experts|num_blocks": 4,
    r"sliding_window(_size)?|window_size|keep_window_size|attention_chunk_size|index_topk|"
    r"attention_window_size": REACH,
    r"num_experts_per_tok(en)?|\w*topk|moe_k|n_group|topk_group|first_k_dense_replace|"
    r"\w*shared_experts": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length": 512,
    r"(bos|eos|pad|decoder_start)_token_id": 1,
}
FIXED = r"qk_head_dim|num_nextn_predict_layers|num_kv_shared_layers"
# What a family's own rules ask for beyond that.
OWN = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlnet": {"d_head": 8},
}


def tiny_config(kind: type[PreTrainedConfig], **own) -> PreTrainedConfig:
    """A config of `kind` with small numbers and one layer of each type that it has."""
    default = kind()
    values = {}
    for name, value in default.to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int) or value == 0:
            continue
        size = next((size for words, size in SIZES.items() if re.fullmatch(words, name)), None)
        if size is not None and not re.fullmatch(FIXED, name):
            values[name] = size
    types = getattr(default, "layer_types", None)
    written = getattr(kind, kind.attribute_map.get("layer_types", "layer_types"), None)
    if types and not isinstance(written, property):
        types = (list(dict.fromkeys(types)) * 2)[: max(2, len(set(types)))]
        values |= {"layer_types": types, "num_hidden_layers": len(types)}
        if isinstance(feedforward := getattr(default, "mlp_layer_types", None), list):
            values["mlp_layer_types"] = feedforward[-len(types) :]
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = tiny_config(type(part), **own)
    own = {name: value for name, value in own.items() if hasattr(default, name)}
    return kind(**values | own)


# Tried in this order until the model runs: without a window if the family can do without; with as
# many key as query heads where the latent attention asks for it.
ATTEMPTS = [
    {"sliding_window": None}, {}, {"num_key_value_heads": 4, "sliding_window": None},
    {"num_key_value_heads": 4}, {"layer_types": None},
]  # fmt: skip


def tiny_family(name: str) -> torch.nn.Module:
    """A random model of the family `name`, of at most three million parameters, in float32.

    Its weights are large enough that a token seen or not seen changes what comes out.

    Raises:
        Exception: the family's own, if it cannot be built like this.
    """
    kind = CONFIG_MAPPING[name]
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    cls = cls[0] if isinstance(cls, tuple) else cls
    problem = None
    for own in ATTEMPTS:
        try:
            torch.manual_seed(0)
            config = tiny_config(kind, **own | OWN.get(name, {}))
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                size = cls(config).num_parameters()
            if size > 3e6:
                raise ValueError(f"{size / 1e6:.0f} million parameters")
            model = cls(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
            with torch.no_grad():
                ids = torch.randint(3, WORDS, (2, 9))
                logits = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            if not logits.isfinite().all():
                raise ValueError("its logits are not finite")
            return model
        except Exception as error:
            problem = problem or error
    raise problem
