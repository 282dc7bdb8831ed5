"""Compiles the engine's step for described GPUs, at its real size, and reads off it what a new token costs.

Nothing is run. A step reads each weight once for all rows, and each row's keys and values: so memory bounds how fast
tokens come, and the compiled program says whether it reads more than that. `described_cluster.prepare_jax` must be
called before JAX is used.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from gemma2_jax.planning.described_cluster import describe_cluster
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.memory_traffic import read_memory_traffic
from gemma2_jax.planning.traffic import Collective, read_traffic

if TYPE_CHECKING:
    from gemma2_jax.model_config import ModelConfig

LOOP = "jit(add_tokens_program)/while"


@dataclass(frozen=True, kw_only=True)
class CompiledDecoding:
    """The engine's program that adds tokens. Bytes are those of one GPU; rows are full."""

    rows: int
    mesh: dict[str, int]
    weights: int  # bytes of weights
    cache: int  # bytes of keys and values
    text: str  # the compiled HLO

    @cached_property
    def memory_traffic(self) -> Counter[str]:
        """Bytes that a step reads and writes, by operation."""
        return read_memory_traffic(self.text, LOOP)

    @property
    def excess(self) -> float:
        """What a step reads and writes, over what it must read: the weights, and the keys and values."""
        return self.memory_traffic.total() / (self.weights + self.cache)

    @property
    def most_tokens(self) -> float:
        """Tokens per second of all rows that memory allows at most. It is a bound and not an estimate."""
        return self.rows * H100.memory_bandwidth / self.memory_traffic.total()

    @property
    def collectives(self) -> list[Collective]:
        """Every collective of the program."""
        return read_traffic(self.text, self.mesh)


def compile_decoding(config: ModelConfig, *, gpus: int, rows: int, context: int) -> CompiledDecoding:
    """Compiles a step of `rows` rows of `context` tokens in bfloat16, over as many described H100s (tensor shards)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from flax.traverse_util import flatten_dict, unflatten_dict
    from jax.sharding import NamedSharding, PartitionSpec

    from gemma2_jax import dims
    from gemma2_jax.config import ComputeConfig, MeshConfig
    from gemma2_jax.inference.decoder import keeps_dtype
    from gemma2_jax.inference.engine import add_tokens_program
    from gemma2_jax.inference.steps import empty_state
    from gemma2_jax.mesh import make_mesh
    from gemma2_jax.model.attention.choice import choose_attention
    from gemma2_jax.model.gemma2 import Gemma2, unstack_layers, weight_dims

    devices = describe_cluster(gpus)
    mesh = make_mesh(MeshConfig(data=1, tensor=gpus), devices)
    attention, _ = choose_attention(config, ComputeConfig(dtype="bfloat16"), devices[0])

    def create() -> Gemma2:
        return Gemma2(config, attention=attention, dtype="bfloat16", rngs=nnx.Rngs(0))

    letters = weight_dims(nnx.eval_shape(create))
    graph, state = nnx.split(nnx.eval_shape(lambda: unstack_layers(create())))

    def describe(x, dtype, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    def describe_weight(path: tuple, w) -> jax.ShapeDtypeStruct:
        is_layer = path[0] == "blocks"
        name = "/".join(part for part in path if isinstance(part, str))
        spec = dims.stored_spec(letters[name][is_layer:], w.shape, mesh.shape)
        return describe(w, w.dtype if keeps_dtype(name) else jnp.bfloat16, spec)

    flat = {path: describe_weight(path, w) for path, w in flatten_dict(nnx.to_pure_dict(state)).items()}
    weights = unflatten_dict(flat)
    shapes = jax.eval_shape(lambda w: empty_state(nnx.merge(graph, w), rows=rows, context=context), weights)
    cache = jax.tree.map(lambda x: describe(x, x.dtype, dims.used_spec("BKSH", x.shape, mesh.shape)), shapes.cache)
    small = jax.tree.map(lambda x: describe(x, x.dtype, PartitionSpec()), replace(shapes, cache=[]))
    is_taken_B, steps = jax.ShapeDtypeStruct((rows,), bool), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        lowered = add_tokens_program.lower(graph, weights, replace(small, cache=cache), is_taken_B, steps)
    text = lowered.compile().as_text()
    assert text is not None
    return CompiledDecoding(
        rows=rows,
        mesh=dict(mesh.shape),
        weights=_count_bytes(weights),
        cache=_count_bytes(cache),
        text=text,
    )


def _count_bytes(arrays) -> int:
    """Bytes of arrays on one device."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
