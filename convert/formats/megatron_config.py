"""Megatron-Bridge's run_config.yaml and our config, both ways, and the other small files of its checkpoints.

Importing reads every number that a model's outputs depend on and defaults none of them. Options that this program does
not have are refused by name. `_target_` nodes name classes: they are compared, never resolved. Exporting writes those
keys that the loaders of Megatron-Bridge 0.3 to 0.6 read, unless their default is Gemma 2's value. The tensors are not
read here, nor are files other than YAML.

When Megatron-Bridge runs a model, up to 0.6 at least, its post-norms have epsilon 1e-5, as it drops the config's value
there. Hugging Face and this program run the model with the config's value.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from gemma2_jax.convert.files import memory
from gemma2_jax.convert.formats import table
from gemma2_jax.model_config import AdapterConfig, DType, ModelConfig

# Limits of a run_config.yaml. Real files have 15 kB and 1,000 nodes, or 100 kB and 3,000 nodes with 27B's adapters.
_MOST_BYTES = 1 << 20
_MOST_NODES = 20_000  # counting the nodes that aliases stand for
_MOST_DEPTH = 64
_MOST_LETTERS = 1000  # of a value that is no text: YAML reads numbers of base 60 in time quadratic in their digits
_TEXT = "tag:yaml.org,2002:str"
_BRIDGE_WINDOW = 4096
_FIELDS = {
    "layers": "num_layers",
    "width": "hidden_size",
    "mlp_width": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_query_groups",
    "head_width": "kv_channels",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "vocab_size": "vocab_size",  # the embedding may have more rows: see should_pad_vocab
    "max_length": "seq_length",  # the Hugging Face model's at import, the run's own once trained
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "rope_theta": "rotary_base",
    "norm_eps": "layernorm_epsilon",
}
# The value that our model has, and others with the same meaning. A key that is absent means the first value too, which
# is the default of Megatron-Bridge's class.
_FIXED: dict[str, tuple] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": (True,),
    "activation_func": ("megatron.core.activations.fast_gelu", "fast_gelu", "gelu_pytorch_tanh"),
    "gated_linear_unit": (True,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "share_embeddings_and_output_weights": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_scaling_factor": (None, 1.0),
    "rope_scaling": (False,),
    "seq_len_interpolation_factor": (None, 1.0),
    "mrope_section": (None,),
    "no_rope_freq": (None,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "apply_query_key_layer_scaling": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "window_attn_skip_freq": (None,),
    "num_moe_experts": (None,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "is_hybrid_model": (False,),
    "heterogeneous_block_specs": (False,),
    "restore_modelopt_state": (False,),
    "transformer_layer_spec": ("megatron.bridge.models.gemma.gemma2_provider.gemma2_layer_spec",),
}
_PROVIDER = "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"
_PROVIDERS = tuple(_PROVIDER + size for size in ("", "2B", "9B", "27B"))
_CONFIG = "megatron.bridge.training.config"
_PEFT = {
    "megatron.bridge.peft.lora.LoRA": "lora",
    "megatron.bridge.peft.canonical_lora.CanonicalLoRA": "lora",
    "megatron.bridge.peft.dora.DoRA": "dora",
}
# Keys of an adapter that are read below, and keys that change nothing once it is trained, or nothing without experts.
_PEFT_READ = {"_target_", "dim", "alpha", "dropout", "dropout_position"}
_PEFT_INERT = {
    *("target_modules", "exclude_modules", "canonical_mapping", "params_to_save", "lora_A_init_method"),
    *("lora_B_init_method", "lora_dtype", "a2a_experimental", "sequence_parallel_input_regather"),
    *("normalize_moe_lora", "share_expert_adapters", "experts_shared_outer_loras"),
}
# Megatron's modules, and for each projection the module's name in a canonical LoRA. Other adapters have one A for all
# projections of a module.
_MODULES = {
    "linear_qkv": {"attn/q": "linear_q", "attn/k": "linear_k", "attn/v": "linear_v"},
    "linear_proj": {"attn/o": "linear_proj"},
    "linear_fc1": {"mlp/gate": "linear_fc1_gate", "mlp/up": "linear_fc1_up"},
    "linear_fc2": {"mlp/down": "linear_fc2"},
}
_AFTER_NORM = ("attn/o", "mlp/down")  # Megatron-Bridge adds the adapters of these after the post-norm
# Megatron-LM's arguments that have other names than the keys above, and the fields that it has arguments for.
_ARGS_NAMES = {"num_moe_experts": "num_experts", "rope_scaling": "use_rope_scaling"}
_ARGS_FIELDS = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_width", "rope_theta", "norm_eps")
_ARGS_FIXED = (
    *("normalization", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias", "position_embedding_type"),
    *("rotary_percent", "rotary_interleaved", "rope_scaling", "softmax_type", "apply_query_key_layer_scaling"),
    *("apply_residual_connection_post_layernorm", "attention_output_gate", "qk_layernorm", "qk_l2_norm"),
    *("num_moe_experts", "multi_latent_attention", "mtp_num_layers"),
)


class _Loader(yaml.SafeLoader):
    """Refuses files that take far longer to read than their size suggests.

    Such files have aliases of aliases, an alias of a node within itself, deep nesting, or long values.
    """

    def __init__(self, stream) -> None:
        super().__init__(stream)
        self.nodes, self.depth, self.sizes = 0, 0, {}

    def compose_node(self, parent, index):
        before, alias = self.nodes, self.check_event(yaml.AliasEvent)
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > _MOST_NODES or self.depth > _MOST_DEPTH:
            raise ValueError(f"it has more than {_MOST_NODES} values, or {_MOST_DEPTH} within one another")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > _MOST_LETTERS and node.tag != _TEXT:
            raise ValueError(f"it has a {node.tag.rsplit(':', 1)[-1]} of more than {_MOST_LETTERS} letters")
        if not alias:
            self.sizes[node] = self.nodes - before
        elif node in self.sizes:
            self.nodes += self.sizes[node]
        else:
            raise ValueError("it has an alias of what the alias is in")
        self.depth -= 1
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """A run_config.yaml as plain values. Tags other than YAML's own are refused, and nothing is instantiated."""
    try:
        tree = yaml.load(memory.read_bounded(path, _MOST_BYTES).decode(), _Loader)
    except Exception as error:  # PyYAML's constructors raise whatever a malformed value leads them to
        problem = str(error) or type(error).__name__
        raise ValueError(f"{path} is no run_config.yaml that this program reads: {problem}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no run_config.yaml: it is not a mapping")
    return tree


def to_yaml(run: dict[str, Any]) -> str:
    """The text of a run_config.yaml."""
    return yaml.safe_dump(run)


def model_config(run: dict[str, Any], source: object = "run_config.yaml") -> ModelConfig:
    """The model that a run_config.yaml describes.

    Raises ValueError naming a key that is missing, or one whose value this program does not implement.
    """
    model = _section(run, "model", source)
    _check(source, "model._target_", _plain(model.get("_target_")), _PROVIDERS)
    for key, accepted in _FIXED.items():
        _check(source, f"model.{key}", _plain(model.get(key, accepted[0])), accepted)
    # "local" replaces Gemma 2's attention by one without softcap, window or query_pre_attn_scalar.
    backend = model.get("attention_backend")
    if backend == "local" or (isinstance(backend, dict) and backend.get("_args_") == [4]):
        raise ValueError(f"{source}: model.attention_backend is local; this program has Gemma 2's own attention only")
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    values: dict[str, Any] = {}
    for field, key in _FIELDS.items():
        value = _require_field(model, key, source)
        if field.endswith("_softcap") and value in (None, 0):  # in Megatron 0 means that there is no cap
            values[field] = None
        else:
            values[field] = _number(value, f"model.{key}", source, whole=types[field] is int)
    values["window"] = _window(model, source)
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def parallel_sizes(run: dict[str, Any], source: object = "run_config.yaml") -> tuple[int, int]:
    """The tensor and pipeline parallelism that a checkpoint was saved at."""
    model = _section(run, "model", source)
    keys = "tensor_model_parallel_size", "pipeline_model_parallel_size"
    tensor, pipeline = (_number(_require_field(model, key, source), f"model.{key}", source, whole=True) for key in keys)
    if min(tensor, pipeline) < 1:
        raise ValueError(f"{source}: model.{keys[0]} {tensor} and model.{keys[1]} {pipeline} must be at least 1")
    return tensor, pipeline


def stored_dtype(run: dict[str, Any], source: object = "run_config.yaml") -> str:
    """The dtype of a checkpoint's weights, such as bfloat16."""
    name = _plain(_require_field(_section(run, "model", source), "params_dtype", source))
    return str(name).removeprefix("torch.")


def adapter_config(run: dict[str, Any], projections: list[str], source: object) -> AdapterConfig:
    """The adapter that a run_config.yaml describes, on the projections ("attn/q") that its tensors belong to.

    Raises ValueError naming a key that is missing, or one that asks for what this program does not implement.
    """
    peft = _section(run, "peft", source)
    target = _plain(peft.get("_target_"))
    _check(source, "peft._target_", target, tuple(_PEFT))
    for key, value in peft.items():
        if not (isinstance(key, str) and key.startswith("_")) and key not in _PEFT_READ | _PEFT_INERT:
            _check(source, f"peft.{key}", value, (None, False, [], {}))
    rank = _number(_require_field(peft, "dim", source, "peft"), "peft.dim", source, whole=True)
    alpha = _number(_require_field(peft, "alpha", source, "peft"), "peft.alpha", source)
    dropout = _number(peft.get("dropout", 0.0), "peft.dropout", source)
    if dropout:  # only then does its position matter
        _check(source, "peft.dropout_position", peft.get("dropout_position", "pre"), ("pre",))
    if not projections:
        raise ValueError(f"{source}: no projection has an adapter; check that adapter and config belong together")
    try:
        return AdapterConfig(
            kind="dora" if _PEFT[target] == "dora" else "lora",
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=tuple(projections),
            after_norm=any(name in projections for name in _AFTER_NORM),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def base_names(run: dict[str, Any]) -> list[str]:
    """What an adapter's run_config.yaml calls its model: the Megatron checkpoint, then the Hugging Face model."""
    sections = (("checkpoint", "pretrained_checkpoint"), ("model", "hf_model_id"))
    names = (section.get(key) for name, key in sections if isinstance(section := run.get(name), dict))
    return [name for name in names if name and isinstance(name, str)]


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as Megatron-Bridge saves it."""

    config: AdapterConfig
    pretrained: str | None = None  # the Megatron checkpoint of its model
    hf_model: str | None = None  # the Hugging Face folder or Hub id that this checkpoint is made of
    canonical: bool = False  # whether each projection has an A of its own, as in PEFT's adapters
    ranks: int = 1  # the tensor-parallel ranks whose order the rows have


def run_config(
    model: ModelConfig, dtype: DType, adapter: SavedAdapter | None = None, *, tokenizer: str | None = None
) -> dict[str, Any]:
    """The run_config.yaml of a model stored as `dtype`, or of an adapter to it.

    Args:
      tokenizer: a folder or Hub id.

    Raises ValueError where Megatron-Bridge's config cannot express the model's window or the adapter.
    """
    if model.window == _BRIDGE_WINDOW + 1:
        raise ValueError(f"model.window {model.window} cannot be told from {model.window - 1} in a run_config.yaml")
    provider = {key: _shorten(getattr(model, field)) for field, key in _FIELDS.items()}
    provider |= {
        "_target_": _PROVIDER,
        "window_size": [model.window - 1, 0],  # the tokens before and after a token, without itself
        "should_pad_vocab": False,  # the embedding has vocab_size rows at any parallelism
        # The layout of the checkpoint, which loaders reshard.
        "tensor_model_parallel_size": adapter.ranks if adapter else 1,
        "pipeline_model_parallel_size": 1,
        **({"hf_model_id": adapter.hf_model} if adapter and adapter.hf_model else {}),
        "bf16": dtype == "bfloat16",  # loaders read this, and not params_dtype
        "params_dtype": _torch_dtype(dtype),
        "pipeline_dtype": _torch_dtype(dtype),  # loading with pipeline parallelism requires it
    }
    checkpoint = {
        "_target_": f"{_CONFIG}.CheckpointConfig",
        # Loading for training reads these, and looks for no state that was not saved.
        "save_optim": False,
        "save_rng": False,
        "fully_parallel_save": True,
        "pretrained_checkpoint": adapter.pretrained if adapter else None,
    }
    # ConfigContainer cannot be made without these, empty as Megatron-Bridge leaves them when it converts a model.
    empty = dict.fromkeys(("dataset", "logger", "optimizer", "scheduler", "tokenizer", "train"))
    run = empty | {"_target_": f"{_CONFIG}.ConfigContainer", "model": provider, "checkpoint": checkpoint}
    if tokenizer is not None:
        run["tokenizer"] = {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": tokenizer,
        }
    run["peft"] = _peft_section(adapter.config, adapter.canonical) if adapter else None
    return run


def common_state(iteration: int = 0) -> dict[str, Any]:
    """The content of common.pt."""
    # These flags say that the layers are stacked and that keys of the optimizer's state have no prefix.
    flags = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return {"checkpoint_version": 3.0, "iteration": iteration, "content_metadata": flags}


def train_state(step: int = 0) -> dict[str, np.ndarray]:
    """The content of train_state.pt and of latest_train_state.pt; loaders find the iteration by the latter's step."""
    counts = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return {
        "step": np.array(step, np.int32),
        **{name: np.array(0, np.int32) for name in counts},
        "floating_point_operations_so_far": np.array(0, np.float32),
        **{name: np.array(False) for name in ("do_train", "do_valid", "do_test")},
    }


def megatron_args(model: ModelConfig, dtype: DType, iteration: int = 0) -> dict[str, Any]:
    """Megatron-LM's arguments for a model. There are none for its softcaps, its window and its activation."""
    fixed = {_ARGS_NAMES.get(key, key): _FIXED[key][0] for key in _ARGS_FIXED}
    return fixed | {
        **{_FIELDS[field]: _shorten(getattr(model, field)) for field in _ARGS_FIELDS},
        "group_query_attention": True,
        "swiglu": True,  # fc1 has gate and up; there is no argument for Gemma 2's activation
        "add_position_embedding": True,  # Megatron-LM sets it with RoPE too
        "untie_embeddings_and_output_weights": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "seq_length": model.max_length,
        "max_position_embeddings": model.max_length,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": math.gcd(model.vocab_size, 128),  # so that no rows are padded
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "bf16": dtype == "bfloat16",
        "fp16": False,
        "params_dtype": jnp.dtype(dtype),
        "iteration": iteration,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_fully_parallel_save": True,
    }


def check_args(args: Mapping[str, Any], model: ModelConfig, source: object) -> None:
    """Raises ValueError naming an argument of Megatron-LM that contradicts the model. None contradicts nothing."""
    expected = {_FIELDS[field]: (getattr(model, field),) for field in _ARGS_FIELDS}
    expected |= {_ARGS_NAMES.get(key, key): _FIXED[key] for key in _ARGS_FIXED}
    expected |= {
        "group_query_attention": (model.kv_heads != model.heads, True),
        "untie_embeddings_and_output_weights": (False,),
        "window_size": tuple(kind((left, 0)) for left in (model.window - 1, model.window) for kind in (tuple, list)),
    }
    if args.get("group_query_attention") is False:  # num_query_groups then has a default that is not used
        expected["num_query_groups"] = (args.get("num_query_groups"),)
    for key, accepted in expected.items():
        value = args.get(key)
        if value is not None and value not in accepted:
            raise ValueError(
                f"{source}: its argument {key} is {reprlib.repr(value)} where the config has {accepted[0]!r}; "
                "it is a checkpoint of another config"
            )
    rows = args.get("padded_vocab_size")
    if isinstance(rows, int) and rows < model.vocab_size:
        raise ValueError(
            f"{source}: its argument padded_vocab_size is {rows} where the config has {model.vocab_size} tokens; "
            "it is a checkpoint of another config"
        )


def _window(model: dict[str, Any], source: object) -> int:
    """The tokens that a local layer attends to, which window_size says in one of two ways.

    Megatron-Bridge 0.4 and later convert a window of W to [W - 1, 0]; up to 0.3.1 it was [W, 0]. The file does not say
    its version, but Megatron-Core dropped async_tensor_model_parallel_allreduce between the two. Models that were made
    without a conversion have [4096, 0] up to 0.5.1, which means the window of 4096 of every Gemma 2.
    """
    size = _require_field(model, "window_size", source)
    if not isinstance(size, list | tuple) or len(size) != 2 or size[1] != 0:
        raise ValueError(f"{source}: model.window_size is {reprlib.repr(size)}; Gemma 2's is a list [W - 1, 0]")
    left = _number(size[0], "model.window_size", source, whole=True)
    counts_itself = "async_tensor_model_parallel_allreduce" in model or left == _BRIDGE_WINDOW
    return left if counts_itself else left + 1


def _peft_section(adapter: AdapterConfig, canonical: bool) -> dict[str, Any]:
    projections = table.match_targets(adapter)
    if canonical and adapter.kind == "dora":
        raise ValueError("Megatron-Bridge's DoRA has one A for q, k and v, and one for gate and up; use LoRA")
    modules = []
    for module, parts in _MODULES.items():
        adapted = [name for name in parts if name in projections]
        if canonical:
            modules += [parts[name] for name in adapted]
        elif len(adapted) == len(parts):
            modules.append(module)
        elif adapted:
            raise ValueError(
                f"Megatron-Bridge's {module} takes one adapter for {', '.join(parts)}, and this one has "
                f"{', '.join(adapted)} only; only canonical LoRA can say so"
            )
    target = next(
        target for target, kind in _PEFT.items() if kind == adapter.kind and ("Canonical" in target) == canonical
    )
    return {
        "_target_": target,
        "dim": adapter.rank,
        # Megatron-Bridge scales every adapter by alpha / dim.
        "alpha": _shorten(adapter.scale * adapter.rank if adapter.rslora else adapter.alpha),
        "dropout": adapter.dropout,
        "dropout_position": "pre",
        "target_modules": modules,
    }


def _section(run: dict[str, Any], name: str, source: object) -> dict[str, Any]:
    section = run.get(name)
    if not isinstance(section, dict):
        raise ValueError(
            f"{source} has no section {name}, which Megatron-Bridge writes; check that it is the right file"
        )
    return section


def _require_field(section: dict[str, Any], key: str, source: object, name: str = "model") -> Any:
    if key not in section:
        raise ValueError(f"{source} lacks {name}.{key}; add the model's own value, it is never guessed")
    return section[key]


def _number(value: Any, key: str, source: object, whole: bool = False) -> Any:
    if type(value) not in (int, float) or not abs(value) < 2**53 or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        hint = ", with a point, as in 1.0e-6" if isinstance(value, str) and "e" in value.lower() else ""
        raise ValueError(f"{source}: {key} is {reprlib.repr(value)}; it must be {kind}{hint}")
    return int(value) if whole else value


def _check(source: object, key: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{source}: {key} is {reprlib.repr(value)}; this program has {accepted[0]!r} only")


def _plain(value: Any) -> Any:
    """The name in a node that names a class or a function without calling it; other values as they are."""
    if isinstance(value, dict) and value.get("_call_") is False and value.keys() == {"_call_", "_target_"}:
        return value["_target_"]
    return value


def _torch_dtype(dtype: DType) -> dict[str, Any]:
    return {"_target_": f"torch.{dtype}", "_call_": False}


def _shorten(value: float | None) -> float | None:
    """Whole numbers as int, as Megatron-Bridge writes them without a point."""
    return int(value) if value is not None and value == int(value) else value
