"""The device mesh of a run, and the two ways arrays are placed on it: as stored weights and as used values.

Axes are Auto: shardings of stored arrays come from `dims.stored` through `jit(out_shardings=...)`, activations are
pinned with `constrain`, and XLA's partitioner places the collectives in between.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from gemma2_jax import dims
from gemma2_jax.config import Config, MeshConfig, ModelConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all of them by default).

    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    asked = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh {asked}: every axis must be at least 1, and at most one may be -1 (the rest)")
    if -1 in shape:
        rest, remainder = divmod(len(devices), math.prod(size for size in shape if size != -1))
        if remainder or not rest:
            raise ValueError(f"mesh {asked} does not divide the {len(devices)} devices that there are")
        shape[shape.index(-1)] = rest
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {asked} is {math.prod(shape)} devices, but there are {len(devices)}; "
            "set one axis to -1 to take what is left"
        )
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def check(config: Config, mesh: Mesh) -> None:
    """Raises ValueError where the mesh does not divide what it splits, naming both and a fix."""
    model, train = config.model, config.train
    _check_weights(model, mesh)
    tensor, length = mesh.shape["tensor"], train.sequence_length
    if length % tensor:
        below = length // tensor * tensor
        raise ValueError(
            f"mesh.tensor {tensor} does not divide train.sequence_length {length}, whose positions it splits between "
            f"blocks; use {f'{below} or ' if below else ''}{below + tensor} positions, or another mesh.tensor"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    per_pass = train.micro_batch_size * shards
    if train.global_batch_size % per_pass:
        nearest = max(1, round(train.global_batch_size / per_pass)) * per_pass
        raise ValueError(
            f"train.global_batch_size {train.global_batch_size} does not divide over micro batch "
            f"{train.micro_batch_size} x data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {per_pass} rows a "
            f"pass; use {nearest}, or change train.micro_batch_size or the mesh"
        )


def _check_weights(model: ModelConfig, mesh: Mesh) -> None:
    for letter, size in dims.sizes(model).items():
        axis = dims.DIMS[letter].stored
        if isinstance(axis, str) and size % mesh.shape[axis] and (letter != "K" or mesh.shape[axis] % size):
            raise ValueError(
                f"mesh.{axis} {mesh.shape[axis]} does not divide the {dims.DIMS[letter].meaning} of {size}; "
                f"use a divisor {'or a multiple ' if letter == 'K' else ''}of {size}, or another axis"
            )


def stored(mesh: Mesh, letters: str, shape: Sequence[int]) -> NamedSharding:
    """Sharding of a stored weight with these dims."""
    return NamedSharding(mesh, dims.stored(letters, shape, mesh.shape))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x` spread over the current mesh (`jax.set_mesh`) as its dims say; unchanged where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, dims.used(letters, x.shape, mesh.shape))
