"""State dicts of Gemma 2 as people have saved them, brought to the names that the rows of `table` have.

PyTorch's wrappers put a part into every name, the base class Gemma2Model has no `model.`, and training programs leave
buffers and heads beside the weights, or tensors without elements in their place. What is passed over is noted by name,
and what makes up another model is refused with what can be done.
"""

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate

from gemma2_jax.convert.files.tensors import Tensors
from gemma2_jax.convert.formats import table

# Parts of names that are wrappers: of DataParallel, DDP and DeepSpeed; torch.compile; FSDP; activation checkpointing.
WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMBEDDING = table.MODEL[0].name.removeprefix("model.")
# Buffers that follow from the config. Old versions of transformers saved them.
_BUFFERS = ("*rotary_emb.inv_freq", "*rotary_emb.original_inv_freq", "*embed_tokens.embed_scale")


@dataclass(frozen=True)
class Sign:
    """Tensors by whose names a state dict is known for what it is."""

    pattern: str
    said: str  # of a head: what it is; of another model: what is wrong, and what to do


# Heads that --drop leaves out: the rest is a whole language model.
HEADS = (
    Sign("v_head.*", "a value head, as PPO trains it"),
    Sign("value_head.*", "a value head, as PPO trains it"),
    Sign("score.*", "a classifier's or reward model's head"),
    Sign("classifier.*", "a classifier's head"),
)
FOREIGN = (
    Sign("*lora_[ABEem]*", "an adapter beside its base weights; save the result of merge_and_unload(), or the adapter "
         "alone with PEFT's save_pretrained"),
    Sign("*.base_layer.weight", "the base weights of an adapter; save the result of PEFT's merge_and_unload()"),
    Sign("*_flat_param*", "FSDP's flat shards; save with FULL_STATE_DICT or SHARDED_STATE_DICT"),
    Sign("*.qweight", "GPTQ's or AWQ's packed integers; take the model before it was quantized"),
    Sign("*.absmax", "bitsandbytes' packed integers; take the model before it was quantized"),
    Sign("*_proj.weight_scale*", "scales of 8-bit weights; take the model before it was quantized"),
    Sign("*_proj.scales", "scales of packed integers, as of MLX; take the model before it was quantized"),
    Sign("*self_attn.qkv_proj.weight", "the fused projections of gemma_pytorch; take the model's Hugging Face "
         "repository, which has the same weights"),
    Sign("*self_attn.q_norm.weight", "norms of queries, which Gemma 3 has; this program has Gemma 2 only"),
    Sign("*vision_tower.*", "an image encoder; this program has the language model Gemma 2 only"),
)  # fmt: skip


def is_head(name: str) -> bool:
    """Whether a tensor is an output matrix, which is saved or not whatever an index says, as it is the embedding."""
    return WRAPPER.sub("", name).endswith(table.HEAD)


def open_state_dict(
    tensors: Tensors, drop: Sequence[str], source: object, *, tied: bool = True
) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors by the names of `table`, and notes on what was passed over.

    Args:
      drop: patterns (as of a shell) of names of tensors to leave out.
      tied: whether the config says that the output matrix is the embedding.

    Raises ValueError where a pattern fits no tensor, for heads that are not dropped, and for what is no Gemma 2.
    """
    names, notes = _standard_names(tensors.shapes, source)
    dropped = _match_drops(names, drop, source)
    names = {stored: name for stored, name in names.items() if stored not in dropped}
    if dropped:
        notes.append(f"left out, as --drop asks: {', '.join(dropped)}")
    embedding = table.MODEL[0].name
    if tied and table.HEAD in names.values() and embedding not in names.values():  # safetensors' save_model keeps one
        names = {stored: embedding if name == table.HEAD else name for stored, name in names.items()}
        notes.append(f"it holds {table.HEAD} and no {embedding}, which is the same matrix and is read from it")
    check_elements({stored: tensors.shapes[stored] for stored in names}, source)
    for sign in FOREIGN:
        if found := _fitting(names.values(), (sign.pattern,)):
            raise ValueError(f"{source} holds {table.list_names(found)}: {sign.said}")
    buffers = _fitting(names.values(), _BUFFERS)
    if buffers:
        notes.append(f"passed over {len(buffers)} buffers that follow from the config: {table.list_names(buffers)}")
    for sign in HEADS:
        if found := _fitting(names.values(), (sign.pattern,)):
            raise ValueError(
                f"{source} has {sign.said} ({table.list_names(found)}), which is no part of the language model; "
                f"leave it out with python -m gemma2_jax.convert {shlex.quote(str(source))} NEW --drop "
                f"'{sign.pattern}' --to hf"
            )
    return Tensors({name: tensors.by_name[stored] for stored, name in names.items() if name not in {*buffers}}), (
        *notes,
    )


def _standard_names(stored: Iterable[str], source: object) -> tuple[dict[str, str], list[str]]:
    """The name in `table` of every stored name, and a note where they differ."""
    plain = {name: WRAPPER.sub("", name) for name in stored}
    embeddings = [name for name in plain.values() if name == _EMBEDDING or name.endswith(f".{_EMBEDDING}")]
    inner = embeddings[0].removesuffix(_EMBEDDING) if len(embeddings) == 1 else "model."
    outer = inner.removesuffix("model.")
    names = {
        name: f"model.{short.removeprefix(inner)}" if short.startswith(inner) and _in_model(short, inner)
        else short.removeprefix(outer)
        for name, short in plain.items()
    }  # fmt: skip
    origin = dict[str, str]()
    for name, standard in names.items():
        if origin.setdefault(standard, name) != name:
            raise ValueError(f"{source} holds {standard} twice, as {origin[standard]} and as {name}; delete one")
    notes = []
    if any(name != standard for name, standard in names.items()):
        example = next(name for name, standard in names.items() if name != standard)
        notes.append(f"its tensors have other names than transformers': {example} is read as {names[example]}")
    return names, notes


def _in_model(name: str, prefix: str) -> bool:
    """Whether a tensor is of the class Gemma2Model, where `prefix` stands before the names of such."""
    return prefix != "" or name.startswith(("embed_tokens.", "layers.", "norm.", "rotary_emb."))


def _match_drops(names: dict[str, str], drop: Sequence[str], source: object) -> list[str]:
    """The stored names that a pattern fits, as it is or without its wrappers."""
    dropped = []
    for pattern in drop:
        fitting = [
            stored for stored, name in names.items() if fnmatchcase(stored, pattern) or fnmatchcase(name, pattern)
        ]
        if not fitting:
            raise ValueError(f"--drop '{pattern}' fits none of the {len(names)} tensors of {source}; leave it out")
        dropped += fitting
    return list(dict.fromkeys(dropped))


def check_elements(shapes: dict[str, tuple[int, ...]], source: object) -> None:
    """Raises ValueError where tensors have no elements."""
    empty = [name for name, shape in shapes.items() if not math.prod(shape)]
    if empty:
        raise ValueError(
            f"{source}: {len(empty)} of {len(shapes)} tensors have no elements, such as {empty[0]}: DeepSpeed ZeRO-3 "
            "saved them without gathering its shards. Run the zero_to_fp32.py that DeepSpeed left beside its "
            "global_step folder (python zero_to_fp32.py . OUT --safe_serialization) and copy config.json to OUT, or "
            "save again with stage3_gather_16bit_weights_on_model_save"
        )


def _fitting(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    fits = re.compile("|".join(map(translate, patterns))).match
    return [name for name in names if fits(name)]
