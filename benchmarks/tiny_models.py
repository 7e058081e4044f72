"""Tiny random models of the classes of transformers: the families that tests and benchmarks name, and one of every class.

`FAMILIES` are written by hand, with the switches of a family that matter here. `tiny_config` makes the smallest config of a
model type: the class's default one is shrunk by the names of its fields. Every field that counts something gets a small number,
lists with an entry per layer keep each of their kinds once, and the configs within it are shrunk likewise. What the default
leaves open (None) or switches off (0) stays so. `OWN` has what a class needs besides.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Data = dict[str, Any]
Made = tuple[str, Data]
"""A class of transformers, less "ForCausalLM", and its config."""

# The families that have a name

VOCABULARY = 256
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 88,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = {**LLAMA_LIKE, **ENDS}
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **ENDS}
HEADS = {**LLAMA, "head_dim": 16}
GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS}
OPT = {**WIDE, "ffn_dim": 96, "max_position_embeddings": 64, "dropout": 0.0}
NEO = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, **ENDS}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4, **ENDS}
MPT = {"vocab_size": VOCABULARY, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_heads": 12, "head_dim": 8, **ENDS}
WINDOW = {"sliding_window": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 3, "num_experts_per_tok": 2}
INNER = {"moe_intermediate_size": 40}
SHARED = {**FEW, **INNER, "shared_expert_intermediate_size": 40}
ROUTED = {**INNER, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

TINY: Made = ("Llama", {**LLAMA, "hidden_size": 64, "attention_bias": True, "mlp_bias": True})
"""Inputs of 64 and 88: groups of 32 divide the one, groups of 128 neither."""

FAMILIES: dict[str, Made] = {
    "llama": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {**LLAMA, **WINDOW}),
    "qwen2-mixed-attention": (
        "Qwen2",
        {
            **LLAMA,
            **WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", HEADS),
    "opt": ("OPT", {**OPT, "word_embed_proj_dim": 48}),
    "opt-projected": ("OPT", {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", {**HEADS, **WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {**HEADS, **WINDOW, **MIXED, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", LLAMA),
    "gpt-neox": ("GPTNeoX", {**WIDE, "intermediate_size": 96, "max_position_embeddings": 64, "rotary_pct": 0.5}),
    "falcon": ("Falcon", {**WIDE, "new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": (
        "Falcon",
        {
            **WIDE,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "falcon-new": ("Falcon", {**WIDE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": (
        "StableLm",
        {**LLAMA, "use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    ),
    "mixtral": ("Mixtral", {**LLAMA, **LOCAL}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**HEADS, **INNER, **FEW, "num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "gpt-oss": ("GptOss", {**HEADS, **LOCAL, **WINDOW, **MIXED, "num_local_experts": 4}),
    "bloom": ("Bloom", BLOOM),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 8}),
    "cohere": ("Cohere", LLAMA),
    "cohere2": ("Cohere2", {**LLAMA, **WINDOW}),
    "deepseek-v2": (
        "DeepseekV2",
        {**LLAMA, **LATENT, **ROUTED, "q_lora_rank": None, "n_group": None, "topk_method": "greedy"},
    ),
    "deepseek-v3": ("DeepseekV3", {**LLAMA, **LATENT, **ROUTED, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}),
    "exaone4": ("Exaone4", {**LLAMA, **WINDOW, "sliding_window_pattern": 2}),
    "glm4": ("Glm4", HEADS),
    "glm4-moe": ("Glm4Moe", {**HEADS, **ROUTED, "n_group": 1, "topk_group": 1}),
    "gpt-bigcode": ("GPTBigCode", GPT),
    "gpt-j": ("GPTJ", {**GPT, "rotary_dim": 8}),
    "gpt-neo": ("GPTNeo", {**NEO, "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "granite": (
        "Granite",
        {**LLAMA, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "granite-moe": ("GraniteMoe", {**LLAMA, **LOCAL}),
    "lfm2": ("Lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    "mamba2": ("Mamba2", {**MAMBA, "state_size": 8, "n_groups": 1}),
    "mpt": ("Mpt", MPT),
    "nemotron": ("Nemotron", LLAMA),
    "olmo2": ("Olmo2", LLAMA),
    "olmo3": ("Olmo3", {**LLAMA, **WINDOW}),
    "olmoe": ("Olmoe", {**LLAMA, **FEW}),
    "phi": ("Phi", LLAMA),
    "phi-moe": ("Phimoe", {**LLAMA, **LOCAL}),
    "qwen2-moe": ("Qwen2Moe", {**LLAMA, **SHARED}),
    "qwen3-next": ("Qwen3Next", {**HEADS, **SHARED, **LINEAR}),
    "smollm3": ("SmolLM3", LLAMA),
    "starcoder2": ("Starcoder2", {**LLAMA, **WINDOW}),
    "gpt2": ("GPT2", GPT),
}
"""By name the class and the config."""

# The smallest model of every class

_NAMES: dict[int, str] = {
    256: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    96: "ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size",
    88: "intermediate_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
    "original_max_position_embeddings max_source_positions",
    48: "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim lru_width embedding_size "
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
_GEMMA4 = ["sliding_attention", "full_attention", "full_attention"]
_DRAFT = "a draft model, which reads keys and values of the model that it writes drafts for; it does not run by itself"
_DECODER = "transformers makes none of this config: the class takes the config of the decoder within it"
OWN: dict[str, Data] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "decoder_config": {"hidden_size_global": 48},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "dots1": {"moe_intermediate_size": 40, "n_routed_experts": 6, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": {**_DOTS3},
        "vision_config": _ADAPTER,
        "audio_config": {**_ADAPTER, "adapter_input_size": 48},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 251, "<|visual token 000000|>": 252}},
    "falcon_h1": {"mamba_d_ssm": 96},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": {"moe_layers": [0, 1]}},
    "llama4_text": {"moe_layers": [0, 1]},
    "longcat_flash": {"zero_expert_num": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 6, "head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
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
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
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


VARIANTS: dict[tuple[str, str], Data] = {
    ("bert", "as an encoder"): {"is_decoder": False},
    ("doge", "with experts"): {"is_moe": True, "num_experts": 16},
    ("gemma4_text", "with experts"): {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 40,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
    ("gemma4_text", "with shared keys"): {"num_kv_shared_layers": 1, "num_hidden_layers": 3, "layer_types": _GEMMA4},
    ("gemma4_text", "without inputs of layers"): {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
}
"""Switches by which a model type becomes another model: by type and name what of the config is not the default."""

NOT_MADE = {
    "gemma3n": "its vision part needs the packages timm and pillow; gemma3n_text is the same language model",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _DECODER,
    "musicgen_melody": _DECODER,
}
"""Model types of which no tiny model is made, and why."""


def tiny_config(model_type: str, variant: str = "") -> PreTrainedConfig:
    """The smallest config of a model type, or of a variant of it."""
    own = {**OWN.get(model_type, {}), **(VARIANTS[model_type, variant] if variant else {})}
    return _shrunk(CONFIG_MAPPING[model_type], own)


def tiny_model(model_type: str, variant: str = "") -> PreTrainedModel:
    """A random model in float32 of a model type: all of it, where AutoModelForCausalLM opens only the part for text."""
    config = tiny_config(model_type, variant)
    torch.manual_seed(0)
    of_text = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class is not type(config)
    whole = of_text and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return randomized(
        (transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM).from_config(config)
    )


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
    if fields.get("is_decoder") is False:
        small["is_decoder"] = True
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


# Their values, tokenizer and text


def model_of(made: Made) -> PreTrainedModel:
    """A model as its class initializes it."""
    kind, config = made
    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, head)(getattr(transformers, name)(**config))


def random_model(made: Made) -> PreTrainedModel:
    """A random model in float32 whose logits are far from constant."""
    torch.manual_seed(0)
    return randomized(model_of(made))


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """The model for inference, with random values by which its logits are far from constant."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Zeros: norms that multiply by one more than their weight.
            if name.endswith("bias") or (parameter.ndim == 1 and not parameter.any()):
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; the byte 0 doubles as the beginning of a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[0])


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A model folder as a user has it."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def made_text(path: Path) -> None:
    """About 6000 bytes of made-up text."""
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "river", "stone", "tree"]
    drawn = torch.randint(len(words), (1200,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(words[i] for i in drawn), encoding="utf-8")
