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


DIMS = {
    "B": Dim("batch", used=("data", "fsdp")),
    # Context parallelism everywhere, and between blocks sequence parallelism (arXiv:2205.05198).
    "T": Dim("query position", used=("context", "tensor")),
    "S": Dim("key position"),
    "D": Dim("model width", stored=("fsdp", "context")),  # stored split, used whole: ZeRO-3 (arXiv:1910.02054)
    "N": Dim("query heads", stored=("tensor",), used=("tensor",)),
    "K": Dim("key/value heads", stored=("tensor",), used=("tensor",)),
    "G": Dim("query heads per key/value head"),
    "H": Dim("head width"),
    "F": Dim("MLP width", stored=("tensor",), used=("tensor",)),
    # Every stage has a share of the embedding and works on its share of the logits (arXiv:2411.05288).
    "V": Dim("vocabulary", stored=("stage", "tensor"), used=("stage", "tensor")),
    "L": Dim("layer", stored=("stage",)),
    "R": Dim("adapter rank"),
}


def stored(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How a weight with these dims is kept between uses, split over these axes, given with their sizes.

    Key/value heads fewer than the shards of their axis are kept whole: each shard uses the one that its queries need.
    """
    axes = [tuple(axis for axis in DIMS[letter].stored if axis in mesh) for letter in letters]
    return _spec(axes, letters, shape, mesh)


def used(letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """How an activation, or a weight at the moment of use, is spread over these axes, given with their sizes.

    Positions have the tensor axis where no other dim could have it: between blocks, not within them. Axes that the
    mesh lacks are those that the caller has split over already.
    """
    claimed = {axis for letter in letters if letter != "T" for axis in DIMS[letter].used}
    taken = set(mesh) - claimed
    axes = [tuple(a for a in DIMS[d].used if a in (taken if d == "T" else mesh)) for d in letters]
    return _spec(axes, letters, shape, mesh)


def _spec(axes: list[Axes], letters: str, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """Those axes for those dims; K, and T of one token, may stay whole where theirs do not divide them."""
    entries = []
    for names, letter, size in zip(axes, letters, shape, strict=True):
        whole = letter in "KT" and size % math.prod(mesh[axis] for axis in names)
        # The plainest form, which is how JAX itself shows it.
        entries.append(None if whole or not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


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
