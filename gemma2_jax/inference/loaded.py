"""Loads a checkpoint of any format as a model on a mesh, and saves such a model as a checkpoint.

`load_model` reads only the slices of a weight that this process's devices store, so that no device ever holds more;
`save_model` writes a layer at a time. Weights keep the dtype that they are stored in unless another is asked for, so
that loading and saving changes no bit.
"""

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh

from gemma2_jax import command_line
from gemma2_jax.cluster import kernel_records
from gemma2_jax.config import ComputeConfig
from gemma2_jax.convert.checkpoints import Checkpoint, load_weights
from gemma2_jax.convert.describe import describe_adapter
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.formats.companions import load_tokenizer
from gemma2_jax.convert.job import Format, Job
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.dims import Abstract
from gemma2_jax.inference.completion import Completion
from gemma2_jax.inference.decoder import Decoder, decoding_mesh, keeps_dtype, one_device_mesh
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.engine import Request, make_engine
from gemma2_jax.inference.settings import TextSettings
from gemma2_jax.inference.text import encode_prompt
from gemma2_jax.inference.weights import find_weights
from gemma2_jax.mesh import describe_mesh, stored_sharding
from gemma2_jax.model import lora
from gemma2_jax.model.attention.choice import Experience, choose_attention
from gemma2_jax.model.gemma2 import Gemma2, Weights, flatten_state, rebuild_model, weight_dims
from gemma2_jax.model_config import AdapterConfig, DType, ModelConfig, is_adapter_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a model's weights came from, and the mesh that holds them. NNX compares it by identity."""

    checkpoint: Checkpoint
    mesh: Mesh
    tokenizer: "PreTrainedTokenizerFast | None"


class LoadedModel(Gemma2):
    """A Gemma2 on a mesh, with its tokenizer, and with adapters if the checkpoint has any.

    Calling it computes on its mesh, compiled once for each shape; inside a function that is being traced it is a plain
    Gemma2.
    """

    origin: Origin

    def _describe(self) -> list[str]:
        if not hasattr(self, "origin"):  # the model is still being constructed
            return super()._describe()
        adapter = [describe_adapter(self.adapter)] if self.adapter.kind != "none" else []
        place = f"on {describe_mesh(self.mesh)}, from {self.origin.checkpoint.path}"
        return [*super()._describe(), *adapter, place]

    def __call__(self, tokens_BT, positions_BT=None, segments_BT=None) -> jax.Array:
        """Logits of the token that follows each token, float32 [B, T, V].

        Args:
          tokens_BT: int32 token ids; lists of equal length will do.
          positions_BT: int32 positions; by default 0 to T - 1.
          segments_BT: int32; a token attends within its segment only. By default a row is one segment.
        """
        if isinstance(self.embedding[...], Tracer):
            return super().__call__(tokens_BT, positions_BT, segments_BT)
        tokens_BT = self._check_tokens(tokens_BT)
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions_BT is None else positions_BT
        segments_BT = jnp.zeros((B, T), jnp.int32) if segments_BT is None else segments_BT
        inputs = (_pad_rows(np.asarray(x, np.int32), self.mesh) for x in (tokens_BT, positions_BT, segments_BT))
        graph, weights = nnx.split(self)
        with jax.set_mesh(self.mesh):
            return _logits(graph, weights, *inputs)[:B]

    def _check_tokens(self, tokens_BT) -> jax.Array:
        """The tokens as an array, int32 [B, T]. Raises ValueError if they are no input for this model."""
        try:
            tokens = np.asarray(tokens_BT)
        except ValueError as error:
            raise ValueError("tokens are rows of unequal length; pad them, or call the model for each") from error
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype} of shape {tokens.shape}; give whole numbers, [B, T]")
        config = self.config
        if not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            raise ValueError(
                f"tokens are {tokens.min()} to {tokens.max()}, and the model's are 0 to {config.vocab_size - 1}; use "
                "the model's own tokenizer"
            )
        if tokens.shape[1] > config.max_length:
            raise ValueError(f"a row has {tokens.shape[1]} tokens, and the model's context is {config.max_length}")
        return jnp.asarray(tokens, jnp.int32)

    @property
    def mesh(self) -> Mesh:
        """The mesh that the weights lie on."""
        return self.origin.mesh

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter on the weights; its kind is "none" if there is none."""
        return self.origin.checkpoint.adapter

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer beside the weights. Raises ValueError if there is none."""
        if self.origin.tokenizer is None:
            raise ValueError(
                f"{self.origin.checkpoint.path} has no tokenizer; copy tokenizer.json and tokenizer_config.json of its "
                "model there"
            )
        return self.origin.tokenizer


@partial(jax.jit, static_argnums=0)
def _logits(graph, weights, tokens_BT, positions_BT, segments_BT) -> jax.Array:
    return nnx.merge(graph, weights)(tokens_BT, positions_BT, segments_BT)


def _pad_rows(x_BT: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Repeats the last row until every data and fsdp shard has the same number of rows."""
    missing = -len(x_BT) % (mesh.shape["data"] * mesh.shape["fsdp"])
    return np.concatenate([x_BT, x_BT[-1:].repeat(missing, 0)])


def default_dtype() -> DType:
    """The compute dtype if none is asked for: float32 on CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def complete_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's config. Raises ValueError if the checkpoint is an adapter without its model."""
    if checkpoint.model is None or not checkpoint.has_weights:
        base = f"its model, {checkpoint.base}," if checkpoint.base else "its model"
        path = str(checkpoint.path)
        raise ValueError(
            f"{path} is an adapter, and {base} is not at hand; give both: python -m gemma2_jax.generate --checkpoint "
            f"MODEL --adapter {shlex.quote(path)}, or load(MODEL, adapter={path!r})"
        )
    return checkpoint.model


def load_model(checkpoint: Checkpoint, mesh: Mesh | None = None, dtype: DType | None = None) -> LoadedModel:
    """The model of a checkpoint, with its weights and adapters sharded over a mesh as `dims` says.

    Args:
      checkpoint: what `open_checkpoint` returned.
      mesh: by default the first device. A loaded model has no pipeline: stages become more fsdp shards.
      dtype: of matrix products and of the matrices in memory. None: products as `default_dtype`, weights as stored.

    Raises ValueError if the checkpoint is an adapter without its model.
    """
    mesh = one_device_mesh() if mesh is None else _for_inference(mesh)
    skeleton = _model_skeleton(checkpoint, mesh, dtype or default_dtype())
    letters, stored = weight_dims(skeleton), checkpoint.shapes
    wanted: Abstract = {}
    for path, w in flatten_state(nnx.state(skeleton)).items():
        kept = stored[path].dtype if path in stored and (dtype is None or keeps_dtype(path)) else dtype or w.dtype
        wanted[path] = jax.ShapeDtypeStruct(w.shape, kept, sharding=stored_sharding(mesh, letters[path], w.shape))
    return _assemble_model(skeleton, load_weights(checkpoint, wanted), checkpoint, mesh)


def wrap_weights(checkpoint: Checkpoint, weights: Weights, mesh: Mesh, dtype: DType) -> LoadedModel:
    """The model of a checkpoint whose weights are already in memory, such as a run's, in their dtypes.

    Stacks may be longer than the model has layers, as those of pipeline stages are: the rest is cut off.
    """
    mesh = _for_inference(mesh)
    skeleton = _model_skeleton(checkpoint, mesh, dtype)
    placed = {}
    for path, letters in weight_dims(skeleton).items():
        w = weights[path]
        w = w[: skeleton.config.layers] if letters.startswith("L") else w
        placed[path] = jax.device_put(w, stored_sharding(mesh, letters, w.shape))
    return _assemble_model(skeleton, placed, checkpoint, mesh)


def save_model(model: Gemma2, path: Path, to: Format, *, merge: bool = False) -> None:
    """Writes a model as a checkpoint, bit for bit; the folder appears whole or not at all.

    Raises ValueError if the folder already holds something, the disk has no room, or the format cannot hold all that
    the model has.
    """
    if isinstance(model, LoadedModel):
        checkpoint = model.origin.checkpoint
    else:
        checkpoint = Checkpoint(format="huggingface", path=Path("the model"), model=model.config)
    weights = flatten_state(nnx.state(model))
    if not all(w.is_fully_addressable for w in weights.values()):
        raise ValueError(
            f"the weights are spread over {jax.process_count()} processes, and one writes; a training run's checkpoint "
            "has them whole: python -m gemma2_jax.convert RUN DST --to FORMAT, in one process when the run has ended"
        )
    if checkpoint.adapter.kind == "none" and any(map(is_adapter_path, weights)):
        raise ValueError("the model has adapters that it was not loaded with; merge them first (lora.merge_adapters)")
    # "run" would mean another dtype than the model's own.
    source = replace(checkpoint, format="huggingface", model=model.config, sources=(_ModelArrays(weights),))
    job = Job(source=source, to=to, merge=merge)
    for sentence in job.warnings:
        warnings.warn(sentence, stacklevel=3)
    write_checkpoint(job, path)


def load_decoder(
    checkpoint: Checkpoint,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
    *,
    int8: bool = False,
) -> Decoder:
    """The model of a checkpoint, ready to generate, on the mesh, by default the first device.

    An adapter of the checkpoint is merged into the weights if that is possible, as it would slow down every step;
    `adapters.attach_adapters` puts others beside them. `int8` is as in `Decoder`. Beside the decoder's own arrays, no
    more than a layer of one weight, or the embedding, is in memory.
    """
    mesh, dtype = decoding_mesh(mesh or one_device_mesh(), complete_config(checkpoint)), dtype or default_dtype()
    is_merged = not checkpoint.adapter.unmergeable_targets
    skeleton = _model_skeleton(replace(checkpoint, adapter=AdapterConfig()) if is_merged else checkpoint, mesh, dtype)
    shapes = flatten_state(nnx.state(skeleton))
    stored = checkpoint.shapes
    wanted = {
        path: jax.ShapeDtypeStruct(w.shape, stored[path].dtype if keeps_dtype(path) and path in stored else dtype)
        for path, w in shapes.items()
    }
    return Decoder(nnx.graphdef(skeleton), find_weights(checkpoint, wanted), mesh, int8=int8)


def generate_texts(model: LoadedModel, prompts: Sequence[str], settings: TextSettings, *, chat: bool) -> list[str]:
    """The continuation of every prompt, or with `chat` the answer to it, on the model's devices.

    Those of one prompt come one after another.
    """
    rows = [encode_prompt(prompt, model.tokenizer, chat=chat) for prompt in prompts]
    stop = frozenset(stop_tokens(model.origin.checkpoint, model.tokenizer, chat=chat))
    new_request = partial(Request, max_new_tokens=settings.max_new_tokens, sampling=settings.sampling, stop=stop)
    requests = [new_request(prompt=row, sample=sample) for row in rows for sample in range(settings.samples)]
    state = flatten_state(nnx.state(model))
    with jax.set_mesh(model.mesh):
        weights = {path: w if keeps_dtype(path) else w.astype(model.dtype) for path, w in state.items()}
        decoder = _merge_decoder(_plain_graph(model), weights, model.adapter, model.mesh)
    engine = make_engine(decoder, requests)
    completions = [Completion(request, model.tokenizer, settings.stop) for request in requests]
    for request in requests:
        engine.submit(request)
    while not engine.is_idle:
        engine.advance()
        for completion in completions:
            completion.take()
    return [completion.text for completion in completions]


def _merge_decoder(graph: nnx.GraphDef, weights: Weights, adapter: AdapterConfig, mesh: Mesh) -> Decoder:
    """A decoder with these weights, and the adapter merged if that is possible. Empties `weights`."""
    if adapter.kind != "none" and not adapter.unmergeable_targets:
        merged = rebuild_model(graph, weights)
        weights.clear()
        with jax.set_mesh(mesh):
            lora.merge_adapters(merged)
        graph, state = nnx.split(merged)
        weights = flatten_state(state)
        del merged, state
    return Decoder(graph, weights, mesh)


def _plain_graph(model: LoadedModel) -> nnx.GraphDef:
    """The structure of a model without where it came from: models of one shape then share compiled programs."""
    graph, state = nnx.split(model)
    skeleton = nnx.eval_shape(lambda state: nnx.merge(graph, state), state)
    del skeleton.origin
    return nnx.graphdef(skeleton)


def _for_inference(mesh: Mesh) -> Mesh:
    """The mesh with stages and context shards turned into fsdp shards: the same devices, in the same order.

    Stages are of training. Context shards take rows in an order of their own (`balance_context`), which training gives
    them and a caller of a model would not.
    """
    if mesh.shape["stage"] == mesh.shape["context"] == 1:
        return mesh
    shards = mesh.shape["stage"] * mesh.shape["fsdp"] * mesh.shape["context"]
    sizes = dict(mesh.shape) | {"stage": 1, "fsdp": shards, "context": 1}
    return Mesh(mesh.devices.reshape(*sizes.values()), mesh.axis_names, axis_types=mesh.axis_types)


def _model_skeleton(checkpoint: Checkpoint, mesh: Mesh, dtype: DType) -> LoadedModel:
    """The model of a checkpoint without memory: shapes in place of weights."""
    config = complete_config(checkpoint)
    examine = partial(_examine_kernels, config, mesh)
    attention, _ = choose_attention(config, ComputeConfig(dtype=dtype), mesh.devices.flat[0], examine)

    def create() -> LoadedModel:
        model = LoadedModel(config, attention=attention, dtype=dtype, rngs=nnx.Rngs(0))
        lora.attach_adapters(model, checkpoint.adapter, rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(create)


def _examine_kernels(config: ModelConfig, mesh: Mesh) -> Experience:
    """What is known of the kernels on these devices; says once that they are not used, and why."""
    experience = kernel_records.examine(config, mesh, kernel_records.INFERENCE)
    if experience.fault and experience.fault not in _said:
        _said.add(experience.fault)
        command_line.notify(f"attention is by xla: mosaic {experience.fault}")
    return experience


_said: set[str] = set()


def _assemble_model(skeleton: LoadedModel, weights: Weights, checkpoint: Checkpoint, mesh: Mesh) -> LoadedModel:
    model = rebuild_model(nnx.graphdef(skeleton), weights)
    tokenizer = load_tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else None
    model.origin = Origin(checkpoint, mesh, tokenizer)
    return model


_cut = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


@dataclass(frozen=True)
class _ModelArrays:
    """A model's weights as a source of `convert`, which reads them part by part."""

    weights: Weights

    @property
    def shapes(self) -> Abstract:
        return {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in self.weights.items()}

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        w = self.weights[path]
        ranges = [range(size)[part] for size, part in zip(w.shape, index, strict=True)]
        part = _cut(w, [r.start for r in ranges], tuple(map(len, ranges)))
        return np.asarray(part).astype(dtype, copy=False)

    def stored_rows(self, path: str) -> tuple[int, int]:
        dim = int(path.startswith("blocks/"))
        return dim, self.weights[path].shape[dim]
