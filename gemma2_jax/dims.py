"""The alphabet: one letter for every dimension of every tensor, and the table of how each is sharded.

Einsum strings, weight shapes, shardings, adapters and converter layouts are all spelled with these letters, so a
weight's shape, initial sharding and use are written once, in its einsum. `dim` means a dimension of a tensor, `axis`
an axis of the mesh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from gemma2_jax.config import ModelConfig

Axes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Dim:
    """One row of the table."""

    meaning: str
    stored: Axes = None  # mesh axis that a stored weight is split over
    used: Axes = None  # mesh axis that an activation, or a weight at the moment of use, is spread over


DIMS = {
    "B": Dim("batch", used=("data", "fsdp")),
    "T": Dim("query position", used="tensor"),  # between blocks: sequence parallelism (arXiv:2205.05198)
    "S": Dim("key position"),
    "D": Dim("model width", stored="fsdp"),  # stored split and used whole is ZeRO-3 (arXiv:1910.02054)
    "N": Dim("query heads", stored="tensor", used="tensor"),
    "K": Dim("key/value heads", stored="tensor", used="tensor"),
    "G": Dim("query heads per key/value head"),
    "H": Dim("head width"),
    "F": Dim("MLP width", stored="tensor", used="tensor"),
    "V": Dim("vocabulary", stored="tensor", used="tensor"),
    "L": Dim("layer"),
    "R": Dim("adapter rank"),
}


def stored(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How a weight with these dims is kept between uses, on a mesh of these axis sizes.

    Key/value heads fewer than the shards of their axis are kept whole: each shard uses the one that its queries need.
    """
    return PartitionSpec(*(_whole_or(DIMS[d].stored, d, size, mesh) for d, size in zip(letters, shape, strict=True)))


def used(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How an activation, or a weight at the moment of use, is spread on a mesh of these axis sizes.

    Positions have the tensor axis where no other dim could have it: between blocks, not within them.
    """
    claimed = [DIMS[letter].used for letter in letters if letter != "T"]
    axes = [None if d == "T" and DIMS[d].used in claimed else DIMS[d].used for d in letters]
    return PartitionSpec(*map(_whole_or, axes, letters, shape, [mesh] * len(letters)))


def _whole_or(axis: Axes, letter: str, size: int, mesh: Mapping[str, int]) -> Axes:
    """The axis, or None for the dims that may stay whole where it does not divide them: K, and T of one token."""
    return None if letter in "KT" and isinstance(axis, str) and size % mesh[axis] else axis


def sizes(config: ModelConfig, rank: int = 0) -> dict[str, int]:
    """The size of every dim that a model's weights have, by letter."""
    return {
        "D": config.width,
        "N": config.heads,
        "K": config.kv_heads,
        "G": config.query_groups,
        "H": config.head_width,
        "F": config.mlp_width,
        "V": config.vocab_size,
        "L": config.layers,
        "R": rank,
    }


def shape(letters: str, config: ModelConfig, rank: int = 0) -> tuple[int, ...]:
    """The shape of a weight with these dims."""
    size = sizes(config, rank)
    return tuple(size[letter] for letter in letters)
