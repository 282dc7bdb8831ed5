"""One step as plain JAX on split state: what is trained, what is frozen, how both change.

`Program` holds everything about a run that is decided before its first step: the model's structure, the shapes and
shardings of its arrays (no memory), and the functions to compile. The loop calls them; a planner can compile them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gemma2_jax.mesh as meshes
from gemma2_jax import dims
from gemma2_jax.cluster import kernel_records
from gemma2_jax.config import Config
from gemma2_jax.data.mixtures import list_sources
from gemma2_jax.data.sources import SPLITS, Split
from gemma2_jax.dims import Abstract
from gemma2_jax.model import gemma2, lora
from gemma2_jax.model.attention.choice import choose_attention
from gemma2_jax.model.gemma2 import Gemma2, Weights
from gemma2_jax.model_config import TOKEN_ROWS, is_adapter_path
from gemma2_jax.training import guard, optim
from gemma2_jax.training.pipeline import Batch, Pipeline

BATCH_DTYPES = {"tokens": "int32", "targets": "int32", "segments": "int32", "positions": "int32", "weights": "float32"}
# Options of XLA's GPU compiler by `compute.gpu_flags`. With "overlap", collectives start early and end late, up to four
# at a time, and a layer's weights are gathered while the layer before is computed (a trip of a loop runs two layers).
GPU_FLAGS: dict[str, dict[str, bool | int]] = {
    "none": {},
    "overlap": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}


@partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "frozen", "optimizer", "history"], meta_fields=[]
)
@dataclass(frozen=True, kw_only=True)
class State[Leaf: (jax.Array, jax.ShapeDtypeStruct)]:
    """Everything a step reads and replaces: arrays, or their shapes, dtypes and shardings alone."""

    step: Leaf  # int32 scalar: steps taken
    params: dict[str, Leaf]  # the weights that are trained, by path
    frozen: dict[str, Leaf]  # the other weights
    optimizer: optax.OptState  # the optimizer's state for `params`
    history: dict[str, Leaf]  # of the gradient norms of earlier steps: `guard.judge_step`


class Program:
    """The run of `config` on `mesh`, before anything is allocated.

    Raises ValueError where the mesh or the implementation of attention does not fit the model.
    """

    def __init__(self, config: Config, mesh: Mesh):
        meshes.check_mesh(config, mesh)
        self.config, self.mesh = config, mesh
        self.device = mesh.devices.flat[0]  # what it is compiled for
        parts = kernel_records.INFERENCE if config.sample.tokens else kernel_records.TRAINING
        examine = partial(kernel_records.examine, config.model, mesh, parts, tunes=config.compute.tune_kernels)
        self.attention, self.attention_reason = choose_attention(config.model, config.compute, self.device, examine)
        skeleton = nnx.eval_shape(self._create_model)
        self.graph, params, frozen = nnx.split(skeleton, lora.trainable_filter(config.adapter), ...)
        self.letters = gemma2.weight_dims(skeleton)
        # Names of the sources of either split; one where nothing is mixed.
        self.sources = {split: [s.name for s in list_sources(config.data, split)] for split in SPLITS}
        self.pipeline = Pipeline(skeleton, config, mesh, max(map(len, self.sources.values())))
        self.params = self._abstract(gemma2.flatten_state(params), config.compute.trained_dtype)
        self.frozen = self._abstract(gemma2.flatten_state(frozen), config.compute.frozen_dtype)
        self.optimizer = optim.make_optimizer(
            config.optim, config.steps, {path: self.letters[path] for path in self.params}
        )
        self.schedule = optim.make_schedule(config.optim, config.steps)

    @cached_property
    def state(self) -> State[jax.ShapeDtypeStruct]:
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
        history = {name: scalar((), x.dtype) for name, x in guard.no_history().items()}
        step = scalar((), "int32")
        return State(step=step, params=self.params, frozen=self.frozen, optimizer=optimizer, history=history)

    @property
    def base(self) -> Abstract:
        """Shapes, dtypes and shardings of the model's own weights, trained or not: those without adapters."""
        return {path: w for path, w in {**self.params, **self.frozen}.items() if not is_adapter_path(path)}

    @property
    def batch(self) -> Abstract:
        """Shapes, dtypes and shardings of a global batch, [B, T] each; of several sources, `sources` is [B]."""
        return self._describe_batch("train")

    @property
    def eval_batch(self) -> Abstract:
        """The same of a batch of held-out data."""
        return self._describe_batch("eval")

    def _describe_batch(self, split: Split) -> Abstract:
        shape = self.config.train.global_batch_size, self.config.train.sequence_length
        sharding = NamedSharding(self.mesh, PartitionSpec(dims.DIMS["B"].used, "context"))
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_DTYPES.items()}
        if len(self.sources[split]) > 1:
            by_row = NamedSharding(self.mesh, PartitionSpec(dims.DIMS["B"].used))
            batch["sources"] = jax.ShapeDtypeStruct(shape[:1], "int32", sharding=by_row)
        return batch

    @property
    def compiler_options(self) -> dict[str, bool | int]:
        """Options of XLA for compiling the steps."""
        return GPU_FLAGS[self.config.compute.gpu_flags] if self.device.platform == "gpu" else {}

    @cached_property
    def process_rows(self) -> range:
        """The rows of the global batch that this process's devices take, the same for processes of one data shard."""
        shape, sharding = self.batch["tokens"].shape, self.batch["tokens"].sharding
        indices = sharding.addressable_devices_indices_map(shape).values()
        spans = {index[0].indices(shape[0])[:2] for index in indices if index}
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        assert sum(stop - start for start, stop in spans) == last - first, "make_mesh keeps a process's rows together"
        return range(first, last)

    def random_base(self) -> Weights:
        """Base weights drawn from `train.seed`; each device makes the part that it stores."""

        def draw() -> Weights:
            drawn = gemma2.flatten_state(nnx.state(self._create_model(adapters=False)))
            return {path: self._pad_layers(path, w.astype(self.base[path].dtype)) for path, w in drawn.items()}

        return jax.jit(draw, out_shardings=_shardings(self.base))()

    def initial_state(self, base: Weights) -> State[jax.Array]:
        """The state of step 0: these base weights, which are donated, and new adapters if the run trains adapters."""

        def create_state(base: Weights) -> State[jax.Array]:
            gemma = self._create_model(adapters=False)
            unpadded = {
                path: w[: self.config.model.layers] if self._is_stacked(path) else w for path, w in base.items()
            }
            nnx.update(gemma, nnx.state(gemma2.rebuild_model(nnx.graphdef(gemma), unpadded)))
            lora.attach_adapters(gemma, self.config.adapter, rngs=self._rngs(1))
            weights = gemma2.flatten_state(nnx.state(gemma))
            params = {
                path: self._pad_layers(path, weights[path].astype(leaf.dtype)) for path, leaf in self.params.items()
            }
            frozen = {path: base[path] for path in self.frozen}
            optimizer, history = self.optimizer.init(params), jax.tree.map(jnp.asarray, guard.no_history())
            return State(step=jnp.int32(0), params=params, frozen=frozen, optimizer=optimizer, history=history)

        return jax.jit(create_state, out_shardings=_shardings(self.state), donate_argnums=0)(base)

    def train_step(self, state: State[jax.Array], batch: Batch) -> tuple[State[jax.Array], dict[str, jax.Array]]:
        """One optimizer step on the global batch: the new state, and metrics as scalars.

        A step that `guard.judge_step` does not take leaves the weights and the optimizer as they were; `taken` tells,
        and `fault` is what `guard.find_nonfinite` found in a step that is not finite. The other metrics are loss (nats,
        the mean over target tokens), grad_norm (before clipping), grad_norm/GROUP, lr, target_tokens, and tokens, which
        are all but padding; of several sources, loss/NAME too, which is not a number where the batch has no target
        tokens of that source.
        """
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step) if self._has_dropout else None
        (loss, source_losses), gradients = self.pipeline.gradients(state.params, state.frozen, self._passes(batch), key)
        targets = jnp.sum(batch["weights"])
        share = 1 / jnp.maximum(targets, 1)
        sums, loss = gradients, loss * share
        with jax.named_scope("optimizer"):
            gradients = jax.tree.map(lambda g, w: (g * share).astype(w.dtype), sums, state.params)
            norm = optax.tree.norm(gradients)
            taken, history = guard.judge_step(self.config.guard, state.history, loss, norm)
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            params = cast(Weights, optax.apply_updates(state.params, updates))
            before, after = (state.params, state.optimizer), (params, optimizer)
            params, optimizer = jax.tree.map(partial(jnp.where, taken), after, before)
        with jax.named_scope("metrics"):
            metrics = {
                "loss": loss,
                "grad_norm": norm,
                "lr": self.schedule(optim.count_updates(state.optimizer)),
                "taken": taken,
                "fault": self._find_fault(loss, norm, sums, state),
                "target_tokens": targets,
                "tokens": jnp.sum(batch["segments"] > 0),
            }
            metrics |= {f"grad_norm/{group}": norm for group, norm in group_norms(gradients).items()}
            if source_losses is not None:
                means = source_losses / self._count_targets(batch)[1:]
                metrics |= {f"loss/{name}": means[number] for number, name in enumerate(self.sources["train"])}
        state = State(step=state.step + 1, params=params, frozen=state.frozen, optimizer=optimizer, history=history)
        return state, metrics

    def _find_fault(self, loss: jax.Array, norm: jax.Array, gradients: Weights, state: State[jax.Array]) -> jax.Array:
        """What `guard.find_nonfinite` finds, which is looked for only where there is something."""
        return jax.lax.cond(
            jnp.isfinite(loss) & jnp.isfinite(norm),
            lambda *_: jnp.int32(-1),
            guard.find_nonfinite,
            loss,
            gradients,
            {**state.params, **state.frozen},
        )

    def describe_skip(self, values: Mapping[str, float]) -> str:
        """Why a step with these metrics was skipped."""
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            return f"its gradient is beyond guard.skip_deviations {self.config.guard.skip_deviations:g}"
        return guard.describe_place(int(values["fault"]), loss, self.params, {**self.params, **self.frozen})

    def eval_step(self, state: State[jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss (nats) and number of target tokens of a batch; of several sources, of all and then of each."""
        loss, source_losses = self.pipeline.loss(state.params, state.frozen, self._passes(batch))
        if source_losses is None:
            return loss, jnp.sum(batch["weights"])
        return jnp.append(loss, source_losses), self._count_targets(batch)

    def _count_targets(self, batch: Batch) -> jax.Array:
        """Target tokens of a batch of several sources: of all, and of each."""
        is_of_BJ = self.pipeline.match_sources(batch)
        assert is_of_BJ is not None
        targets_B = jnp.sum(batch["weights"], axis=1)
        return jnp.append(jnp.sum(targets_B), jnp.sum(targets_B[:, None] * is_of_BJ, axis=0))

    @property
    def _has_dropout(self) -> bool:
        return self.config.adapter.kind != "none" and self.config.adapter.dropout > 0

    def _passes(self, batch: Batch) -> Batch:
        """A batch of [B, T] as [passes, rows, T], in which every pass has an equal part of each device's rows."""
        passes = self.pipeline.passes
        return {name: x.reshape(x.shape[0] // passes, passes, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

    def _create_model(self, adapters: bool = True) -> Gemma2:
        dtype = self.config.compute.dtype
        gemma = Gemma2(self.config.model, attention=self.attention, dtype=dtype, rngs=self._rngs(0))
        if adapters:
            lora.attach_adapters(gemma, self.config.adapter, rngs=self._rngs(1))
        return gemma

    def _rngs(self, stream: int) -> nnx.Rngs:
        return nnx.Rngs(jax.random.fold_in(jax.random.key(self.config.train.seed), stream))

    def _abstract(self, weights: Weights, dtype: str) -> Abstract:
        def stored_shape(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            shape = (self._stored_layers, *shape[1:]) if self._is_stacked(path) else shape
            sharding = meshes.stored_sharding(self.mesh, self.letters[path], shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return {path: stored_shape(path, w.shape) for path, w in weights.items()}

    @property
    def _stored_layers(self) -> int:
        """Layers as stored: an equal number for each stage. Those after the model's last are zero and never used."""
        return meshes.layers_per_stage(self.config.model, self.mesh) * self.mesh.shape["stage"]

    def _is_stacked(self, path: str) -> bool:
        return self.letters[path].startswith("L")

    def _pad_layers(self, path: str, w: jax.Array) -> jax.Array:
        padding = self._stored_layers - w.shape[0] if self._is_stacked(path) else 0
        return jnp.pad(w, ((0, padding), *((0, 0),) * (w.ndim - 1)))


def compile_step(program: Program, step: Callable, batch: Abstract, **options: Any) -> jax.stages.Compiled:
    """A step of the program, compiled for its state and such a batch."""
    return jax.jit(step, **options).lower(program.state, batch).compile(program.compiler_options)


def group_norms(gradients: Weights) -> dict[str, jax.Array]:
    """The norm of the gradient of each `parameter_group`; empty where there is one group, whose norm is the whole's.

    Its sums of squares are those that the norm of the whole gradient and its clipping take, which XLA computes once.
    """
    groups: dict[str, list[jax.Array]] = {}
    for path, gradient in gradients.items():
        groups.setdefault(parameter_group(path).replace(" ", "_"), []).append(gradient)
    return {group: optax.tree.norm(members) for group, members in groups.items()} if len(groups) > 1 else {}


def parameter_group(path: str) -> str:
    """The part of the model that a weight is counted under."""
    if path == TOKEN_ROWS:
        return "rows of tokens"
    if is_adapter_path(path):
        return "adapters"
    if path.endswith("norm/w"):
        return "norms"
    return path.split("/")[1] if path.startswith("blocks/") else path


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
