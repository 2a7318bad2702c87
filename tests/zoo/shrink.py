"""A config of transformers made tiny: every number that is a size becomes a small one, and every threshold a short one.

Sizes go by their field's name, of which there are few kinds; what must agree among them is in the table's values. Lists
that say a thing of each layer keep one layer of each kind. Imports transformers. Must not know weights or servers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

ROWS = 320  # tokens of the vocabulary
RESERVED = 5  # the token that stands for pictures, sounds and the like
THRESHOLD = 16  # tokens after which windows, chunks and changed positions begin
POSITIONS = 512

_NAMES: Mapping[int, str] = {
    32: "hidden_size d_model n_embd dim d_latents embedding_size emb_dim input_embedding_size embed_dim "
    "attention_hidden_size word_embed_proj_dim pooler_hidden_size encoder_hidden_size hidden_size_global "
    "prediction_head_size lru_width pronunciation_embed_dim shape_embed_dim entity_emb_size ple_embed_dim "
    "output_embedding_size d_text out_hidden_size projector_input_dim projector_output_dim adapter_out_dim "
    "output_dim vision_output_dim backbone_hidden_size router_hidden_size kv_lora_rank q_lora_rank o_lora_rank "
    "embedding_dim true_hidden_size intra_bottleneck_size fc_size embedding_rank adapter_in_dim "
    "adapter_input_size cross_attention_hidden_size",
    64: "intermediate_size moe_intermediate_size ffn_dim d_ff d_inner dff dim_ff hidden_dim encoder_ffn_dim "
    "decoder_ffn_dim ffn_hidden_size feed_forward_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size mlp_dim speech_encoder_intermediate_size t2u_encoder_ffn_dim "
    "t2u_decoder_ffn_dim prompt_mid_dim mamba_d_ssm",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_self_attention_heads "
    "num_cross_attention_heads index_n_heads linear_num_heads conf_num_attention_heads num_query_groups "
    "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads mamba_num_heads "
    "linear_num_value_heads time_step_rank mamba_dt_rank n_mamba_heads patch_size hc_mult",
    8: "relative_attention_num_buckets num_buckets position_bias_num_buckets rotary_dim head_dim dim_head d_kv "
    "d_head kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim attention_head_size num_experts num_local_experts n_routed_experts "
    "moe_num_experts state_size ssm_state_size mamba_d_state mamba_n_heads mamba_d_head "
    "hidden_size_per_layer_input laurel_rank adapter_rank gated_norm_rank d_rel chunk_size mamba_chunk_size "
    "hc_lowrank",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k depth n_group num_expert_group l_layers "
    "x_layers r_layers conf_num_hidden_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers "
    "num_self_attends_per_block num_layers_per_stack num_global_layers",
    1: "topk_group first_k_dense_replace num_dense_layers",
    THRESHOLD: "sliding_window window_size sliding_window_size attention_window_size local_attention "
    "attention_chunk_size keep_window_size index_topk index_head_dim local_attention_window_len block_size "
    "local_radius floor_scale log_scaling_n_floor rel_extent local_attn_chunk_length lsh_attn_chunk_length "
    "attention_window local_transformer_stride index_block_size mem_len segment_means_seq_len "
    "relative_attention_max_distance position_bias_max_distance relative_max_distance num_landmarks",
    # A picture is of some patches.
    24: "image_size",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions "
    "context_length max_encoder_position_embeddings max_decoder_position_embeddings tpu_short_seq_length "
    "model_max_length t2u_max_position_embeddings",
    ROWS: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size "
    "entity_vocab_size pronunciation_vocab_size shape_vocab_size t2u_vocab_size char_vocab_size "
    "unit_hifi_gan_vocab_size num_hash_buckets encoder_hash_byte_group_vocab unpadded_vocab_size",
}
SIZES: Mapping[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3, "mask_token_id": 4}
_IDS |= {"cls_token_id": 1, "sep_token_id": 2, "decoder_start_token_id": 1, "unk_index": 3, "mask_index": 4}
_NONE = ("forced_eos_token_id", "forced_bos_token_id", "begin_suppress_tokens", "suppress_tokens")


def shrunk(default: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """The tiny form of a config; `changes` are further fields, those of a config within by a dictionary."""
    changes = dict(changes or {})
    values: dict[str, Any] = {}
    within = {name: getattr(default, name, None) for name in type(default).sub_configs}
    for field in dataclasses.fields(default):
        if field.name in within:
            continue
        value = _own(default, field.name)
        if (small := _small(field.name, value)) is not None:
            values[field.name] = small
        elif field.name in _NONE and value is not None:
            values[field.name] = None
    values |= _heads(default, values)
    for name, inner in within.items():
        given = changes.pop(name, None)
        if hasattr(inner, "to_dict"):
            values[name] = shrunk(inner, given if isinstance(given, dict) else None)
        if given is not None and not isinstance(given, dict):
            values[name] = given
    if (rope := getattr(default, "rope_parameters", None)) and "rope_parameters" not in changes:
        values["rope_parameters"] = _rope(copy.deepcopy(rope))
    values |= _layers(default, values, changes)
    values |= changes
    return type(default)(**{name: value for name, value in values.items() if value is not ...})


def _own(config: Any, name: str) -> Any:
    """A field's value, also where layers have values of their own."""
    return vars(config).get(name) if name in vars(config) else getattr(type(config), name, None)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return None
    if name in _IDS and isinstance(value, int | list):
        return _IDS[name]
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return RESERVED
    if name in SIZES and isinstance(value, int | float) and value > 0:
        return min(SIZES[name], value) if name not in ("vocab_size",) else SIZES[name]
    if name in ("initializer_range", "init_std"):
        return 0.3
    return None


def _heads(default: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """As many keys as queries, or fewer, or one: as the family has it."""
    made = {}
    for queries, keys in (("num_attention_heads", "num_key_value_heads"), ("num_attention_heads", "num_kv_heads")):
        had, own = _own(default, queries), _own(default, keys)
        if keys in values and isinstance(had, int) and isinstance(own, int):
            made[keys] = values[queries] if had == own else min(2, own)
    return made


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The same kind of positions, changed past the threshold."""
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if each.get("original_max_position_embeddings"):
            each["original_max_position_embeddings"] = THRESHOLD
    return rope


def _layers(default: Any, values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind, where lists tell of each layer what it is."""
    count = _own(default, "num_hidden_layers")
    if not isinstance(count, int) or "num_hidden_layers" in changes:
        return {}
    names = {field.name for field in dataclasses.fields(default)}
    told = {
        name: list(value)
        for name in sorted(names)
        if isinstance(value := _own(default, name), list | tuple) and len(value) == count and name not in changes
    }
    if not told:
        return {}
    seen: dict[str, int] = {}
    for at in range(count):
        seen.setdefault(str([value[at] for value in told.values()]), at)
    chosen = sorted(seen.values())[:4]
    chosen += [at for at in range(count) if at not in chosen][: max(0, 2 - len(chosen))]
    chosen.sort()
    layers = {name: [value[at] for at in chosen] for name, value in told.items()}
    return {**layers, "num_hidden_layers": len(chosen)}
