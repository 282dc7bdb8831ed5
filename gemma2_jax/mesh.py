"""The device mesh of a run, and the two ways arrays are placed on it: as stored weights and as used values.

Axes are Auto: shardings of stored arrays come from `dims.stored_spec` through `jit(out_shardings=...)`, activations are
pinned with `constrain`, and XLA's partitioner places the collectives in between.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma2_jax import dims
from gemma2_jax.config import Config, MeshConfig, ModelConfig

# From the axis that speaks least, once a step, to the one that speaks most. The partitioner also wants axes that
# `shard_map` takes inside one another (`pipeline`) in this order.
AXES = ("data", "stage", "fsdp", "context", "tensor")


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
        unit = math.prod(size for size in shape if size != -1)
        rest, remainder = divmod(len(devices), unit)
        if remainder or not rest:
            raise ValueError(
                f"mesh {asked} takes a multiple of {unit} devices, and there are {len(devices)}; give its axes sizes "
                f"that divide {len(devices)}, such as --mesh.tensor 1 (python -m gemma2_jax.plan says what fits)"
            )
        shape[shape.index(-1)] = rest
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {asked} is {math.prod(shape)} devices, but there are {len(devices)}; "
            "set one axis to -1 to take what is left"
        )
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def describe_mesh(mesh: Mesh) -> str:
    """The mesh in words, but for axes of one device."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raises ValueError where the mesh does not divide what it splits, naming both and a fix."""
    model, train = config.model, config.train
    _check_weights(model, mesh)
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    # Each context shard has one piece of either half of a row (`balance_context`), and tensor shards equal parts of it.
    pieces = math.lcm(2 * context, context * tensor) if context > 1 else tensor
    if train.sequence_length % pieces:
        below = train.sequence_length // pieces * pieces
        raise ValueError(
            f"mesh.context {context} x mesh.tensor {tensor} split the positions of a row into {pieces} pieces, which "
            f"does not divide train.sequence_length {train.sequence_length}; "
            f"use {f'{below} or ' if below else ''}{below + pieces}, or another mesh"
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
    if mesh.shape["stage"] > model.layers:
        raise ValueError(f"mesh.stage {mesh.shape['stage']} is more than the {model.layers} layers; use fewer stages")
    sizes = dims.dim_sizes(model)
    for letter, size in sizes.items():
        tensor = mesh.shape["tensor"] if "tensor" in dims.DIMS[letter].stored else 1
        if size % tensor == 0 or (letter == "K" and tensor % size == 0):  # fewer heads than shards stay whole
            continue
        raise ValueError(
            f"mesh.tensor {tensor} does not divide the {dims.DIMS[letter].meaning} of {size}; "
            f"use a divisor {'or a multiple ' if letter == 'K' else ''}of {size}, or another axis"
        )
    for axis in dims.GATHERED:
        if axis not in jax.tree.leaves(tuple(dims.stored_spec("DF", (sizes["D"], sizes["F"]), mesh.shape))):
            raise ValueError(
                f"mesh.fsdp {mesh.shape['fsdp']} x mesh.context {mesh.shape['context']}: {axis} divides neither what "
                f"is left of the model width of {sizes['D']} nor, with mesh.tensor {mesh.shape['tensor']}, of the MLP "
                f"width of {sizes['F']}; use a smaller {axis}, and mesh.data for the rest of the devices"
            )


def layers_per_stage(model: ModelConfig, mesh: Mesh) -> int:
    """Layers of every stage but the last, which has the rest; weights are stored as if it had as many."""
    return -(-model.layers // mesh.shape["stage"])


def stored_sharding(mesh: Mesh, letters: str, shape: Sequence[int]) -> NamedSharding:
    """Sharding of a stored weight with these dims."""
    return NamedSharding(mesh, dims.stored_spec(letters, shape, mesh.shape))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x` spread over the current mesh (`jax.set_mesh`) as its dims say; unchanged where no mesh is set."""
    axes = _auto_axes()
    return jax.lax.with_sharding_constraint(x, dims.used_spec(letters, x.shape, axes)) if axes else x


def constrain_stored(x: jax.Array, letters: str) -> jax.Array:
    """`x` spread over the current mesh as a stored weight with these dims is."""
    axes = _auto_axes()
    return jax.lax.with_sharding_constraint(x, dims.stored_spec(letters, x.shape, axes)) if axes else x


def map_shards(function: Callable, letters: Sequence[str]) -> Callable:
    """`function` of what each device has of its arguments, with these dims, for what XLA cannot divide itself.

    Its result has the dims of its first argument. Where no mesh is set, or nothing is divided, it gets them whole.
    """
    axes = _auto_axes()
    if math.prod(axes.values()) == 1:
        return function

    def divided(*arguments):
        specs = tuple(dims.used_spec(dims_, x.shape, axes) for dims_, x in zip(letters, arguments, strict=True))
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names={*axes}, check_vma=False)(
            *arguments
        )

    return divided


def replicate(x: jax.Array) -> jax.Array:
    """`x` whole on every device of the current mesh."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _auto_axes() else x


def balance_context(row_T: np.ndarray, shards: int) -> np.ndarray:
    """Positions (the last dim) in the order in which `shards` context shards hold them, an equal part each.

    Shard i has piece i of 2 x shards pieces, and piece i from the end: under a causal mask all have the same work
    (the order of Llama 3, arXiv:2407.21783, section 3.3.2).
    """
    *rest, length = row_T.shape
    first, second = np.split(row_T.reshape(*rest, 2 * shards, length // (2 * shards)), 2, axis=-2)
    return np.stack([first, second[..., ::-1, :]], axis=-2).reshape(row_T.shape)


def axis_size(axis: str) -> int:
    """Devices along an axis of the current mesh, 1 where no mesh is set."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _auto_axes() -> dict[str, int]:
    """Sizes of the axes of the current mesh that are left to the partitioner: not those of a `shard_map` around."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}
