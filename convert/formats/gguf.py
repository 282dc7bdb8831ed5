"""GGUF files of Gemma 2, as llama.cpp makes and reads them: the names of tensors and the keys of the config.

The rows are those of `table` under other names; layouts are the same. llama.cpp has norms as 1 + w, in float32, which
is what is multiplied with: read again, w is what it was but for those bits that 1 + w has no place for, and 1 + w has
every bit. `files.gguf` has the bytes, `gguf_tokenizer` the tokenizer.

Source: llama.cpp's Gemma2Model and convert_lora_to_gguf.py (names, keys), src/models/gemma2.cpp (what it computes).
"""

import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.convert.files.gguf import File, Written
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.files.tensors import Tensor, Tensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.model_config import AdapterConfig, FileDType, ModelConfig

ARCHITECTURE = "gemma2"
_NAMES = {
    "embedding": "token_embd.weight",
    "blocks/pre_attn_norm/w": "blk.{L}.attn_norm.weight",
    "blocks/attn/q/w": "blk.{L}.attn_q.weight",
    "blocks/attn/k/w": "blk.{L}.attn_k.weight",
    "blocks/attn/v/w": "blk.{L}.attn_v.weight",
    "blocks/attn/o/w": "blk.{L}.attn_output.weight",
    "blocks/post_attn_norm/w": "blk.{L}.post_attention_norm.weight",
    "blocks/pre_mlp_norm/w": "blk.{L}.ffn_norm.weight",
    "blocks/mlp/gate/w": "blk.{L}.ffn_gate.weight",
    "blocks/mlp/up/w": "blk.{L}.ffn_up.weight",
    "blocks/mlp/down/w": "blk.{L}.ffn_down.weight",
    "blocks/post_mlp_norm/w": "blk.{L}.post_ffw_norm.weight",
    "final_norm/w": "output_norm.weight",
}
_FIELDS = {
    "layers": "block_count",
    "width": "embedding_length",
    "mlp_width": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "window": "attention.sliding_window",
    "max_length": "context_length",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_ROPE_THETA = 10_000.0  # of llama.cpp where a file does not say it, as those of its own converter do not
_Q8_0_BLOCK = 32
_27B_LAYERS = 46  # by which llama.cpp knows the model whose queries it scales otherwise
# The number of general.file_type, by the dtype of the matrices (llama_ftype of llama.h).
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}


def rename_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of the model or of LoRA, with the names of GGUF's tensors."""
    return tuple(replace(row, name=_tensor_name(row.path)) for row in rows)


def _tensor_name(path: str) -> str:
    matrix, _, variable = path.partition("/adapter/")
    return _NAMES[f"{matrix}/w"] + f".lora_{variable}" if variable else _NAMES[path]


MODEL = rename_rows(table.MODEL)


def is_norm(path: str) -> bool:
    """Whether the array at this path is the weight of a norm, which is stored as 1 + w in float32."""
    return path.endswith("norm/w")


@dataclass(frozen=True)
class _Norm:
    """The weight w of a norm, of which 1 + w is stored."""

    stored: Tensor
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, index: Index) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a damaged file may have any bits
            return self.stored.read(index).astype(np.float32) - np.float32(1)


def model_tensors(file: File) -> Tensors:
    """The tensors of a model, with the norms as w in float32."""
    norms = {name for row in MODEL if is_norm(row.path) for name in row.names(len(file.tensors))}
    return Tensors({name: _Norm(tensor) if name in norms else tensor for name, tensor in file.tensors.items()})


def llama_cpp_scalar(layers: int, width: int, heads: int, head_width: int) -> int:
    """The query_pre_attn_scalar that llama.cpp computes with, as GGUF files of Gemma 2 do not say it."""
    return width // heads if layers == _27B_LAYERS else head_width


def check_model(config: ModelConfig, dtype: FileDType | None, path: object) -> None:
    """Raises ValueError for a model that llama.cpp would compute otherwise than this program, or that has no blocks."""
    assumed = llama_cpp_scalar(config.layers, config.width, config.heads, config.head_width)
    if config.query_pre_attn_scalar != assumed:
        raise ValueError(
            f"{path} has query_pre_attn_scalar {config.query_pre_attn_scalar:g}, which no key of a GGUF file says: of "
            f"{config.layers} layers llama.cpp assumes {assumed}, so that it would compute another model; "
            "nothing but other weights would mend that, which this program does not write"
        )
    for name in ("attn_softcap", "final_softcap"):
        if getattr(config, name) is None:
            raise ValueError(f"{path} has no {name}, and llama.cpp always caps for Gemma 2; it cannot run this model")
    for name, shape in table.tensor_shapes(MODEL, config).items() if dtype == "q8_0" else ():
        if len(shape) > 1 and shape[-1] % _Q8_0_BLOCK:
            raise ValueError(
                f"{path}: q8_0 has blocks of {_Q8_0_BLOCK} in a row, and the rows of {name} have {shape[-1]}; write "
                "bfloat16"
            )


def check_adapter(adapter: AdapterConfig, dtype: FileDType | None, path: object) -> None:
    """Raises ValueError for an adapter that GGUF files have no place for."""
    if adapter.kind == "dora":
        raise ValueError(f"{path} is a DoRA, and llama.cpp has LoRA only; merge it: --merge --to gguf")
    if dtype == "q8_0":
        raise ValueError("an adapter is too narrow for the blocks of q8_0; write it as bfloat16")


def stored_tensor(tensor: np.ndarray, path: str) -> np.ndarray:
    """A tensor of the array at `path` as it is in the file: of norms 1 + w, in float32."""
    return tensor.astype(np.float32) + np.float32(1) if is_norm(path) else tensor


def model_metadata(config: ModelConfig, name: str, dtype: str) -> dict[str, Written]:
    """The key-value pairs of a model whose matrices are written in `dtype`, without its tokenizer."""
    fields = {key: getattr(config, field) for field, key in _FIELDS.items()} | {
        "attention.value_length": config.head_width
    }
    floats = {_FIELDS[field] for field in ("attn_softcap", "final_softcap", "norm_eps", "rope_theta")}
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,  # of Q8_0's blocks
        **{f"{ARCHITECTURE}.{key}": float(value) if key in floats else value for key, value in fields.items()},
    }


def model_config(file: File) -> ModelConfig:
    """The config of a model. Raises ValueError naming a key that is missing, or whose value is not Gemma 2's."""
    path, metadata = file.path, file.metadata
    prefix = f"{ARCHITECTURE}."
    values: dict[str, Any] = {field: metadata.get(prefix + key) for field, key in _FIELDS.items()}
    values["rope_theta"] = metadata.get(f"{prefix}rope.freq_base", _ROPE_THETA)
    for field, value in values.items():
        if type(value) not in (int, float) or (field in ("layers", "width", "heads") and not value):
            said = f"is {reprlib.repr(value)}" if value is not None else "is missing"
            raise ValueError(
                f"{path}: {prefix}{_FIELDS[field]} {said}; it must be a number. Files of Gemma 2 have had it since "
                "July 2024: convert the model again"
            )
    accepted = {
        "attention.value_length": (values["head_width"],),
        "rope.dimension_count": (values["head_width"], None),
        "rope.scaling.type": ("none", None),
    }
    for key, allowed in accepted.items():
        if metadata.get(prefix + key) not in allowed:
            raise ValueError(
                f"{path}: {prefix}{key} is {reprlib.repr(metadata.get(prefix + key))}; Gemma 2's is {allowed[0]!r}"
            )
    sizes = [values[name] for name in ("layers", "width", "heads", "head_width")]
    vocab_size = file.tensors[MODEL[0].name].shape[0] if MODEL[0].name in file.tensors else 0
    try:
        scalar = float(llama_cpp_scalar(*sizes))
        return ModelConfig(**values, query_pre_attn_scalar=scalar, vocab_size=vocab_size)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_kind(file: File) -> None:
    """Raises ValueError for a file of another model, or one that holds neither a whole model nor a LoRA."""
    path, metadata = file.path, file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path}: general.architecture is {reprlib.repr(architecture)}; this program has {ARCHITECTURE!r} only"
        )
    if metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"{path} is one of {reprlib.repr(metadata['split.count'])} parts of a model; put them together with "
            "llama-gguf-split --merge"
        )
    kind = metadata.get("general.type", "model")
    if kind not in ("model", "adapter"):
        raise ValueError(f"{path}: general.type is {reprlib.repr(kind)}; this program reads 'model' and 'adapter'")


def adapter_metadata(adapter: AdapterConfig, base: str) -> dict[str, Written]:
    """The key-value pairs of a LoRA to the model `base`. Its scale is alpha / rank, as llama.cpp has no other."""
    named = {"general.base_model.count": 1, "general.base_model.0.name": base} if base else {}
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "adapter",
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.scale * adapter.rank),
        **named,
    }


def adapter_config(file: File) -> tuple[AdapterConfig, str | None]:
    """The LoRA of a file, and the name of its model where the file says it.

    Raises ValueError for another adapter, and for tensors that are no LoRA's.
    """
    path, metadata = file.path, file.metadata
    kind, alpha = metadata.get("adapter.type"), metadata.get("adapter.lora.alpha")
    if kind != "lora":
        raise ValueError(f"{path}: adapter.type is {reprlib.repr(kind)}; this program reads 'lora'")
    # Without one, or with zero, llama.cpp takes the rank.
    if not isinstance(alpha, float) or not alpha > 0 or not math.isfinite(alpha):
        raise ValueError(f"{path}: adapter.lora.alpha is {reprlib.repr(alpha)}; it must be a positive number")
    if "adapter.alora.invocation_tokens" in metadata:
        raise ValueError(f"{path} is an activated LoRA (adapter.alora.invocation_tokens), which this program has not")
    names = {re.sub(r"^blk\.\d+\.", "blk.{L}.", name): name for name in file.tensors}
    rows = {target: rename_rows(list(table.adapter_rows(target).values())[:2]) for target in table.PROJECTIONS}
    targets = tuple(target for target, pair in rows.items() if any(row.name in names for row in pair))
    ranks = [file.tensors[names[rows[target][0].name]].shape[0] for target in targets if rows[target][0].name in names]
    if not ranks:
        raise ValueError(f"{path} has no LoRA of Gemma 2's projections, but {reprlib.repr(list(file.tensors))}")
    base = metadata.get("general.base_model.0.name")
    try:
        adapter = AdapterConfig(kind="lora", rank=ranks[0], alpha=alpha, targets=targets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return adapter, base if isinstance(base, str) else None


def describe_types(file: File) -> str:
    """The types of a file's tensors, the most frequent one first: "Q8_0 and F32"."""
    counts = Counter(tensor.type for tensor in file.tensors.values())
    return " and ".join(kind for kind, _ in counts.most_common())


def quantized_notes(file: File) -> tuple[str, ...]:
    """A sentence about quantized tensors, where there are any."""
    quantized = [tensor.type for tensor in file.tensors.values() if tensor.quantized]
    if not quantized:
        return ()
    return (
        f"{len(quantized)} of its {len(file.tensors)} tensors are quantized ({', '.join(sorted(set(quantized)))}); "
        "they are read as the float32 values that they encode, and what quantizing lost is not in the file",
    )


def model_file(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one of a folder. Raises ValueError where there are several.

    None: there is none.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(file for file in path.glob("*.gguf") if file.is_file())
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:20])
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them: {names}")
    return files[0] if files else None
