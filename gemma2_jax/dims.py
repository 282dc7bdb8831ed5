"""The alphabet: one letter for every dimension of every tensor, and the table of how each is sharded.

Einsum strings, weight shapes, shardings, adapters and converter layouts are all spelled with these letters, so a
weight's shape, initial sharding and use are written once, in its einsum. `dim` means a dimension of a tensor, `axis`
an axis of the mesh.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax.sharding import PartitionSpec

from gemma2_jax.model_config import ModelConfig

Abstract = dict[str, jax.ShapeDtypeStruct]  # shapes, dtypes and shardings of arrays, by path
Axes = tuple[str, ...]
Place = Literal["used", "between_blocks", "for_logits"]  # the columns that say how activations are spread


@dataclass(frozen=True, kw_only=True)
class Dim:
    """One row of the table: what a dim means, and the mesh axes that split it.

    Attributes:
      stored: the axes that a stored weight is split over.
      used: the axes that an activation, or a weight at the moment of use, is spread over.
      between_blocks: the axes that the activations which blocks hand to each other are spread over; None for `used`.
      for_logits: the axes that hidden states and logits are spread over where logits are formed; None for `used`.
      may_stay_whole: whether an axis that does not divide the dim is left out; otherwise it is JAX's error.
      may_be_shared: whether shards that are a multiple of the dim may each use one of its items, several the same one.
    """

    meaning: str
    stored: Axes = ()
    used: Axes = ()
    between_blocks: Axes | None = None
    for_logits: Axes | None = None
    may_stay_whole: bool = False
    may_be_shared: bool = False

    def spread(self, place: Place) -> Axes:
        """The axes that an activation is spread over in this place."""
        axes = {"used": self.used, "between_blocks": self.between_blocks, "for_logits": self.for_logits}[place]
        return self.used if axes is None else axes


# A stored matrix is also split over these axes, and gathered when it is used: ZeRO-3 (arXiv:1910.02054). Its gradient
# is summed over fsdp and context where the pipeline reduces it (`Pipeline._reduce_gradient`). Context shards work on
# other tokens with the same weights, as fsdp shards do. The first dim that an axis divides takes it: when a weight is
# gathered along a later dim, XLA keeps a transposed copy of the whole stack. Vectors stay whole, as a gather costs
# more than they do. The embedding is split over these axes and not gathered: each shard of it takes all tokens of its
# data shard, so its gradient needs no sum over them (`Gemma2.add_embedding_gradients`). It takes stages in the same
# way where they do not divide the vocabulary: each stage then makes all the logits.
GATHERED = ("fsdp", "context")

DIMS = {
    # Logits of all rows and positions of a data shard are formed together, as its devices share the vocabulary.
    "B": Dim(meaning="batch", used=("data", "fsdp"), for_logits=("data",)),
    # Sequence parallelism (arXiv:2205.05198) spreads positions over tensor shards between blocks. The one position of a
    # decoding step stays whole.
    "T": Dim(
        meaning="query position",
        used=("context",),
        between_blocks=("context", "tensor"),
        for_logits=(),
        may_stay_whole=True,
    ),
    "S": Dim(meaning="key position"),
    "D": Dim(meaning="model width"),
    "N": Dim(meaning="query heads", stored=("tensor",), used=("tensor",)),
    # Where there are fewer of these heads than tensor shards, each shard uses the one that its queries need.
    "K": Dim(meaning="key/value heads", stored=("tensor",), used=("tensor",), may_stay_whole=True, may_be_shared=True),
    "G": Dim(meaning="query heads per key/value head"),
    "H": Dim(meaning="head width"),
    "F": Dim(meaning="MLP width", stored=("tensor",), used=("tensor",)),
    # Every device of a data shard, stages alike (arXiv:2411.05288), has its rows of the embedding and makes its share
    # of the logits of all the tokens there: those are fewer bytes to gather than the embedding and its gradient.
    "V": Dim(
        meaning="vocabulary",
        stored=("tensor", "stage"),
        used=("tensor", "stage", *GATHERED),
        may_stay_whole=True,
    ),
    # Rows that are trained while the rest of the embedding is frozen lie as its rows do.
    "E": Dim(
        meaning="tokens whose rows are trained",
        stored=("tensor", "stage"),
        used=("tensor", "stage", *GATHERED),
        may_stay_whole=True,
    ),
    "L": Dim(meaning="layer", stored=("stage",)),
    "R": Dim(meaning="adapter rank"),
}


def stored_spec(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How a stored weight with these dims is split over the mesh axes, which are given with their sizes."""
    rows = [DIMS[letter] for letter in letters]
    axes = [_dividing_axes(row, row.stored, size, mesh) for row, size in zip(rows, shape, strict=True)]
    of_layer = range(letters.startswith("L"), len(letters))  # the dims of one layer's weight
    for axis in ("stage", *GATHERED) if "V" in letters else GATHERED if len(of_layer) > 1 else ():
        if axis not in mesh or any(axis in taken for taken in axes):
            continue
        divided = [dim for dim in of_layer if shape[dim] % _shard_count((*axes[dim], axis), mesh) == 0]
        if divided:
            axes[divided[0]] = (*axes[divided[0]], axis)
    return _partition_spec(axes)


def used_spec(letters: str, shape: Sequence[int], mesh: Mapping[str, int], place: Place = "used") -> PartitionSpec:
    """How an activation, or a weight at the moment of use, is spread over the mesh axes, given with their sizes.

    Axes that the mesh lacks are taken to be split already, by a `shard_map` around the caller.
    """
    rows = [DIMS[letter] for letter in letters]
    axes = [_dividing_axes(row, row.spread(place), size, mesh) for row, size in zip(rows, shape, strict=True)]
    return _partition_spec(axes)


def _dividing_axes(dim: Dim, axes: Axes, size: int, mesh: Mapping[str, int]) -> Axes:
    """The axes that the mesh has; if the dim may stay whole, without those that do not divide what is left of it."""
    taken: Axes = ()
    for axis in axes:
        if axis in mesh and not (dim.may_stay_whole and size % _shard_count((*taken, axis), mesh)):
            taken = (*taken, axis)
    return taken


def _shard_count(axes: Axes, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in axes)


def _partition_spec(axes: Sequence[Axes]) -> PartitionSpec:
    """The spec in its plainest form, which is how JAX itself shows it."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in axes))


def dim_sizes(config: ModelConfig, rank: int = 0) -> dict[str, int]:
    """The size of every dim that a model's weights have, by letter; `rank` is that of R or E in an adapter's array."""
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
        "E": rank,
    }


def weight_shape(letters: str, config: ModelConfig, rank: int = 0) -> tuple[int, ...]:
    """The shape of a weight with these dims."""
    sizes = dim_sizes(config, rank)
    return tuple(sizes[letter] for letter in letters)
