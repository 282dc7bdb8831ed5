"""Which outputs of a block to keep for its backward pass: the bytes of each, the FLOPs it saves, and the best that fit.

All of it follows from sizes: nothing is compiled, and no device is asked for. Bytes and FLOPs are those of one GPU and
one step, for `compute.remat block`, which computes again what `compute.kept_outputs` does not name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, get_args

from gemma2_jax.config import Config, KeptOutput

if TYPE_CHECKING:
    from gemma2_jax import dims

# The products of a block with weights, as the model has them.
EQUATIONS: dict[KeptOutput, str] = {
    "q": "BTD,DNH->BTNH",
    "k": "BTD,DKH->BTKH",
    "v": "BTD,DKH->BTKH",
    "o": "BTNH,NHD->BTD",
    "gate": "BTD,DF->BTF",
    "up": "BTD,DF->BTF",
    "down": "BTF,FD->BTD",
}
_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An output that may be kept.

    Attributes:
      name: as `compute.kept_outputs` has it.
      size: bytes, of all layers of a stage and all passes that are live there.
      flops: what a step no longer computes again. Stages that wait for others compute too, and count.
    """

    name: KeptOutput
    size: int
    flops: float


def list_candidates(config: Config, mesh: Mapping[str, int]) -> tuple[Candidate, ...]:
    """Every output that may be kept, those that save the most FLOPs a byte first.

    Args:
      config: of the run; its own `compute.kept_outputs` does not matter.
      mesh: the size of every axis.
    """
    stages = mesh["stage"]
    layers = -(-config.model.layers // stages)
    train = config.train
    passes = train.global_batch_size // (train.micro_batch_size * mesh["data"] * mesh["fsdp"])
    live, run = (2 * stages - 1) * layers, (passes + stages - 1) * layers
    layer = _Layer(config, mesh)
    found = [Candidate(name=name, size=live * size, flops=run * flops) for name, size, flops in layer.outputs()]
    return tuple(sorted(found, key=lambda candidate: candidate.flops / candidate.size, reverse=True))


def choose_kept_outputs(config: Config, mesh: Mapping[str, int], budget: int) -> tuple[KeptOutput, ...]:
    """The outputs that save the most FLOPs in `budget` bytes a GPU, for `compute.kept_outputs`.

    Of sets that save as much, it is the one of the fewest bytes. It is empty where nothing fits.
    """
    candidates = list_candidates(config, mesh)
    sets = [kept for count in range(len(candidates) + 1) for kept in combinations(candidates, count)]
    fitting = [kept for kept in sets if sum(candidate.size for candidate in kept) <= budget]

    def worth(kept: tuple[Candidate, ...]) -> tuple[float, int]:
        return sum(candidate.flops for candidate in kept), -sum(candidate.size for candidate in kept)

    names = {candidate.name for candidate in max(fitting, key=worth, default=())}
    return tuple(name for name in get_args(KeptOutput) if name in names)


@dataclass(frozen=True)
class _Layer:
    """One layer in one pass, on one GPU."""

    config: Config
    mesh: Mapping[str, int]

    def outputs(self) -> Iterator[tuple[KeptOutput, int, float]]:
        """The name of each output, its bytes, and the FLOPs that make it."""
        from gemma2_jax.model.gemma2 import activation_place, split_equation

        for name, equation in EQUATIONS.items():
            inputs, weight, outputs = split_equation(equation)
            size = math.prod(self._shape(outputs, activation_place(outputs)))
            # The product itself is made with whole positions: they are spread further between blocks afterwards.
            summed = [letter for letter in weight if letter not in outputs]
            terms = math.prod(n for n, letter in zip(self._shape(inputs), inputs, strict=True) if letter in summed)
            yield name, size * self._item_size, 2.0 * math.prod(self._shape(outputs)) * terms
        yield "attention", self._attention_size(), self._attention_flops()

    @property
    def _item_size(self) -> int:
        return _SIZES[self.config.compute.dtype]

    def _shape(self, letters: str, place: dims.Place = "used") -> tuple[int, ...]:
        """The shape that an activation of one pass has on a GPU."""
        from gemma2_jax import dims

        shards = self.mesh["data"] * self.mesh["fsdp"]
        rows, length = self.config.train.micro_batch_size * shards, self.config.train.sequence_length
        sizes = {**dims.dim_sizes(self.config.model), "B": rows, "T": length}
        shape = [sizes[letter] for letter in letters]
        spec = dims.used_spec(letters, shape, self.mesh, place)
        axes = [(names,) if isinstance(names, str) else names or () for names in spec]
        return tuple(
            size // math.prod(self.mesh[axis] for axis in names) for size, names in zip(shape, axes, strict=True)
        )

    def _attention_size(self) -> int:
        """The bytes of the output and of the log-sum-exp, which is float32, in whole tiles of queries."""
        from gemma2_jax.kernels.limits import MOSAIC

        model, compute, context = self.config.model, self.config.compute, self.mesh["context"]
        B, T, N, H = self._shape("BTNH")
        lack = MOSAIC.find_lack(
            architecture="sm_90", dtype=compute.dtype, width=model.head_width, softcap=model.attn_softcap
        )
        if compute.attention == "xla" or lack:
            from gemma2_jax.model.attention.xla import BLOCKS

            tile, parts = min(BLOCKS["gpu"], T) if context == 1 else 1, 1
        else:
            from gemma2_jax.kernels.tile_sizes import TILES

            # Around a ring of context shards, each part of the keys has results of its own.
            tile, parts = TILES[H].padded[0], context
        T += -T % tile
        return parts * B * T * N * (H * self._item_size + 4)

    def _attention_flops(self) -> float:
        """Two products of scores, within the windows of an average layer, for rows of one document."""
        model, length = self.config.model, self.config.train.sequence_length
        B, T, N, _ = self._shape("BTNH")
        return B * T * model.attention_flops(length) / model.layers * N / model.heads
