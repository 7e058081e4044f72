"""The smallest config of every class of causal language models that transformers knows, made by the names of a config's fields.

A config is shrunk, not written: its class's default one is made, every field whose name says what it counts gets a small
number, lists with an entry per layer keep each of their kinds once, and the configs within it are shrunk likewise. What the
default leaves open (None) or switches off (0) stays so. `OWN` has what a class needs beside that.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

Data = dict[str, Any]

_NAMES: dict[int, str] = {
    256: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    96: "ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size",
    88: "intermediate_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
    "original_max_position_embeddings max_source_positions",
    48: "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim lru_width embedding_size"
    "input_embedding_size output_embedding_size",
    40: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    24: "q_lora_rank mamba_d_head mamba_headdim qk_head_dim",
    16: "head_dim dim_head d_head kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim sliding_window sliding_window_size "
    "window_size attention_window_size swa_head_dim linear_head_dim mamba_chunk_size chunk_size hidden_size_per_layer_input "
    "global_head_dim index_topk attention_chunk_size local_attention",
    8: "qk_rope_head_dim rotary_dim linear_key_head_dim linear_value_head_dim state_size mamba_d_state ssm_state_size "
    "adapter_rank laurel_rank time_step_rank mamba_dt_rank o_lora_rank gated_norm_rank d_rel",
    6: "num_experts n_routed_experts num_local_experts moe_num_experts",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "swa_num_attention_heads mamba_n_heads n_mamba_heads mamba_num_heads linear_num_heads linear_num_value_heads "
    "index_n_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token top_k_experts num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
    "n_group num_expert_group num_blocks depth num_decoder_layers num_encoder_layers num_kv_shared_layers",
    1: "topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups first_k_dense_replace "
    "num_dense_layers mamba_n_groups mamba_ngroups num_mem_blocks",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""Fields that count the blocks; lists of as many entries say of what kind each is."""

_QWEN4: Data = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 48,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 2,
    "split_ngram_parts": 1,
}
_DOTS3: Data = {
    "num_key_value_heads": 4,
    "num_attention_heads": 4,
    "layer_types": ["indexed_attention", "sliding_attention"],
    "num_hidden_layers": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_ADAPTER: Data = {"adapter_in_dim": 48, "adapter_out_dim": 48}
NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")
"""Fields that some classes cannot do without although their default is None."""
OWN: dict[str, Data] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "decoder_config": {"hidden_size_global": 48},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "dots1": {"moe_intermediate_size": 40, "n_routed_experts": 6},
    "dots3_note": {
        "text_config": {**_DOTS3},
        "vision_config": _ADAPTER,
        "audio_config": {**_ADAPTER, "adapter_input_size": 48},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 96},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": {"moe_layers": [0, 1]}},
    "llama4_text": {"moe_layers": [0, 1]},
    "longcat_flash": {"zero_expert_num": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 6, "head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 32],
        "attention_head_size": 12,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 256,
        "shape_vocab_size": 256,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "stablelm": {"num_attention_heads": 2, "head_dim": None},
    "xlnet": {"d_head": 12},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "mamba_headdim": 24,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 24},
}
"""What the config of a model type needs beside the small sizes."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest config of a model type.

    Raises:
        Exception: any, where transformers makes no config of it.
    """
    return _shrunk(CONFIG_MAPPING[model_type], OWN.get(model_type, {}))


def _shrunk(kind: type[PreTrainedConfig], own: Data) -> PreTrainedConfig:
    """The smallest config of a class; fields in `own` are taken as they are given, those of inner configs as dicts."""
    default = kind()
    fields = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    small: Data = {key: SIZES[key] for key, value in fields.items() if key in SIZES and (value or key in NEEDED)}
    heads = fields.get("num_attention_heads")
    if "head_dim" in small and heads and fields.get("head_dim") == fields["hidden_size"] // heads:
        small["head_dim"] = small["hidden_size"] // small["num_attention_heads"]
    if "kv_lora_rank" in small:
        small |= {"head_dim": small["qk_rope_head_dim"], "num_key_value_heads": small["num_attention_heads"]}
    small |= _lists(fields, own)
    small |= _tokens(fields)
    for key, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            small[key] = _shrunk(type(value), own.get(key, {})).to_dict()
    given = {key: value for key, value in own.items() if not isinstance(fields.get(key), PreTrainedConfig)}
    return kind(**small | given)


def _lists(fields: Data, own: Data) -> Data:
    """The lists with an entry per layer, as short as they can be, and the number of layers."""
    counting = next((key for key in LAYERS if isinstance(fields.get(key), int)), None)
    if counting is None:
        return {}
    lists = {
        k: v
        for k, v in fields.items()
        if isinstance(v, list) and len(v) == fields[counting] and len(v) > 1 and isinstance(v[0], str)
    }
    kinds = {key: list(dict.fromkeys(value)) for key, value in lists.items() if key not in own}
    count = own.get(counting, max([2, *map(len, kinds.values())]))
    return {counting: count} | {key: (each * count)[:count] for key, each in kinds.items()}


def _tokens(fields: Data) -> Data:
    """Special tokens within the small vocabulary: those of the text are 0, others the last ones."""
    found: Data = {}
    for key in fields:
        if key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found[key] = 0
        elif key.endswith(("_token_id", "_token_index")) and isinstance(fields[key], int) and fields[key] > 255:
            found[key] = 255 - len(found)
    return found
