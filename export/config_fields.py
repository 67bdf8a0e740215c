"""What of a checkpoint's ``config.json``, or of a GGUF file's keys, is done as it says, and what is refused because it is not.

A field that is neither known nor at its default may change the answers, so it is never passed over.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from export.config import UserError


class CheckpointError(UserError):
    """A checkpoint is missing, broken, or does not fit; the message says which and what to do."""


# What transformers' modelling code of Llama and Qwen3, and so the graphs, follow.
FOLLOWED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
}
# What changes no answer: names, training, memory; windows, which ``_sliding`` looks at.
WITHOUT_EFFECT = {
    *("architectures", "model_type", "auto_map", "_name_or_path", "_model_name_or_path", "name_or_path", "_commit_hash"),
    *("transformers_version", "transformers.js_config", "torch_dtype", "dtype", "is_llama_config", "pretraining_tp"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "use_cache", "id2label", "label2id", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "task_specific_params"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing"),
    *("max_window_layers", "sliding_window", "use_sliding_window", "unsloth_fixed", "unsloth_version", "model_name"),
}
NOT_BUILT = "which is not built; it could change the answers"
PASSED_OVER = "which is passed over when GGUF is read; it could change the answers, take the safetensors instead"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_FIELDS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
}
# Of a GGUF file's keys behind its architecture: what transformers reads of Llama's and Qwen3's (``GGUF_CONFIG_MAPPING``); a
# head's size, without which the tensors do not fit; and what changes no answer where there is no scaling.
GGUF_KEYS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.freq_base"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length"),
    *("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
# What those that are passed over say where they change nothing.
GGUF_DEFAULTS = {"rope.scaling.type": "none", "rope.scaling.factor": 1, "rope.scale_linear": 1, "attention.causal": True}


def check_fields(raw: Mapping[str, Any], kind: type[PreTrainedConfig], name: str, also: Iterable[str] = ()) -> None:
    """Refuse a configuration that asks for what is not built.

    Args:
        raw: the content of ``config.json``. kind: the configuration class that it is read by.
        name: whose it is, for the errors. also: fields that are followed besides.

    Raises:
        CheckpointError: naming the field, what was found and what is allowed.
    """
    defaults = kind().to_dict()
    own = {"mlp_bias"} & defaults.keys()  # Llama's
    refuse_unknown(raw, FOLLOWED | WITHOUT_EFFECT | own | set(also), defaults, f"{name}: config.json")
    _sliding(raw, name)
    for where in ("rope_scaling", "rope_parameters"):
        check_rope(raw.get(where), f"{name}: config.json {where}")
    if raw.get("rope_interleaved") or raw.get("partial_rotary_factor", 1) not in (1, None):
        raise CheckpointError(f"{name}: config.json asks for another rotary embedding, which is not built")


def refuse_unknown(
    raw: Mapping[str, Any], known: Iterable[str], defaults: Mapping[str, Any], where: str, why: str = NOT_BUILT
) -> None:
    """Refuse the first field that is not known, unless it is null, at its default, or false without one."""
    known = set(known)
    for field, value in raw.items():
        default = defaults.get(field)
        if field not in known and value is not None and value != default and (value is not False or default):
            raise CheckpointError(f"{where} {field}: found {value!r}, {why}")


def check_gguf_keys(keys: Mapping[str, Any], architecture: str) -> None:
    """Refuse a GGUF file that asks for what is passed over when it is read.

    Args:
        keys: those of its architecture, with their values.

    Raises:
        CheckpointError: naming the key and what was found.
        KeyError: the file lacks its sizes.
    """
    prefix = f"{architecture}."
    head = keys.get(prefix + "attention.key_length")
    if head is None:
        head = keys[prefix + "embedding_length"] // keys[prefix + "attention.head_count"]
    defaults = {prefix + key: value for key, value in (GGUF_DEFAULTS | {"rope.dimension_count": head}).items()}
    refuse_unknown(keys, {prefix + key for key in GGUF_KEYS}, defaults, "key", PASSED_OVER)


def check_rope(rope: Any, where: str) -> None:
    """Refuse rotary embeddings that are not built: of a kind that depends on the length, or one a kind of layer."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: found {rope!r}, allowed: an object with rope_type")
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{where}: found one for each of {', '.join(rope)}, allowed: one for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{where}: found rope_type {kind}, allowed: {', '.join(ROPE_TYPES)}")
    refuse_unknown(rope, ROPE_FIELDS, {"partial_rotary_factor": 1.0}, where)


def _sliding(raw: Mapping[str, Any], name: str) -> None:
    """Windows are not built. Without layer_types, transformers gives them to the layers from max_window_layers on."""
    layers = raw.get("num_hidden_layers", 0)
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or set(kinds) - {"full_attention"}:
            raise CheckpointError(f"{name}: config.json layer_types: found {kinds}, allowed: full_attention alone")
    elif raw.get("use_sliding_window") and raw.get("sliding_window") and raw.get("max_window_layers", 28) < layers:
        raise CheckpointError(
            f"{name}: config.json use_sliding_window: found true for the layers from max_window_layers on, allowed: false; "
            "sliding windows are not built"
        )


def token_ids(value: Any, vocabulary: int, where: str) -> list[int]:
    """The token ids that a field names: none, one or a list.

    Raises:
        CheckpointError: it is anything else than ids of the vocabulary.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocabulary for token in ids):
        raise CheckpointError(f"{where}: found {value!r}, allowed: a token id from 0 to {vocabulary - 1}, or a list of them")
    return ids


TARGETS: dict[str, type[PreTrainedConfig]] = {"LlamaForCausalLM": LlamaConfig, "Qwen3ForCausalLM": Qwen3Config}
