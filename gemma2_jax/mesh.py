"""The device mesh of a run, and the two ways arrays are placed on it: as stored weights and as used values.

Axes are Auto: shardings of stored arrays come from `dims.stored_spec` through `jit(out_shardings=...)`, activations are
pinned with `constrain`, and XLA's partitioner places the collectives in between.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemma2_jax import dims
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import ModelConfig

# The axes, from the one whose devices communicate least, once a step, to the one whose devices communicate most. The
# partitioner also wants the axes of nested `shard_map`s (`pipeline`) in this order.
AXES = ("data", "stage", "fsdp", "context", "tensor")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `config` on `devices`, or on all devices.

    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    described = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if -1 in shape:
        product = math.prod(size for size in shape if size != -1)
        rest, remainder = divmod(len(devices), product)
        if remainder or not rest:
            raise ValueError(
                f"mesh {described} takes a multiple of {product} devices, and there are {len(devices)}; give its axes "
                f"sizes that divide {len(devices)}, such as --mesh.tensor 1 (python -m gemma2_jax.plan says what fits)"
            )
        shape[shape.index(-1)] = rest
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {described} is {math.prod(shape)} devices, but there are {len(devices)}; "
            "set one axis to -1 to take what is left"
        )
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def describe_mesh(mesh: Mesh) -> str:
    """The mesh in words, such as "data 2 x tensor 4"; axes of one device are left out."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where the mesh does not divide what it splits, naming both and a fix."""
    model, train = config.model, config.train
    _check_weights(model, mesh)
    _check_samples(config, mesh)
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    # Each context shard has a piece of each half of a row (`balance_context`), and its tensor shards share it equally.
    pieces = math.lcm(2 * context, context * tensor) if context > 1 else tensor
    if train.sequence_length % pieces:
        shorter = train.sequence_length // pieces * pieces
        raise ValueError(
            f"mesh.context {context} x mesh.tensor {tensor} split the positions of a row into {pieces} pieces, which "
            f"does not divide train.sequence_length {train.sequence_length}; "
            f"use {f'{shorter} or ' if shorter else ''}{shorter + pieces}, or another mesh"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows_per_pass = train.micro_batch_size * shards
    if train.global_batch_size % rows_per_pass:
        nearest = max(1, round(train.global_batch_size / rows_per_pass)) * rows_per_pass
        raise ValueError(
            f"train.global_batch_size {train.global_batch_size} does not divide over micro batch "
            f"{train.micro_batch_size} x data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {rows_per_pass} rows "
            f"a pass; use {nearest}, or change train.micro_batch_size or the mesh"
        )


def _check_weights(model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    if mesh.shape["stage"] > model.layers:
        raise ValueError(f"mesh.stage {mesh.shape['stage']} is more than the {model.layers} layers; use fewer stages")
    sizes = dims.dim_sizes(model)
    for letter, size in sizes.items():
        dim = dims.DIMS[letter]
        tensor = mesh.shape["tensor"] if "tensor" in dim.stored else 1
        if size % tensor == 0 or (dim.may_be_shared and tensor % size == 0):
            continue
        raise ValueError(
            f"mesh.tensor {tensor} does not divide the {dim.meaning} of {size}; "
            f"use a divisor {'or a multiple ' if dim.may_be_shared else ''}of {size}, or another axis"
        )
    for axis in dims.GATHERED:
        if axis not in jax.tree.leaves(tuple(dims.stored_spec("DF", (sizes["D"], sizes["F"]), mesh.shape))):
            raise ValueError(
                f"mesh.fsdp {mesh.shape['fsdp']} x mesh.context {mesh.shape['context']}: {axis} divides neither what "
                f"is left of the model width of {sizes['D']} nor, with mesh.tensor {mesh.shape['tensor']}, of the MLP "
                f"width of {sizes['F']}; use a smaller {axis}, and mesh.data for the rest of the devices"
            )


def _check_samples(config: Config, mesh: Mesh | AbstractMesh) -> None:
    for axis in ("stage", "context"):
        if config.sample.tokens and mesh.shape[axis] > 1:
            reason = "keeps layers on devices of their own" if axis == "stage" else "splits the positions of a row"
            raise ValueError(
                f"mesh.{axis} {mesh.shape[axis]} {reason}, and sample.tokens is {config.sample.tokens}, for which all "
                f"devices work on each token; use mesh.fsdp or mesh.tensor instead, or leave sample.tokens 0 and "
                "generate from the checkpoints"
            )


def layers_per_stage(model: ModelConfig, mesh: Mesh) -> int:
    """Layers of every stage but the last, which has the rest; weights are stored as if the last had as many."""
    return -(-model.layers // mesh.shape["stage"])


def stored_sharding(mesh: Mesh, letters: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a stored weight with these dims."""
    return NamedSharding(mesh, dims.stored_spec(letters, shape, mesh.shape))


def constrain(x: jax.Array, letters: str, place: dims.Place = "used") -> jax.Array:
    """`x`, an activation or a weight at its use, spread over the current mesh (`jax.set_mesh`) as its dims say.

    `place` is the column of the table that says how. Without a mesh, this and the other constraints return `x`.
    """
    axes = _auto_axes()
    return jax.lax.with_sharding_constraint(x, dims.used_spec(letters, x.shape, axes, place)) if axes else x


def constrain_stored(x: jax.Array, letters: str) -> jax.Array:
    """`x` spread over the current mesh as a stored weight with these dims is."""
    axes = _auto_axes()
    return jax.lax.with_sharding_constraint(x, dims.stored_spec(letters, x.shape, axes)) if axes else x


def map_shards(function: Callable, letters: Sequence[str]) -> Callable:
    """`function` run on each device's shards of its arguments, for programs that XLA cannot divide, such as kernels.

    `letters` are the dims of each argument; the result has the dims of the first. Without a mesh, or on one device,
    this is `function` itself.
    """
    axes = _auto_axes()
    if math.prod(axes.values()) == 1:
        return function

    def sharded(*arguments):
        specs = tuple(dims.used_spec(letters_, x.shape, axes) for letters_, x in zip(letters, arguments, strict=True))
        mapped = jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names={*axes}, check_vma=False)
        return mapped(*arguments)

    return sharded


def replicate(x: jax.Array) -> jax.Array:
    """`x` with a whole copy on every device of the current mesh."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _auto_axes() else x


def balance_context(row_T: np.ndarray, shards: int) -> np.ndarray:
    """Reorders rows, [..., T], so that each context shard, which holds an equal run of the result, has the same work.

    Of 2 x shards pieces, shard i gets piece i and the i-th from the end: under a causal mask their work is equal (the
    order of Llama 3, arXiv:2407.21783, section 3.3.2).
    """
    *rest, length = row_T.shape
    early, late = np.split(row_T.reshape(*rest, 2 * shards, length // (2 * shards)), 2, axis=-2)
    return np.stack([early, late[..., ::-1, :]], axis=-2).reshape(row_T.shape)


def axis_size(axis: str) -> int:
    """The number of devices along an axis of the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _auto_axes() -> dict[str, int]:
    """Sizes of the current mesh's axes that the partitioner splits over; a `shard_map` around has taken the others."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}
