"""Several adapters at a time on one model whose layers are unstacked, of which each row of a batch takes its own.

A bank has places for the adapters of one projection in one layer, of a rank that none may exceed; number 0 is no
adapter. A step gathers those of its rows, so that one batch serves many adapters, and its program knows only how many
places there are: an adapter is put into a place, in place of another, and nothing is compiled again. LoRA and DoRA are
the same here: what DoRA multiplies the output by is constant once nothing is trained.

Sources: Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285), which gather adapters by row on GPUs.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax import dims
from gemma2_jax.dims import Place
from gemma2_jax.mesh import constrain
from gemma2_jax.model.gemma2 import AdapterInputs, Einsum, Gemma2, activation_place
from gemma2_jax.model.lora import AdapterParam, ProjectionDims, magnitude_ratio, projections


class FrozenAdapter(NamedTuple):
    """The adapter of a projection in all layers once nothing is trained, in host memory and float32.

    In layers that it does not adapt its arrays are zero.
    """

    a_L: np.ndarray  # [L, contracted letters, R]
    b_L: np.ndarray  # [L, R, produced letters], with the scale in it
    m_L: np.ndarray | None  # [L, produced letters], of DoRA


class BankShape(NamedTuple):
    """What the adapters of a projection may be that a bank has places for."""

    rank: int  # the highest
    has_ratio: bool  # whether they may be DoRA
    after_norm: bool  # whether all of them, or none, are added after the post-norm


type BankShapes = Mapping[
    str, BankShape
]  # by projection (attn/q, ..., mlp/down); those that are not there have no bank


class AdapterBank(nnx.Module):
    """The adapters of one projection in one layer.

    The variables are a [M, contracted letters, R], b [M, R, produced letters] and, if any adapter may be DoRA, ratio
    [M, produced letters], where M counts the places and no adapter; all in the compute dtype. They change nothing until
    `put_layer` fills a place.
    """

    def __init__(self, base: Einsum, shape: BankShape, places: int, dtype, mesh: Mesh):
        self.projection = ProjectionDims.of(base.equation)
        inputs, outputs = self.projection.inputs, self.projection.outputs
        contracted, produced = self.projection.contracted, self.projection.produced
        self.down_equation, self.up_equation = f"{inputs},B{contracted}R->BTR", f"BTR,BR{produced}->{outputs}"
        self.output_place: Place = activation_place(outputs)
        self.after_norm = shape.after_norm
        sizes = dict(zip(self.projection.weight, base.w.shape, strict=True)) | {"R": shape.rank}

        def fill(letters: str, value: float) -> AdapterParam:
            stacked = (1 + places, *(sizes[letter] for letter in letters))
            place = NamedSharding(mesh, _bank_spec(letters, stacked, mesh.shape))
            return AdapterParam(jnp.full(stacked, value, dtype, device=place))

        self.a, self.b = fill(f"{contracted}R", 0), fill(f"R{produced}", 0)
        self.ratio: AdapterParam | None = nnx.data(fill(produced, 1) if shape.has_ratio else None)

    def __call__(self, x: jax.Array, y: jax.Array, w: jax.Array, inputs: AdapterInputs) -> jax.Array:
        """The output y for the input x, each row adapted by its own adapter, in the shape and dtype of y."""
        assert inputs.index_B is not None
        a, b = (variable[...][inputs.index_B].astype(x.dtype) for variable in (self.a, self.b))
        low_BTR = constrain(jnp.einsum(self.down_equation, x, a), "BTR", self.output_place)
        y = y + jnp.einsum(self.up_equation, low_BTR, b)
        return y if self.ratio is None else (y * self.ratio[...][inputs.index_B][:, None]).astype(y.dtype)


def _bank_spec(letters: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
    return PartitionSpec(None, *dims.stored_spec(letters, shape[1:], axes))


def attach_banks(model: Gemma2, shapes: BankShapes, places: int, mesh: Mesh) -> None:
    """Gives every projection of these an empty bank, on the mesh; the model has unstacked layers and no adapters."""
    for path, base in projections(model).items():
        _, _, projection = path.partition("/")
        if projection in shapes:
            base.adapter = AdapterBank(base, shapes[projection], places, model.dtype, mesh)


type LayerParts = dict[str, dict[str, np.ndarray]]  # arrays a, b and m of an adapter in one layer, by projection


def cut_layer(adapter: Mapping[str, FrozenAdapter], layer: int, bank: Mapping[str, Any]) -> LayerParts:
    """What a place in the banks of a layer is filled with: a, b and, if the bank has a ratio, m, padded with zeros.

    `bank` has the bank's arrays by projection.
    """

    def pad(x_L: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros(shape, np.float32)
        if x_L is not None:
            padded[tuple(map(slice, x_L.shape[1:]))] = x_L[layer]
        return padded

    parts: LayerParts = {}
    for projection, arrays in bank.items():
        found = adapter.get(projection)
        a, b, m = (found.a_L, found.b_L, found.m_L) if found else (None, None, None)
        parts[projection] = {"a": pad(a, arrays["a"].shape[1:]), "b": pad(b, arrays["b"].shape[1:])}
        if "ratio" in arrays:
            parts[projection]["m"] = pad(m, arrays["ratio"].shape[1:])
    return parts


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def put_layer(equations: tuple[tuple[str, str], ...], banks, weights, parts, place):
    """The banks of a layer with a place filled.

    Args:
      equations: projections with their equations.
      banks: arrays by projection, which are used up.
      weights: arrays w and, in int8, scale of the same projections.
      parts: what `cut_layer` has given.
      place: its number, from 1 on.
    """
    axes = jax.sharding.get_abstract_mesh().shape
    changed = {}
    for name, equation in equations:
        letters, bank, part = ProjectionDims.of(equation), banks[name], parts[name]
        new = {"a": part["a"], "b": part["b"]}
        if "ratio" in bank:
            norm = letters.column_norms(_whole_weight(letters, weights[name]), part["a"], part["b"])
            new["ratio"] = magnitude_ratio(part["m"], norm)
        dims_of = {"a": f"{letters.contracted}R", "b": f"R{letters.produced}", "ratio": letters.produced}
        changed[name] = {
            key: jax.lax.with_sharding_constraint(
                bank[key].at[place].set(x.astype(bank[key].dtype)), _bank_spec(dims_of[key], bank[key].shape, axes)
            )
            for key, x in new.items()
        }
    return changed


def _whole_weight(letters: ProjectionDims, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A weight as it is multiplied with, from int8 too."""
    if "scale" not in arrays:
        return arrays["w"]
    summed = tuple(letters.weight.index(letter) for letter in letters.contracted)
    return arrays["w"].astype(jnp.float32) * jnp.expand_dims(arrays["scale"], summed)
