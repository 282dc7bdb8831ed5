"""The table of Megatron's tensors of Gemma 2: which of Hugging Face's are fused into each, and how it is divided.

Megatron fuses q, k and v into one matrix and gate and up into another. The rows of a fused tensor are groups of equal
size, and each of its parts has the same rows of every group. `megatron` opens checkpoints of these tensors, and
`megatron_adapters` has the adapters to them.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gemma2_jax.convert.files.memory import Index, reuse_memory
from gemma2_jax.convert.files.tensors import Tensor
from gemma2_jax.convert.formats import table
from gemma2_jax.model_config import ModelConfig

# The order of the rows of a fused tensor. "one": it has one part. "heads": by key/value head, each with its q, its k
# and its v. "halves": all of gate, then all of up. "rank_halves": by tensor-parallel rank, each with its gate and its
# up. "half_ranks": of one part, the first half of every rank's rows, then the second half of every rank's. "shared": it
# is every part itself.
Rows = Literal["one", "heads", "halves", "rank_halves", "half_ranks", "shared"]


@dataclass(frozen=True)
class Fused:
    """A tensor of Megatron's and the tensors of Hugging Face's or PEFT's that are fused into it."""

    name: str  # Megatron's name; {L} stands for the layer
    parts: tuple[str, ...]  # Hugging Face's or PEFT's names
    rows: Rows = "one"
    rank_dim: Literal[0, 1, None] = None  # the dim that is divided among tensor-parallel ranks

    @property
    def stacked(self) -> bool:
        """Whether there is such a tensor for each layer."""
        return "{L}" in self.name

    @property
    def key(self) -> str:
        """The name that torch_dist has for the stack of all layers."""
        return self.name.replace(".{L}", "")

    def split(self, tensor: Tensor, sizes: list[int], kv_heads: int, ranks: int) -> list[Tensor]:
        """The parts of a fused tensor, which are read from it when they are read.

        Args:
          sizes: the rows of each part.
          ranks: tensor-parallel ranks whose shares of the rows follow one another.
        """
        if self.rows == "shared":
            return [tensor] * len(sizes)
        if self.rows == "half_ranks":
            return [_join_halves(tensor, sizes[0], ranks)]
        groups, spans = self._row_groups(sizes, kv_heads, ranks)
        return [
            tensor if tensor.shape[:1] == (stop,) and not start else FusedPart(tensor, groups, start, stop)
            for start, stop in spans
        ]

    def fuse(self, parts: list[np.ndarray], kv_heads: int, ranks: int = 1) -> np.ndarray:
        """The fused tensor of whole parts, or of one rank's share of each, which then has `kv_heads` heads.

        Args:
          ranks: the tensor-parallel ranks that the rows are for, where their order depends on it.
        """
        inner = parts[0].shape[1:]
        if self.rows == "half_ranks":
            return parts[0].reshape(ranks, 2, -1, *inner).swapaxes(0, 1).reshape(parts[0].shape)
        if len(parts) == 1 or self.rows == "shared":
            return parts[0]
        sizes = [len(part) for part in parts]
        groups, spans = self._row_groups(sizes, kv_heads, 1)
        fused = reuse_memory((sum(sizes), *inner), parts[0].dtype)
        for part, (start, stop) in zip(parts, spans, strict=True):
            fused.reshape(groups, -1, *inner)[:, start:stop] = part.reshape(groups, stop - start, *inner)
        return fused

    def _row_groups(self, sizes: list[int], kv_heads: int, ranks: int) -> tuple[int, list[tuple[int, int]]]:
        """The number of groups of rows, and the first row and the end of each part within every group."""
        groups = {"heads": kv_heads, "halves": ranks, "rank_halves": ranks}.get(self.rows, 1)
        ends = list(itertools.accumulate(size // groups for size in sizes))
        return groups, [(end - size // groups, end) for end, size in zip(ends, sizes, strict=True)]


_L = "decoder.layers.{L}"
_H = "model.layers.{L}"
MODEL = (
    Fused("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), rank_dim=0),
    Fused(f"{_L}.self_attention.linear_qkv.layer_norm_weight", (f"{_H}.input_layernorm.weight",)),
    Fused(
        f"{_L}.self_attention.linear_qkv.weight",
        tuple(f"{_H}.self_attn.{x}_proj.weight" for x in "qkv"),
        rows="heads",
        rank_dim=0,
    ),
    Fused(f"{_L}.self_attention.linear_proj.weight", (f"{_H}.self_attn.o_proj.weight",), rank_dim=1),
    Fused(
        f"{_L}.self_attention.linear_proj.post_layernorm.weight",
        (f"{_H}.post_attention_layernorm.weight",),
    ),
    Fused(f"{_L}.mlp.linear_fc1.layer_norm_weight", (f"{_H}.pre_feedforward_layernorm.weight",)),
    Fused(
        f"{_L}.mlp.linear_fc1.weight",
        tuple(f"{_H}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        rows="halves",
        rank_dim=0,
    ),
    Fused(f"{_L}.mlp.linear_fc2.weight", (f"{_H}.mlp.down_proj.weight",), rank_dim=1),
    Fused(f"{_L}.mlp.linear_fc2.post_layernorm.weight", (f"{_H}.post_feedforward_layernorm.weight",)),
    Fused("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
# The last pipeline stage has a copy of the embedding, which is the output matrix too.
HEAD = Fused("output_layer.weight", (table.HEAD,), rank_dim=0)
# TransformerEngine keeps state for FP8 of each of these modules. Megatron-Bridge loads no checkpoint without it.
_EXTRA_STATES = [
    f"{_L}.{module}._extra_state"
    for module in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attention.linear_proj.post_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "mlp.linear_fc2.post_layernorm",
    )
] + ["decoder.final_layernorm._extra_state"]
_NO_STATE = np.empty(0, np.uint8)


@dataclass(frozen=True, eq=False)
class ConcatenatedTensor:
    """The shares that ranks have of a tensor, concatenated along a dim."""

    parts: tuple[Tensor, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, index: Index) -> np.ndarray:
        span, pieces, offset = range(self.shape[self.dim])[index[self.dim]], [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = max(span.start - offset, 0), min(span.stop - offset, size)
            if start < stop:
                pieces.append(part.read((*index[: self.dim], slice(start, stop), *index[self.dim + 1 :])))
            offset += size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.dim)


@dataclass(frozen=True, eq=False)
class FusedPart:
    """A part of a fused tensor: the rows from `start` to `stop` of each of its groups."""

    fused: Tensor
    groups: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups * (self.stop - self.start), *self.fused.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.fused.dtype

    def read(self, index: Index) -> np.ndarray:
        span, size = range(self.shape[0])[index[0]], self.stop - self.start
        if self.groups == 1:
            return self.fused.read((slice(self.start + span.start, self.start + span.stop), *index[1:]))
        first, last = span.start // size, -(-span.stop // size)
        width = self.fused.shape[0] // self.groups
        groups = self.fused.read((slice(first * width, last * width), *index[1:]))
        rows = groups.reshape(last - first, width, *groups.shape[1:])[:, self.start : self.stop]
        return rows.reshape(-1, *groups.shape[1:])[span.start - first * size : span.stop - first * size]


def _join_halves(tensor: Tensor, rows: int, ranks: int) -> Tensor:
    """The rows of one rank after those of another, of a tensor that has the first halves of all before the second."""
    if ranks == 1:
        return tensor
    size = rows // (2 * ranks)
    starts = [half * ranks * size + rank * size for rank in range(ranks) for half in range(2)]
    return ConcatenatedTensor(tuple(FusedPart(tensor, 1, start, start + size) for start in starts), 0)


def rank_tensors(model: ModelConfig, stages: int, stage: int) -> Iterator[tuple[Fused, int, str]]:
    """The weights of a pipeline stage: each with its layer and its name in the stage, which counts layers from 0."""
    depth = model.layers // stages
    for fused in MODEL:
        for layer in range(depth) if fused.stacked else (0,):
            first, last = fused is MODEL[0] and stage == 0, fused is MODEL[-1] and stage == stages - 1
            if fused.stacked or first or last:
                yield fused, stage * depth + layer if fused.stacked else 0, fused.name.format(L=layer)
    if stage and stage == stages - 1:
        yield MODEL[0], 0, HEAD.name


def rank_extra_states(model: ModelConfig, stages: int, stage: int) -> Iterator[tuple[str, Any]]:
    """The state for FP8 in the file of a rank, by name."""
    for name in _EXTRA_STATES:
        if "{L}" in name:
            yield from ((name.format(L=layer), _NO_STATE) for layer in range(model.layers // stages))
        elif stage == stages - 1:
            yield name, _NO_STATE
    if stage == stages - 1:
        yield "output_layer._extra_state", None  # Megatron-Core's own modules have none


def extra_states(layers: int, adapter: Iterable[Fused] = ()) -> Iterator[tuple[str, Any]]:
    """The objects, with their content, that Megatron-Bridge expects beside the weights or beside an adapter's."""
    matrices = [f.name.removesuffix("weight") + "_extra_state" for f in adapter if f.name.endswith(".weight")]
    for name in matrices or _EXTRA_STATES:
        key = name.replace(".{L}", "")
        shards = [f"{layer}_{layers}" for layer in range(layers)] if "{L}" in name else ["0_1"]
        for shard in shards:
            yield f"{key}/shard_{shard}", [None if matrices else _NO_STATE]
