"""Loss and gradients of a step: its passes (microbatches) through the stages of a pipeline, forward and backward.

A stage holds an equal run of layers, the last one what is left. In a tick, each stage takes one pass forward through
its layers and an earlier pass backward, so that a pass is live in a stage for 2 x stages - 1 ticks at most, however
many passes a step has. Ticks at either end, in which some stages have nothing to do, go in one direction only: with
F and B the times of a stage, a step takes (passes + stages - 1) x (F + B), as 1F1B does (arXiv:2104.04473). One stage
is the same with nothing to wait for: gradient accumulation.

The backward pass over layers is written out here rather than left to `jax.grad` over a scan: gradients are added to
their sums layer by layer, so that no second copy of them exists.

Embedding and logits belong to no stage: each has a share of the vocabulary in all of them (`dims.DIMS`), so none waits
for a last stage with more work, and none holds a copy. The rows of different data shards meet once a step, at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P

from gemma2_jax import dims
from gemma2_jax.config import Config
from gemma2_jax.mesh import constrain_stored, layers_per_stage
from gemma2_jax.model.gemma2 import Block, Gemma2, Weights, rebuild_model, rope_angles, weight_dims
from gemma2_jax.model.loss import cross_entropy

Batch = dict[str, jax.Array]  # tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T]
Passes = Batch  # the same as [M, B, T], M passes

_BLOCKS = "blocks/"


class Pipeline:
    """How the passes of a step run over the stages of `mesh`."""

    def __init__(self, skeleton: Gemma2, config: Config, mesh: Mesh):
        assert isinstance(skeleton.blocks, Block)
        self.config, self.mesh = config, mesh
        self.graph, self.block_graph = nnx.graphdef(skeleton), nnx.graphdef(skeleton.blocks)
        # Of one layer's weight, or of one that is no layer's.
        self.letters = {
            path.removeprefix(_BLOCKS): dims_.removeprefix("L") for path, dims_ in weight_dims(skeleton).items()
        }
        self.attend_sequence = skeleton.attend_sequence
        self.stages = mesh.shape["stage"]
        self.layers = layers_per_stage(config.model, mesh)
        train = config.train
        self.passes = train.global_batch_size // (train.micro_batch_size * mesh.shape["data"] * mesh.shape["fsdp"])
        self.slots = 2 * self.stages - 1  # passes that are live in a stage at one time

    @property
    def bubble(self) -> float:
        """The share of a step in which a stage waits for others."""
        return (self.stages - 1) / (self.passes + self.stages - 1)

    def loss(self, params: Weights, frozen: Weights, passes: Passes) -> jax.Array:
        """Summed loss (nats), float32."""

        def of_shard(params, frozen, passes):
            whole = rebuild_model(self.graph, params, frozen)
            weights = _block_weights(params), _block_weights(frozen)

            def tick(carry, t):
                arrived_SBTD, total = carry
                fresh_BTD = whole.embed(self._take_pass(passes, t)["tokens"])
                arrived_SBTD, last_BTD, _ = self._forward_tick(*weights, arrived_SBTD, fresh_BTD, (), passes, None, t)
                loss = self._output_loss(whole, last_BTD, self._take_pass(passes, t - self.stages + 1))
                return (arrived_SBTD, total + jnp.where(t >= self.stages - 1, loss, 0)), None

            start = self._zero_activations(passes, whole), jnp.float32(0)
            (_, total), _ = jax.lax.scan(tick, start, jnp.arange(self.passes + self.stages - 1))
            return self._sum_axis(total, "data")

        return self._shard_axis("data", of_shard, (P(), P(), P(None, "data")), P())(params, frozen, passes)

    def gradients(self, params: Weights, frozen: Weights, passes: Passes, key) -> tuple[jax.Array, Weights]:
        """Summed loss (nats) and its gradient by every array of `params`, float32; `key` is for dropout, or None."""
        specs = P(), P(), P(None, "data"), P()
        return self._shard_axis("data", self._gradients, specs, P())(params, frozen, passes, key)

    def _gradients(self, params: Weights, frozen: Weights, passes: Passes, key):
        """`gradients` by the rows of one data shard, summed over all."""
        whole = rebuild_model(self.graph, params, frozen)
        weights = _block_weights(params), _block_weights(frozen)
        outer = {path: w for path, w in params.items() if not path.startswith(_BLOCKS)}
        if key is not None:
            key = jax.random.fold_in(key, self._axis_index("data"))

        def head(outer, last_BTD, t):
            return self._output_loss(
                rebuild_model(self.graph, {**params, **outer}, frozen), last_BTD, self._take_pass(passes, t)
            )

        def tick(carry, t, *, forward: bool, backward: bool):
            arrived_SBTD, returned_SBTD, kept, sums, outer_sums, loss = carry
            last_BTD = d_last_BTD = jnp.zeros_like(returned_SBTD[0])
            if forward:
                fresh_BTD = whole.embed(self._take_pass(passes, t)["tokens"])
                arrived_SBTD, last_BTD, kept = self._forward_tick(
                    *weights, arrived_SBTD, fresh_BTD, kept, passes, key, t
                )
            if forward and backward:
                added, (d_outer, d_last_BTD) = jax.value_and_grad(head, (0, 1))(outer, last_BTD, t - self.stages + 1)
                loss += added
                outer_sums = {path: total + self._reduce_gradient(path, d_outer) for path, total in outer_sums.items()}
            if backward:
                returned_SBTD, d_first_BTD, sums = self._backward_tick(
                    *weights, returned_SBTD, d_last_BTD, kept, sums, passes, key, t
                )
                if "embedding" in outer:
                    first = t - 2 * (self.stages - 1)
                    d_first_BTD = jnp.where(first >= 0, d_first_BTD, 0)
                    tokens_BT = self._take_pass(passes, first)["tokens"]
                    total_VD = whole.add_embedding_gradient(outer_sums["embedding"], tokens_BT, d_first_BTD)
                    outer_sums = outer_sums | {"embedding": total_VD}
            return (arrived_SBTD, returned_SBTD, kept, sums, outer_sums, loss), None

        nothing_SBTD = self._zero_activations(passes, whole)
        sums, outer_sums = (
            jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), part) for part in (weights[0], outer)
        )
        carry = (
            nothing_SBTD,
            nothing_SBTD,
            self._zero_residuals(*weights, nothing_SBTD, passes, key),
            sums,
            outer_sums,
            0.0,
        )
        full, ends = self.passes, self.stages - 1
        for first, ticks, directions in (
            (0, ends, dict(forward=True, backward=False)),
            (ends, full, dict(forward=True, backward=True)),
            (ends + full, ends, dict(forward=False, backward=True)),
        ):
            if ticks:
                carry, _ = jax.lax.scan(partial(tick, **directions), carry, first + jnp.arange(ticks))
        *_, sums, outer_sums, loss = carry
        gradients = outer_sums | {_BLOCKS + path: total for path, total in sums.items()}
        return jax.tree.map(lambda x: self._sum_axis(x, "data"), (loss, gradients))

    def _forward_tick(self, *arguments):
        """Every stage takes its pass of tick `t` forward.

        Returns what has arrived at each stage for the next tick, [S, B, T, D]; what left the last one, [B, T, D]; and
        `kept` with what the backward pass needs, where there is room for it.
        """

        def of_stage(trained, frozen, arrived_1BTD, fresh_BTD, kept, passes, key, t):
            stage = self._axis_index("stage")
            number = t - stage
            x_BTD = jnp.where(stage == 0, fresh_BTD, arrived_1BTD[0])

            def layer(index, carry):
                x_BTD, kept = carry
                inputs = self._layer_inputs(passes, number, stage * self.layers + index, key)
                y_BTD, vjp = self._layer_vjp(_index_tree(trained, index), _index_tree(frozen, index), x_BTD, inputs)
                if kept:
                    slot = 0, number % self.slots, index
                    kept = jax.tree.map(lambda all, new: all.at[slot].set(new), kept, self._residuals(vjp))
                return self._mask_idle(y_BTD, x_BTD, stage, number, index), kept

            x_BTD, kept = jax.lax.fori_loop(0, self.layers, layer, (x_BTD, kept))
            return self._shift_stages(x_BTD, 1)[None], self._broadcast_stage(x_BTD, self.stages - 1), kept

        each, same = P("stage"), P()
        specs = each, each, each, same, each, same, same, same
        return self._shard_axis("stage", of_stage, specs, (each, same, each))(*arguments)

    def _backward_tick(self, *arguments):
        """Every stage takes its pass of tick `t` backward, and adds to the gradients' sums.

        Returns what has come back to each stage for the next tick, [S, B, T, D]; what left the first one, [B, T, D];
        and the sums.
        """

        def of_stage(trained, frozen, returned_1BTD, d_last_BTD, kept, sums, passes, key, t):
            stage = self._axis_index("stage")
            number = t - (2 * (self.stages - 1) - stage)
            d_BTD = jnp.where(stage == self.stages - 1, d_last_BTD, returned_1BTD[0])

            def layer(done, carry):
                d_BTD, sums = carry
                index = self.layers - 1 - done
                weights = _index_tree(trained, index), _index_tree(frozen, index)
                inputs = self._layer_inputs(passes, number, stage * self.layers + index, key)
                vjp = jax.eval_shape(lambda *arguments: self._layer_vjp(*arguments)[1], *weights, d_BTD, inputs)
                x_BTD, opaque, structured = self._load_residuals(_index_tree(kept, (0, number % self.slots, index)))
                vjp = vjp.replace(
                    args_res=[*weights, x_BTD, inputs], opaque_residuals=opaque, structured_residuals=structured
                )
                d_weights, _, d_x_BTD, _ = vjp(d_BTD)
                for path, total in sums.items():
                    added = self._mask_idle(self._reduce_gradient(path, d_weights), 0, stage, number, index)
                    sums = sums | {path: total.at[index].add(added)}
                return self._mask_idle(d_x_BTD, d_BTD, stage, number, index), sums

            d_BTD, sums = jax.lax.fori_loop(0, self.layers, layer, (d_BTD, sums))
            return self._shift_stages(d_BTD, -1)[None], self._broadcast_stage(d_BTD, 0), sums

        each, same = P("stage"), P()
        specs = each, each, each, same, each, each, same, same, same
        return self._shard_axis("stage", of_stage, specs, (each, same, each))(*arguments)

    def _layer(self, trained: Weights, frozen: Weights, x_BTD, inputs):
        """One layer's output, [B, T, D]."""
        rope, segments_BT, window, key = inputs
        block = rebuild_model(self.block_graph, trained, frozen)
        return block(x_BTD, rope, partial(self.attend_sequence, segments_BT, window, None), key)[0]

    def _layer_vjp(self, trained, frozen, x_BTD, inputs):
        """A layer's output and its gradient function, which holds what `compute.remat` keeps beside the arguments."""
        layer: Callable = self._layer
        match self.config.compute.remat:
            case "dots":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
            case "block" | "offload":
                layer = jax.checkpoint(layer, prevent_cse=False)
        arguments = trained, frozen, x_BTD, inputs
        return jax.vjp(layer, *arguments, saveable_args=(False, False, True, False), in_nzs=(True, False, True, False))

    def _residuals(self, vjp) -> tuple:
        """What a gradient function needs that is not at hand again when it is called."""
        x_BTD = vjp.args_res[2]
        if self.config.compute.remat == "offload":
            x_BTD = jax.device_put(x_BTD, jax.memory.Space.Host)
        return x_BTD, vjp.opaque_residuals, vjp.structured_residuals

    def _load_residuals(self, kept: tuple) -> tuple:
        if self.config.compute.remat == "offload":
            return jax.device_put(kept, jax.memory.Space.Device)
        return kept

    def _layer_inputs(self, passes: Passes, number, layer, key):
        """What a layer takes beside weights and activations: rotary angles, segments, its window, its dropout key."""
        micro = self._take_pass(passes, number)
        windows = self.config.model.layer_windows(micro["tokens"].shape[1])
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, number), layer)
        rope = rope_angles(micro["positions"], self.config.model)
        return rope, micro["segments"], jnp.asarray(windows, jnp.int32)[layer], key

    def _output_loss(self, whole: Gemma2, x_BTD, micro: Batch) -> jax.Array:
        return cross_entropy(
            whole.normalize_output(x_BTD),
            whole.embedding[...],
            micro["targets"],
            micro["weights"],
            softcap=self.config.model.final_softcap,
            chunk=self.config.compute.loss_chunk,
        )

    def _take_pass(self, passes: Passes, number) -> Batch:
        """Pass `number`, or the nearest where there is none of that number."""
        at = jnp.clip(number, 0, self.passes - 1)
        return _index_tree(passes, at)

    def stage_layers(self, stage):
        """Layers that a stage has."""
        return jnp.clip(self.config.model.layers - stage * self.layers, 0, self.layers)

    def _mask_idle(self, x: jax.Array, otherwise, stage, number, index) -> jax.Array:
        """`x` where the stage has a layer of that index and there is a pass of that number.

        Stages run the same layers at all times, since what the partitioner puts into one may involve every stage; those
        with nothing to do have to wait for the others anyway.
        """
        if self.stages == 1:
            return x
        real = (number >= 0) & (number < self.passes) & (index < self.stage_layers(stage))
        return jnp.where(real, x, otherwise)

    def _reduce_gradient(self, path: str, gradients: Weights) -> jax.Array:
        """A gradient, each shard's part of it summed over all, as its weight is stored; float32."""
        return constrain_stored(gradients[path].astype(jnp.float32), self.letters[path])

    def _zero_activations(self, passes: Passes, whole: Gemma2) -> jax.Array:
        """Zeros in place of activations at each stage, [S, B, T, D]."""
        B, T = passes["tokens"].shape[1:]
        return self._spread_stages(jnp.zeros((self.stages, B, T, self.config.model.width), whole.dtype))

    def _zero_residuals(self, trained: Weights, frozen: Weights, nothing_SBTD, passes: Passes, key) -> tuple:
        """Zeros in place of what is kept for the backward pass, [S, slots, layers, ...]."""

        def kept(trained, frozen, x_BTD):
            inputs = self._layer_inputs(passes, 0, 0, key)
            return self._residuals(self._layer_vjp(_index_tree(trained, 0), _index_tree(frozen, 0), x_BTD, inputs)[1])

        lead = self.stages, self.slots, self.layers
        shapes = jax.eval_shape(kept, trained, frozen, nothing_SBTD[0])
        x, *others = jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), shapes)
        x = jax.tree.map(self._spread_stages, x)  # there may be none: see `remat`
        if self.config.compute.remat == "offload":
            x = jax.device_put(x, jax.memory.Space.Host)
        return x, *others

    def _spread_stages(self, x: jax.Array) -> jax.Array:
        """[S, ..., B, T, D] with a part at each stage."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return x
        axes = {axis: size for axis, size in self.mesh.shape.items() if axis != "data"}
        rest = dims.used_spec("BTD", x.shape[-3:], axes, "between_blocks")
        return jax.lax.with_sharding_constraint(x, P("stage", *[None] * (x.ndim - 4), *rest))

    def _shard_axis(self, axis: str, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """`function` of one shard of `axis`; other axes are as they were."""
        if self.mesh.shape[axis] == 1:
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False)

    def _axis_index(self, axis: str):
        return 0 if self.mesh.shape[axis] == 1 else jax.lax.axis_index(axis)

    def _sum_axis(self, x: jax.Array, axis: str) -> jax.Array:
        return x if self.mesh.shape[axis] == 1 else jax.lax.psum(x, axis)

    def _broadcast_stage(self, x: jax.Array, stage: int) -> jax.Array:
        """What one stage has, at all of them."""
        return self._sum_axis(jnp.where(self._axis_index("stage") == stage, x, 0), "stage") if self.stages > 1 else x

    def _shift_stages(self, x: jax.Array, by: int) -> jax.Array:
        """What the stage before (by 1) or after (by -1) has."""
        if self.stages == 1:
            return x
        return jax.lax.ppermute(x, "stage", [(stage, (stage + by) % self.stages) for stage in range(self.stages)])


def _block_weights(weights: Weights) -> Weights:
    """The stacked weights of the blocks, by their path in a block."""
    return {path.removeprefix(_BLOCKS): w for path, w in weights.items() if path.startswith(_BLOCKS)}


def _index_tree(tree: Any, index) -> Any:
    return jax.tree.map(lambda x: x[index], tree)
