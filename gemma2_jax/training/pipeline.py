"""Loss and gradients of a step: its passes (microbatches) through the stages of a pipeline, forward and backward.

Each stage holds the same number of consecutive layers; the last holds the rest. A tick is one iteration of the scan
over the schedule: in it, each stage takes one pass forward through its layers and an earlier pass backward. With 2
stages and 4 passes, F2 being pass 2 forward and B2 the same pass backward:

    tick       0        1        2        3        4        5
    stage 0    F0       F1       F2 B0    F3 B1    .  B2       B3
    stage 1    .        F0 B0    F1 B1    F2 B2    F3 B3       .
              |forward |       forward and backward        |backward|

Stage s takes pass p forward in tick p + s. In the last stage a pass turns around within a tick: the loss is computed,
and the pass goes backward at once. So stage s takes it backward in tick p + 2 x (stages - 1) - s. From the one tick to
the other the pass is live in that stage, which keeps its residuals: for 2 x stages - 1 ticks at most, however many
passes a step has. The ticks at either end go in one direction only. If a stage takes t_F for a pass forward and t_B for
one backward, a step takes (passes + stages - 1) x (t_F + t_B), as 1F1B does (arXiv:2104.04473). With one stage nothing
waits, and this is gradient accumulation.

The backward pass over layers is written out here rather than left to `jax.grad` over a scan: gradients are added to
their sums layer by layer, so that no second copy of them exists.

Embedding and logits belong to no stage: each stage has a share of the vocabulary (`dims.DIMS`), so none waits for a
last stage with more work, and none holds a copy.

Gradients are summed over fsdp and context shards layer by layer, in `_reduce_gradient`, and over data shards once, at
the end of a step, as the loss is. The embedding's gradient needs no sum over fsdp and context, as each shard of the
embedding takes all tokens of its data shard (`Gemma2.add_embedding_gradients`).

Beside the letters of `dims`: Z in a name is the stage, and 1 in its place the one stage that a `shard_map` over stages
runs for (`arrived_1BTD`). `d_x` is the gradient of the loss with respect to x.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P

from gemma2_jax import dims
from gemma2_jax.config import Config
from gemma2_jax.mesh import constrain_stored, layers_per_stage
from gemma2_jax.model.gemma2 import AdapterInputs, Gemma2, Weights, rebuild_model, rope_angles, weight_dims
from gemma2_jax.model.loss import OutputMatrix, grouped_cross_entropy
from gemma2_jax.training.layer import Layer, LayerInputs, Residuals

# tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T]; of several sources, sources: int32 [B]
Batch = dict[str, jax.Array]
Passes = Batch  # the same as [M, B, T] and [M, B], M passes
Sums = tuple[jax.Array, jax.Array | None]  # the loss (nats) of all rows, float32 scalar; of each source's, if several

_BLOCKS = "blocks/"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TickInputs:
    """What the stages read in a tick and do not change."""

    trained: Weights  # of the blocks, by their path in a block
    frozen: Weights
    passes: Passes
    key: jax.Array | None  # for dropout
    tick: jax.Array | int  # number of the tick


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TickState:
    """What a tick leaves to the next one."""

    arrived_ZBTD: jax.Array  # activations that the stage before sent: what each stage takes forward next
    returned_ZBTD: jax.Array  # gradients that the stage after sent: what each stage takes backward next
    residuals: Residuals  # what live passes need for their backward pass, [Z, slots, layers, ...]
    block_sums: Weights  # sums of gradients so far, float32: of the trained weights of blocks, by their path in a block
    outer_sums: Weights  # sums of the gradients of the other trained weights, by their path
    losses: Sums


class Pipeline:
    """How the passes of a step run through the stages of `mesh`."""

    def __init__(self, skeleton: Gemma2, config: Config, mesh: Mesh, source_count: int = 1):
        self.config, self.mesh = config, mesh
        self.source_count = source_count  # sources whose losses are summed for themselves, where a batch names them
        self.graph = nnx.graphdef(skeleton)
        self.layer = Layer(skeleton, config.compute)
        # The dims of each weight as a layer has it, by its path in a block, and of each weight outside of blocks.
        self.letters = {
            path.removeprefix(_BLOCKS): letters.removeprefix("L") for path, letters in weight_dims(skeleton).items()
        }
        self.stages = mesh.shape["stage"]
        self.layers = layers_per_stage(config.model, mesh)
        train = config.train
        self.passes = train.global_batch_size // (train.micro_batch_size * mesh.shape["data"] * mesh.shape["fsdp"])
        self.slots = 2 * self.stages - 1  # passes that are live in a stage at one time

    @property
    def bubble(self) -> float:
        """The share of a step in which a stage waits for others."""
        return (self.stages - 1) / (self.passes + self.stages - 1)

    def loss(self, params: Weights, frozen: Weights, passes: Passes) -> Sums:
        """Summed losses; no gradients and no dropout."""
        return self._shard_axis("data", self._shard_loss, (P(), P(), P(None, "data")), P())(params, frozen, passes)

    def gradients(self, params: Weights, frozen: Weights, passes: Passes, key) -> tuple[Sums, Weights]:
        """Summed losses, and the gradient of that of all rows with respect to `params`, float32.

        `key` is for dropout, or None.
        """
        specs = P(), P(), P(None, "data"), P()
        return self._shard_axis("data", self._shard_gradients, specs, P())(params, frozen, passes, key)

    def stage_layers(self, stage):
        """The number of layers that a stage has."""
        return jnp.clip(self.config.model.layers - stage * self.layers, 0, self.layers)

    def _shard_loss(self, params: Weights, frozen: Weights, passes: Passes) -> jax.Array:
        """The `loss` on one data shard's rows, then summed over the shards."""
        gemma = rebuild_model(self.graph, params, frozen)
        trained, block_frozen = _block_weights(params), _block_weights(frozen)

        def run_tick(carry, tick):
            arrived_ZBTD, totals = carry
            inputs = TickInputs(trained=trained, frozen=block_frozen, passes=passes, key=None, tick=tick)
            embedded_BTD = gemma.embed(self._take_pass(passes, tick)["tokens"])
            arrived_ZBTD, last_BTD, _ = self._run_forward(inputs, arrived_ZBTD, embedded_BTD, ())
            losses = self._output_losses(gemma, last_BTD, self._take_pass(passes, tick - self.stages + 1))
            losses = jax.tree.map(lambda loss: jnp.where(tick >= self.stages - 1, loss, 0), losses)
            return (arrived_ZBTD, jax.tree.map(jnp.add, totals, losses)), None

        start = self._zero_activations(passes, gemma), self._zero_losses(passes)
        (_, totals), _ = jax.lax.scan(run_tick, start, jnp.arange(self.passes + self.stages - 1))
        return jax.tree.map(lambda total: self._sum_axis(total, "data"), totals)

    def _shard_gradients(self, params: Weights, frozen: Weights, passes: Passes, key):
        """The `gradients` on one data shard's rows, then summed over the shards."""
        gemma = rebuild_model(self.graph, params, frozen)
        outer = {path: w for path, w in params.items() if not path.startswith(_BLOCKS)}
        if key is not None:
            key = jax.random.fold_in(key, self._axis_index("data"))
        step_inputs = TickInputs(
            trained=_block_weights(params), frozen=_block_weights(frozen), passes=passes, key=key, tick=0
        )

        def loss_of_pass(outer: Weights, last_BTD, pass_index):
            gemma = rebuild_model(self.graph, {**params, **outer}, frozen)
            losses = self._output_losses(gemma, last_BTD, self._take_pass(passes, pass_index))
            return losses[0], losses

        def run_tick(state: TickState, tick, *, forward: bool, backward: bool) -> tuple[TickState, None]:
            inputs = replace(step_inputs, tick=tick)
            last_BTD = d_last_BTD = jnp.zeros_like(state.returned_ZBTD[0])
            if forward:
                embedded_BTD = gemma.embed(self._take_pass(passes, tick)["tokens"])
                arrived_ZBTD, last_BTD, residuals = self._run_forward(
                    inputs, state.arrived_ZBTD, embedded_BTD, state.residuals
                )
                state = replace(state, arrived_ZBTD=arrived_ZBTD, residuals=residuals)
            if forward and backward:  # a pass leaves the last stage, and turns around
                loss_and_gradients = jax.value_and_grad(loss_of_pass, (0, 1), has_aux=True)
                (_, losses), (d_outer, d_last_BTD) = loss_and_gradients(outer, last_BTD, tick - self.stages + 1)
                state = replace(
                    state,
                    losses=jax.tree.map(jnp.add, state.losses, losses),
                    outer_sums={p: total + self._reduce_gradient(p, d_outer) for p, total in state.outer_sums.items()},
                )
            if backward:
                returned_ZBTD, d_embedded_BTD, block_sums = self._run_backward(
                    inputs, state.returned_ZBTD, d_last_BTD, state.residuals, state.block_sums
                )
                outer_sums = self._add_embedding_gradient(gemma, state.outer_sums, inputs, d_embedded_BTD)
                state = replace(state, returned_ZBTD=returned_ZBTD, block_sums=block_sums, outer_sums=outer_sums)
            return state, None

        state, start = self._zero_state(step_inputs, outer, gemma), 0
        for ticks, forward, backward in (
            (self.stages - 1, True, False),
            (self.passes, True, True),
            (self.stages - 1, False, True),
        ):
            if ticks:
                run = partial(run_tick, forward=forward, backward=backward)
                state, _ = jax.lax.scan(run, state, start + jnp.arange(ticks))
                start += ticks
        gradients = state.outer_sums | {_BLOCKS + path: total for path, total in state.block_sums.items()}
        return jax.tree.map(lambda x: self._sum_axis(x, "data"), (state.losses, gradients))

    def _run_forward(self, inputs: TickInputs, arrived_ZBTD, embedded_BTD, residuals: Residuals):
        """Every stage takes its pass of the tick forward; the first stage's comes from the embedding.

        Returns what has arrived at each stage for the next tick, [Z, B, T, D]; what left the last stage, [B, T, D]; and
        `residuals` with those of the pass written in. `residuals` is empty when evaluating, and then nothing is kept.
        """
        each, same = P("stage"), P()
        specs = _stage_specs(inputs), each, same, each
        run = self._shard_axis("stage", self._run_stage_forward, specs, (each, same, each))
        return run(inputs, arrived_ZBTD, embedded_BTD, residuals)

    def _run_stage_forward(self, inputs: TickInputs, arrived_1BTD, embedded_BTD, residuals: Residuals):
        stage = self._axis_index("stage")
        pass_index = inputs.tick - stage
        x_BTD = jnp.where(stage == 0, embedded_BTD, arrived_1BTD[0])

        def run_layer(index, carry):
            x_BTD, residuals = carry
            layer_inputs = self._layer_inputs(inputs, pass_index, stage * self.layers + index)
            trained, frozen = _index_tree(inputs.trained, index), _index_tree(inputs.frozen, index)
            y_BTD, vjp = self.layer.run(trained, frozen, x_BTD, layer_inputs)
            if residuals:
                slot = 0, pass_index % self.slots, index
                new = self.layer.residuals(vjp)
                residuals = jax.tree.map(lambda kept, x: kept.at[slot].set(x), residuals, new)
            return self._mask_idle(y_BTD, x_BTD, stage, pass_index, index), residuals

        with jax.named_scope("layers"):
            x_BTD, residuals = jax.lax.fori_loop(0, self.layers, run_layer, (x_BTD, residuals))
        return self._shift_stages(x_BTD, 1)[None], self._broadcast_stage(x_BTD, self.stages - 1), residuals

    def _run_backward(self, inputs: TickInputs, returned_ZBTD, d_last_BTD, residuals: Residuals, block_sums: Weights):
        """Every stage takes its pass of the tick backward, and adds to the gradients' sums.

        Returns what has come back to each stage for the next tick, [Z, B, T, D]; the gradient with respect to what
        entered the first stage, [B, T, D]; and the sums.
        """
        each, same = P("stage"), P()
        specs = _stage_specs(inputs), each, same, each, each
        run = self._shard_axis("stage", self._run_stage_backward, specs, (each, same, each))
        return run(inputs, returned_ZBTD, d_last_BTD, residuals, block_sums)

    def _run_stage_backward(
        self, inputs: TickInputs, returned_1BTD, d_last_BTD, residuals: Residuals, block_sums: Weights
    ):
        stage = self._axis_index("stage")
        pass_index = inputs.tick - (2 * (self.stages - 1) - stage)
        d_BTD = jnp.where(stage == self.stages - 1, d_last_BTD, returned_1BTD[0])

        def run_layer(layers_done, carry):
            d_BTD, sums = carry
            index = self.layers - 1 - layers_done
            trained, frozen = _index_tree(inputs.trained, index), _index_tree(inputs.frozen, index)
            layer_inputs = self._layer_inputs(inputs, pass_index, stage * self.layers + index)
            kept = _index_tree(residuals, (0, pass_index % self.slots, index))
            d_trained, d_x_BTD = self.layer.gradients(trained, frozen, kept, d_BTD, layer_inputs)
            for path, total in sums.items():
                gradient = self._mask_idle(self._reduce_gradient(path, d_trained), 0, stage, pass_index, index)
                sums = sums | {path: total.at[index].add(gradient)}
            return self._mask_idle(d_x_BTD, d_BTD, stage, pass_index, index), sums

        with jax.named_scope("backward"), jax.named_scope("layers"):
            d_BTD, block_sums = jax.lax.fori_loop(0, self.layers, run_layer, (d_BTD, block_sums))
        return self._shift_stages(d_BTD, -1)[None], self._broadcast_stage(d_BTD, 0), block_sums

    def _add_embedding_gradient(self, gemma: Gemma2, outer_sums: Weights, inputs: TickInputs, d_embedded_BTD):
        """The sums with the gradient of the pass that leaves the first stage in this tick, if any rows are trained."""
        pass_index = inputs.tick - 2 * (self.stages - 1)
        d_embedded_BTD = jnp.where(pass_index >= 0, d_embedded_BTD, 0)
        tokens_BT = self._take_pass(inputs.passes, pass_index)["tokens"]
        with jax.named_scope("backward"):
            return gemma.add_embedding_gradients(outer_sums, tokens_BT, d_embedded_BTD)

    def _layer_inputs(self, inputs: TickInputs, pass_index, layer) -> LayerInputs:
        """What a layer, by its number in the model, takes beside weights and activations in a pass."""
        batch, key = self._take_pass(inputs.passes, pass_index), inputs.key
        windows = self.config.model.layer_windows(batch["tokens"].shape[1])
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, pass_index), layer)
        return LayerInputs(
            rope=rope_angles(batch["positions"], self.config.model),
            segments_BT=batch["segments"],
            window=jnp.asarray(windows, jnp.int32)[layer],
            adapter=AdapterInputs(layer, key),
        )

    def _output_losses(self, gemma: Gemma2, x_BTD, batch: Batch) -> Sums:
        """Summed losses of one pass, from what left the last stage."""
        return grouped_cross_entropy(
            gemma.normalize_output(x_BTD),
            _output_matrix(gemma),
            batch["targets"],
            batch["weights"],
            self.match_sources(batch),
            softcap=self.config.model.final_softcap,
            chunk=self.config.compute.loss_chunk,
        )

    def match_sources(self, batch: Batch) -> jax.Array | None:
        """Whether each row is of each source, float32 [B, sources]; None where all rows are of one."""
        return jax.nn.one_hot(batch["sources"], self.source_count) if "sources" in batch else None

    def _zero_losses(self, passes: Passes) -> Sums:
        return jnp.float32(0), jnp.zeros(self.source_count, jnp.float32) if "sources" in passes else None

    def _take_pass(self, passes: Passes, pass_index) -> Batch:
        """The pass of that number, or the nearest one where there is none."""
        return _index_tree(passes, jnp.clip(pass_index, 0, self.passes - 1))

    def _mask_idle(self, x: jax.Array, idle_value, stage, pass_index, layer_index) -> jax.Array:
        """`x` where the stage has a layer of that index and there is a pass of that number, else `idle_value`.

        Stages run the same layers at all times, since XLA may put collectives into a layer that every stage must join.
        It costs no time: stages with nothing to do would have to wait for the others anyway.
        """
        if self.stages == 1:
            return x
        busy = (pass_index >= 0) & (pass_index < self.passes) & (layer_index < self.stage_layers(stage))
        return jnp.where(busy, x, idle_value)

    def _reduce_gradient(self, path: str, gradients: Weights) -> jax.Array:
        """The gradient of one weight, float32, summed over the shards of the batch and split as the weight is stored.

        The constraint is what sums it: each fsdp and context shard has the part of its own tokens, and XLA reduces and
        scatters these parts into the stored sharding. Data shards are summed at the end of the step.
        """
        return constrain_stored(gradients[path].astype(jnp.float32), self.letters[path])

    def _zero_state(self, inputs: TickInputs, outer: Weights, gemma: Gemma2) -> TickState:
        """What the first tick starts from."""
        zeros_ZBTD = self._zero_activations(inputs.passes, gemma)
        return TickState(
            arrived_ZBTD=zeros_ZBTD,
            returned_ZBTD=zeros_ZBTD,
            residuals=self._zero_residuals(inputs, zeros_ZBTD),
            block_sums=jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), inputs.trained),
            outer_sums=jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), outer),
            losses=self._zero_losses(inputs.passes),
        )

    def _zero_activations(self, passes: Passes, gemma: Gemma2) -> jax.Array:
        """Zeros in place of the activations at each stage, [Z, B, T, D]."""
        B, T = passes["tokens"].shape[1:]
        return self._spread_stages(jnp.zeros((self.stages, B, T, self.config.model.width), gemma.dtype))

    def _zero_residuals(self, inputs: TickInputs, zeros_ZBTD) -> Residuals:
        """Zeros in place of the residuals of every live pass and layer, [Z, slots, layers, ...]."""

        def residuals_of_layer(inputs: TickInputs, x_BTD):
            trained, frozen = _index_tree(inputs.trained, 0), _index_tree(inputs.frozen, 0)
            return self.layer.residuals(self.layer.run(trained, frozen, x_BTD, self._layer_inputs(inputs, 0, 0))[1])

        lead = self.stages, self.slots, self.layers
        shapes = jax.eval_shape(residuals_of_layer, inputs, zeros_ZBTD[0])
        x, *others = jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), shapes)
        x = jax.tree.map(self._spread_stages, x)  # `jax.vjp` may not need x: then this is a tree without arrays
        if self.config.compute.remat == "offload":
            x = jax.device_put(x, jax.memory.Space.Host)
        return x, *others

    def _spread_stages(self, x: jax.Array) -> jax.Array:
        """`x`, [Z, ..., B, T, D], split over stages, and otherwise sharded as activations are between blocks."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return x
        axes = {axis: size for axis, size in self.mesh.shape.items() if axis != "data"}
        rest = dims.used_spec("BTD", x.shape[-3:], axes, "between_blocks")
        return jax.lax.with_sharding_constraint(x, P("stage", *[None] * (x.ndim - 4), *rest))

    def _shard_axis(self, axis: str, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """`function` run by each shard of `axis` on its part of the arguments; other axes stay as they are."""
        if self.mesh.shape[axis] == 1:
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False)

    def _axis_index(self, axis: str):
        return 0 if self.mesh.shape[axis] == 1 else jax.lax.axis_index(axis)

    def _sum_axis(self, x: jax.Array, axis: str) -> jax.Array:
        return x if self.mesh.shape[axis] == 1 else jax.lax.psum(x, axis)

    def _broadcast_stage(self, x: jax.Array, stage: int) -> jax.Array:
        """The `x` of one stage, at all stages."""
        return self._sum_axis(jnp.where(self._axis_index("stage") == stage, x, 0), "stage") if self.stages > 1 else x

    def _shift_stages(self, x: jax.Array, by: int) -> jax.Array:
        """The `x` of the stage before (by 1) or after (by -1); the ends are neighbors."""
        if self.stages == 1:
            return x
        return jax.lax.ppermute(x, "stage", [(stage, (stage + by) % self.stages) for stage in range(self.stages)])


def _stage_specs(inputs: TickInputs) -> TickInputs:
    """Specs of `inputs` for a `shard_map` over stages: each stage has its own layers, and all else is everywhere."""
    each, same = P("stage"), P()
    return replace(inputs, trained=each, frozen=each, passes=same, key=same, tick=same)


def _output_matrix(gemma: Gemma2) -> OutputMatrix:
    """The embedding, and rows in its place if the model has any."""
    embedding_VD, rows = gemma.embedding[...], gemma.token_rows
    if rows is None:
        return OutputMatrix(embedding_VD)
    return OutputMatrix(embedding_VD, rows.rows_ED, jnp.asarray(rows.tokens, jnp.int32))


def _block_weights(weights: Weights) -> Weights:
    """The stacked weights of the blocks, by their path in a block."""
    return {path.removeprefix(_BLOCKS): w for path, w in weights.items() if path.startswith(_BLOCKS)}


def _index_tree(tree: Any, index) -> Any:
    return jax.tree.map(lambda x: x[index], tree)
