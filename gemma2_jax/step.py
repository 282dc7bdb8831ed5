"""One step as plain JAX on split state: what is trained, what is frozen, how both change.

`Program` holds everything about a run that is decided before its first step: the model's structure, the shapes and
shardings of its arrays (no memory), and the functions to compile. The loop calls them; a planner can compile them.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax import dims, lora, mesh as meshes, model, optim
from gemma2_jax.config import Config
from gemma2_jax.loss import cross_entropy
from gemma2_jax.model import Abstract, Gemma2, Weights

Batch = dict[str, jax.Array]  # tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T]
BATCH_DTYPES = {"tokens": "int32", "targets": "int32", "segments": "int32", "positions": "int32", "weights": "float32"}


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "frozen", "optimizer"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class State:
    """Everything a step reads and replaces; of arrays, or of their shapes alone."""

    step: Any  # int32 scalar: steps taken
    params: Any  # Weights: what is trained
    frozen: Any  # Weights: the rest
    optimizer: Any  # optax state of `params`


class Program:
    """The run of `config` on `mesh`, before anything is allocated."""

    def __init__(self, config: Config, mesh: Mesh):
        meshes.check(config, mesh)
        self.config, self.mesh = config, mesh
        skeleton = nnx.eval_shape(self._create)
        self.graph, params, frozen = nnx.split(skeleton, lora.trainable(config.adapter), ...)
        self.letters = model.letters(skeleton)
        self.params = self._abstract(model.flat(params), config.compute.trained_dtype)
        self.frozen = self._abstract(model.flat(frozen), config.compute.frozen_dtype)
        self.optimizer = optim.optimizer(config.optim, config.steps, {path: self.letters[path] for path in self.params})
        self.schedule = optim.schedule(config.optim, config.steps)

    @cached_property
    def state(self) -> State:
        """Shapes, dtypes and shardings of the whole state."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        scalar = partial(jax.ShapeDtypeStruct, sharding=replicated)
        optimizer = optax.tree.map_params(
            self.optimizer,
            lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
            jax.eval_shape(self.optimizer.init, self.params),
            self.params,
            transform_non_params=lambda leaf: scalar(leaf.shape, leaf.dtype),
        )
        return State(step=scalar((), jnp.int32), params=self.params, frozen=self.frozen, optimizer=optimizer)

    @property
    def base(self) -> Abstract:
        """Abstract weights of the model itself, whichever are trained."""
        return {path: w for path, w in {**self.params, **self.frozen}.items() if "/adapter/" not in path}

    @property
    def batch(self) -> Abstract:
        """Abstract global batch."""
        shape = self.config.train.global_batch_size, self.config.train.sequence_length
        sharding = NamedSharding(self.mesh, PartitionSpec(dims.DIMS["B"].used))
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_DTYPES.items()}

    def random_base(self) -> Weights:
        """Base weights drawn from `train.seed`, made where they are kept."""

        def draw() -> Weights:
            drawn = model.flat(nnx.state(self._create(adapters=False)))
            return {path: w.astype(self.base[path].dtype) for path, w in drawn.items()}

        return jax.jit(draw, out_shardings=_shardings(self.base))()

    def fresh(self, base: Weights) -> State:
        """The state of step 0 around given base weights, with new adapters if the run has them."""

        def start(base: Weights) -> State:
            whole = self._create(adapters=False)
            nnx.update(whole, nnx.state(model.rebuild(nnx.graphdef(whole), base)))
            lora.attach(whole, self.config.adapter, rngs=self._rngs(1))
            weights = model.flat(nnx.state(whole))
            params = {path: weights[path].astype(leaf.dtype) for path, leaf in self.params.items()}
            frozen = {path: base[path] for path in self.frozen}
            return State(step=jnp.int32(0), params=params, frozen=frozen, optimizer=self.optimizer.init(params))

        return jax.jit(start, out_shardings=_shardings(self.state), donate_argnums=0)(base)

    def train_step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step over the global batch; the loss is a mean over its target tokens (nats)."""
        passes = self._micro_batches(batch)
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step) if self._has_dropout else None
        zero = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), state.params)

        def accumulate(carry, inputs):
            index, micro = inputs
            micro_key = None if key is None else jax.random.fold_in(key, index)
            loss, gradients = jax.value_and_grad(self._loss)(state.params, state.frozen, micro, micro_key)
            return jax.tree.map(jnp.add, carry, (loss, gradients)), None

        indices = jnp.arange(passes["tokens"].shape[0])
        (loss, gradients), _ = jax.lax.scan(accumulate, (jnp.float32(0), zero), (indices, passes))
        targets = jnp.sum(batch["weights"])
        share = 1 / jnp.maximum(targets, 1)
        gradients = jax.tree.map(lambda g, w: (g * share).astype(w.dtype), gradients, state.params)
        with jax.named_scope("optimizer"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss * share,
            "grad_norm": optax.tree.norm(gradients),
            "lr": self.schedule(state.step),
            "target_tokens": targets,
        }
        return State(step=state.step + 1, params=params, frozen=state.frozen, optimizer=optimizer), metrics

    def eval_step(self, state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss (nats) and number of target tokens of a batch."""

        def add(total, micro):
            return total + self._loss(state.params, state.frozen, micro, None), None

        return jax.lax.scan(add, jnp.float32(0), self._micro_batches(batch))[0], jnp.sum(batch["weights"])

    @property
    def _has_dropout(self) -> bool:
        return self.config.adapter.kind != "none" and self.config.adapter.dropout > 0

    def _loss(self, params: Weights, frozen: Weights, batch: Batch, key) -> jax.Array:
        whole = model.rebuild(self.graph, params, frozen)
        hidden_BTD = whole(batch["tokens"], batch["positions"], batch["segments"], key)
        return cross_entropy(
            hidden_BTD,
            whole.embedding[...],
            batch["targets"],
            batch["weights"],
            softcap=self.config.model.final_softcap,
            chunk=self.config.compute.loss_chunk,
        )

    def _micro_batches(self, batch: Batch) -> Batch:
        """[B, T] as [passes, rows, T], each device's own rows dealt out over the passes."""
        train = self.config.train
        rows = train.micro_batch_size * self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        passes = train.global_batch_size // rows
        return {name: x.reshape(rows, passes, -1).swapaxes(0, 1) for name, x in batch.items()}

    def _create(self, adapters: bool = True) -> Gemma2:
        whole = Gemma2(self.config.model, self.config.compute, rngs=self._rngs(0))
        if adapters:
            lora.attach(whole, self.config.adapter, rngs=self._rngs(1))
        return whole

    def _rngs(self, stream: int) -> nnx.Rngs:
        return nnx.Rngs(jax.random.fold_in(jax.random.key(self.config.train.seed), stream))

    def _abstract(self, weights: Weights, dtype: str) -> Abstract:
        return {
            path: jax.ShapeDtypeStruct(w.shape, dtype, sharding=meshes.stored(self.mesh, self.letters[path], w.shape))
            for path, w in weights.items()
        }


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
