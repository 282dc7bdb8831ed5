"""The alphabet: one letter for every dimension of every tensor, and the table of how each is sharded.

Einsum strings, weight shapes, shardings, adapters and converter layouts are all spelled with these letters, so a
weight's shape, initial sharding and use are written once, in its einsum. `dim` means a dimension of a tensor, `axis`
an axis of the mesh.
"""

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
    "T": Dim("query position"),
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


def stored(letters: str) -> PartitionSpec:
    """How a weight with these dims is kept between uses."""
    return PartitionSpec(*(DIMS[letter].stored for letter in letters))


def used(letters: str) -> PartitionSpec:
    """How an activation, or a weight at the moment of use, is spread."""
    return PartitionSpec(*(DIMS[letter].used for letter in letters))


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
