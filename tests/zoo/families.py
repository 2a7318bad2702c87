"""The tables of transformers, and what single families need besides the common way of making them tiny."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import shrink
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

TABLES: Mapping[str, Mapping[str, Any]] = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "qa": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
MODEL_TYPES: Mapping[str, str] = {
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
    "masked": "fill-mask",
    "sequence": "text-classification",
    "token": "token-classification",
    "qa": "question-answering",
}
LABELS = ("bad", "fair", "good")

# Checkpoints of these hold the model that reads pictures too; the table names its text part.
_WHOLE = {
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "emu3": "Emu3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}

_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXED = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
_INDEXED |= {"indexer_compress_ratio": 4, "num_experts_per_tok": 2}

_SLIDING = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None, "num_hidden_layers": 2}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
_LONGROPE |= {"original_max_position_embeddings": shrink.THRESHOLD}
_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16}
_SWA |= {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16}
_SOUND = {"num_filters": 2, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"full_attention": _DEFAULT, "sliding_attention": _DEFAULT},
    },
    "blt": {"num_hidden_layers": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1},
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "max_window_layers": 1,
        "layer_types": None,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [32, 16],
        "axial_pos_embds_dim": [8, 24],
        "num_buckets": 4,
        "hash_seed": 0,  # without one, it draws anew each time
    },
    "xmod": {"default_language": "en_XX"},
    "phi3": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": shrink.THRESHOLD},
    "qwen2": _SLIDING,
    "qwen2_moe": _SLIDING,
    "qwen3": _SLIDING,
    "qwen3_moe": _SLIDING,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "dots3_note_text": _SWA,
    "dots3_note": {"text_config": _SWA},
    "emu3": {"vocabulary_map": {"<image>": 5}, "vq_config": {"base_channels": 32, "codebook_size": 32}},
    "esm": {"vocab_size": shrink.ROWS, "pad_token_id": 0, "mask_token_id": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemo_speechlm": {
        "text_config": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
    },
    "neomme": {"head_dim": 16},
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 8, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32},
        "vision_config": {"crop_size": 24},
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _SOUND,
        "semantic_tokenizer_encoder_config": _SOUND,
        "acoustic_tokenizer_chunk_size": 16,
    },
    "zamba": {
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
}

_UNBUILDABLE: Mapping[tuple[str, str], str] = {
    ("causal", "gemma4_assistant"): "drafts for another model, whose states it reads: it writes no text by itself",
    (
        "causal",
        "gemma4_unified_assistant",
    ): "drafts for another model, whose states it reads: it writes no text by itself",
    ("causal", "musicgen"): "AutoModelForCausalLM does not take its config; it makes sound",
    ("causal", "musicgen_melody"): "AutoModelForCausalLM does not take its config; it makes sound",
    ("seq2seq", "voxtral_realtime"): "reads sound, without which it writes nothing",
    ("token", "bros"): "reads where words stand on a page, which must come with the text",
    ("qa", "lxmert"): "answers about pictures, whose features must come with the text",
}


def unbuildable(table: str, family: str) -> str | None:
    """Why there is no model of a family that reads or writes text alone; None where there is."""
    return _UNBUILDABLE.get((table, family))


def config(table: str, family: str) -> Any:
    """The tiny config of a family, as it would lie in a checkpoint of this table's class."""
    if family == "encoder-decoder":
        parts = [shrink.shrunk(CONFIG_MAPPING["bert"](), {"pad_token_id": 0}) for _ in range(2)]
        made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        made.decoder_start_token_id, made.pad_token_id, made.eos_token_id = 1, 0, 2
        return made
    default = CONFIG_MAPPING[family]()
    changes = dict(CHANGES.get(family, {}))
    if table == "causal":
        if getattr(default, "is_decoder", None) is False and not default.is_encoder_decoder:
            changes["is_decoder"] = True
    elif table != "seq2seq":
        changes["pad_token_id"] = 0
    if default.is_encoder_decoder and not getattr(default, "decoder_start_token_id", None):
        changes["decoder_start_token_id"] = 1
    if table in ("sequence", "token"):
        changes["id2label"] = dict(enumerate(LABELS))
        changes["label2id"] = {name: number for number, name in enumerate(LABELS)}
    return shrink.shrunk(default, changes)


def model_class(table: str, family: str, config: Any) -> Any:
    """The class that a checkpoint of the family has."""
    if table == "causal" and family in _WHOLE:
        return getattr(transformers, _WHOLE[family])
    names = TABLES[table][family]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def longest(config: Any) -> int:
    """The most tokens that a text may have."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((each for each in found if isinstance(each, int) and each > 0), default=shrink.POSITIONS)


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward pass has an input of this name."""
    return name in inspect.signature(model.forward).parameters


# Why a family is not equal in everything.
_PLACED = "refused by name: it reads text with the places that it has on a page"
NOTES: Mapping[tuple[str, str], str] = {
    ("causal", "emu3"): "AutoModelForCausalLM itself finds no weights of the text part in such a checkpoint",
    ("causal", "reformer"): "its own code seeds the draws again at each step, to hash",
    ("sequence", "mobilebert"): "its hidden values run to thousands: torch's own rounding of that text is 0.0001",
    **{(table, name): _PLACED for table in TABLES for name in ("layoutlm", "layoutlmv3", "lilt")},
}
