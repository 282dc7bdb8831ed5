"""Memory by owner against the arrays that a run has: on every one of the virtual devices, to the byte."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from small_runs import small

from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training.smaller_steps import argument_bytes
from gemma2_jax.training.step import Program


def live_bytes(tree) -> Counter:
    """Bytes of live arrays, by device."""
    total: Counter = Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            total[shard.device] += shard.data.nbytes
    return total


@pytest.mark.parametrize(
    ("recipe", "mesh"),
    [
        ("tiny_pretrain", MeshConfig(data=1, fsdp=4, tensor=2)),
        ("tiny_lora", MeshConfig(data=2, stage=2, context=2)),
    ],
)
def test_state_and_batch_are_as_planned(tmp_path, recipe, mesh):
    program = Program(small(recipe, tmp_path, mesh=mesh), make_mesh(mesh))
    with jax.set_mesh(program.mesh):
        state = program.initial_state(program.random_base())
        batch = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), program.batch)
    live = {
        "trained weights": live_bytes(state.params),
        "optimizer": live_bytes(state.optimizer),
        "frozen weights": live_bytes(state.frozen),
        "batch": live_bytes(batch),
    }
    planned = argument_bytes(program)
    assert ("frozen weights" in planned) == (recipe == "tiny_lora")
    for device in jax.devices():
        assert {kind: sizes[device] for kind, sizes in live.items() if sizes[device]} == planned, device
