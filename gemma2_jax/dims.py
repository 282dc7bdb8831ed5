"""The alphabet: one letter for every dimension of every tensor, and the table of how each is sharded.

Einsum strings, weight shapes, shardings, adapters and converter layouts are all spelled with these letters, so a
weight's shape, initial sharding and use are written once, in its einsum. `dim` means a dimension of a tensor, `axis`
an axis of the mesh.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from gemma2_jax.config import ModelConfig

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """One row of the table."""

    meaning: str
    stored: Axes = ()  # mesh axes that a stored weight is split over
    used: Axes = ()  # mesh axes that an activation, or a weight at the moment of use, is spread over


# A stored matrix is also split over these, and gathered for its use: ZeRO-3 (arXiv:1910.02054). Context shards work on
# other tokens with the same weights, as fsdp shards do. The first dim that one divides takes it: gathered along a later
# dim, XLA keeps a transposed copy of the whole stack. Vectors stay whole: they are not worth a gathering. So it is with
# the embedding and stages that do not divide the vocabulary: each then makes all the logits.
GATHERED = ("fsdp", "context")

DIMS = {
    "B": Dim("batch", used=("data", "fsdp")),
    "E": Dim("batch, fsdp shards together", used=("data",)),
    "T": Dim("query position", used=("context",)),
    "P": Dim("query position, between blocks", used=("context", "tensor")),  # sequence parallelism (arXiv:2205.05198)
    "S": Dim("key position"),
    "D": Dim("model width"),
    "N": Dim("query heads", stored=("tensor",), used=("tensor",)),
    "K": Dim("key/value heads", stored=("tensor",), used=("tensor",)),
    "G": Dim("query heads per key/value head"),
    "H": Dim("head width"),
    "F": Dim("MLP width", stored=("tensor",), used=("tensor",)),
    # Every device of a data shard, stages alike (arXiv:2411.05288), has its rows of the embedding and makes its share
    # of the logits of all the tokens there: those are fewer bytes to gather than the embedding and its gradient.
    "V": Dim("vocabulary", stored=("tensor", "stage"), used=("tensor", "stage", *GATHERED)),
    "L": Dim("layer", stored=("stage",)),
    "R": Dim("adapter rank"),
}


def stored_spec(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How a weight with these dims is kept between uses, split over these axes, given with their sizes."""
    axes = [_divide_axes(DIMS[d].stored, d, size, mesh) for d, size in zip(letters, shape, strict=True)]
    of_layer = range(letters.startswith("L"), len(letters))
    for axis in ("stage", *GATHERED) if "V" in letters else GATHERED if len(of_layer) > 1 else ():
        fit = [at for at in of_layer if axis in mesh and shape[at] % _shard_count((*axes[at], axis), mesh) == 0]
        if fit and not any(axis in names for names in axes):
            axes[fit[0]] = (*axes[fit[0]], axis)
    return _partition_spec(axes)


def used_spec(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How an activation, or a weight at the moment of use, is spread over these axes, given with their sizes.

    Axes that the mesh lacks are those that the caller has split over already.
    """
    return _partition_spec([_divide_axes(DIMS[d].used, d, size, mesh) for d, size in zip(letters, shape, strict=True)])


def _divide_axes(axes: Axes, letter: str, size: int, mesh: Mapping[str, int]) -> Axes:
    """Those of the axes that there are; of what need not be split over all of them, those that divide it.

    That is the vocabulary, one token's position, and key/value heads fewer than the shards, of which each uses the one
    its queries need.
    """
    taken: Axes = ()
    for axis in axes:
        if axis in mesh and (letter not in "KTPV" or size % _shard_count((*taken, axis), mesh) == 0):
            taken = (*taken, axis)
    return taken


def _shard_count(axes: Axes, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in axes)


def _partition_spec(axes: Sequence[Axes]) -> PartitionSpec:
    """In its plainest form, which is how JAX itself shows it."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in axes))


def dim_sizes(config: ModelConfig, rank: int = 0) -> dict[str, int]:
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


def weight_shape(letters: str, config: ModelConfig, rank: int = 0) -> tuple[int, ...]:
    """The shape of a weight with these dims."""
    size = dim_sizes(config, rank)
    return tuple(size[letter] for letter in letters)
