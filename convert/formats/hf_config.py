"""Hugging Face's config.json and ours, both ways.

Importing reads every number that a model's outputs depend on and defaults none of them. Options that this program does
not have are refused by name rather than ignored. Exporting writes a file that transformers 4 and 5 both load. `table`
has the weights; `opening` reads the file.
"""

import reprlib
from typing import Any

from gemma2_jax.model_config import ModelConfig

FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "vocab_size": "vocab_size",
    "window": "sliding_window",
    "max_length": "max_position_embeddings",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "norm_eps": "rms_norm_eps",
}
# The value that our model has, and others with the same meaning. A key that older files lack means the first value.
_FIXED = {
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "tie_word_embeddings": (True, False),  # a head that is not the embedding is refused where it is read
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}
_FLOATS = ("attn_softcap", "final_softcap", "norm_eps")
_TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def model_config(hf: dict[str, Any], source: object = "config.json") -> ModelConfig:
    """The model that a config.json describes.

    Raises ValueError naming a key that is missing, or one whose value this program does not implement.
    """
    if hf.get("model_type") != "gemma2":
        raise ValueError(
            f"{source}: model_type is {reprlib.repr(hf.get('model_type'))}; this program has 'gemma2' only"
        )
    activation = "hidden_activation" if "hidden_activation" in hf else "hidden_act"
    _check(source, activation, require_field(hf, activation, source), ("gelu_pytorch_tanh",))
    for key, accepted in _FIXED.items():
        _check(source, key, hf.get(key, accepted[0]), accepted)
    values = {field: require_field(hf, key, source) for field, key in FIELDS.items()}
    for field, value in values.items():
        if not isinstance(value, int | float) and not (value is None and field.endswith("_softcap")):
            raise ValueError(f"{source}: {FIELDS[field]} is {reprlib.repr(value)}; it must be a number")
    values["rope_theta"] = _rope_theta(hf, source)
    try:
        config = ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    _check(source, "layer_types", hf.get("layer_types") or _layer_types(config), (_layer_types(config),))
    return config


def hf_config(config: ModelConfig, dtype: str, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model stored as `dtype`, with those keys of `original` that do not describe the model."""
    scalar = config.query_pre_attn_scalar
    described = {key: getattr(config, field) for field, key in FIELDS.items()} | {
        # transformers 5 wants a float, and Megatron's files may have 30 for 30.0.
        **{FIELDS[field]: float(value) for field in _FLOATS if (value := getattr(config, field)) is not None},
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # transformers 5 wants an int
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "layer_types": _layer_types(config),
        "rope_theta": float(config.rope_theta),  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},  # transformers 5
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }
    return _TOKENS | {"initializer_range": 0.02, "use_cache": True} | (original or {}) | described


def require_field(hf: dict[str, Any], key: str, source: object) -> Any:
    """A key's value. Raises ValueError naming it when it is missing."""
    if key not in hf:
        raise ValueError(f"{source} lacks {key}; add the model's own value, it is never guessed")
    return hf[key]


def _layer_types(config: ModelConfig) -> list[str]:
    return [("sliding_attention", "full_attention")[layer % 2] for layer in range(config.layers)]


def _rope_theta(hf: dict[str, Any], source: object) -> float:
    theta = hf.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
            raise ValueError(
                f"{source}: {key} is {reprlib.repr(rope)}; Gemma 2's RoPE is the default type, without scaling"
            )
        theta = rope.get("rope_theta", theta)
    if theta is None:
        raise ValueError(f"{source} has neither rope_theta nor rope_parameters.rope_theta; add the model's own value")
    return theta


def _check(source: object, key: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{source}: {key} is {reprlib.repr(value)}; this program has {accepted[0]!r} only")
