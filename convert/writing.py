"""Writes a checkpoint in any of the formats, a layer's matrix at a time; the folder appears whole or not at all.

`checkpoints` opens the source and reads its arrays; `model.lora` has the arithmetic of merging. While a part is written
the next ones are read, so that a few parts are in memory at a time. The largest part is a matrix of a layer, or as many
rows of the embedding as make up a chunk of `files.orbax`.
"""

import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax import dims
from gemma2_jax.config import AdapterConfig, DType, ModelConfig
from gemma2_jax.convert.checkpoints import Abstract, Checkpoint, read_array
from gemma2_jax.convert.files import orbax, safetensors, torch_files
from gemma2_jax.convert.files.folder import atomic_folder, copy_tokenizer
from gemma2_jax.convert.files.memory import Index, contiguous_copy, reserve_disk
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.torch_dist import TorchDistWriter
from gemma2_jax.convert.formats import megatron, megatron_config, table
from gemma2_jax.convert.formats.hf_config import hf_config
from gemma2_jax.convert.formats.peft_config import peft_config
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.model import lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2

Format = Literal["orbax", "hf", "peft", "megatron", "megatron-legacy", "megatron-adapter"]
_ADAPTER_FORMATS = ("peft", "megatron-adapter")  # they hold an adapter and no weights
_MODEL_FORMATS = ("hf", "megatron", "megatron-legacy")  # they hold weights and no adapter
_READ_AHEAD = 2  # parts that are read before they are written

Progress = Callable[[float], None]  # is told how many more bytes have been written


@dataclass(frozen=True)
class Part:
    """A part of an array that is read and written at a time: a layer of a stack, or some rows of another array."""

    row: Row
    index: Index


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion: its source, its format and its options. Raises ValueError where they do not go together.

    The arrays are read in parts, as `array_part` in our layouts or as `tensor_part` in those of the format.
    """

    source: Checkpoint
    to: Format
    merge: bool = False  # add the adapter into the weights
    ranks: tuple[int, int] = (1, 1)  # tensor-parallel ranks and pipeline stages that megatron-legacy has files for
    dtype: DType | None = None  # None: as stored; of a full training run that of the weights it started from

    def __post_init__(self) -> None:
        self._check_base()
        adapted = self.source.adapter.kind != "none"
        if self.to in _ADAPTER_FORMATS and not adapted:
            model_format = "hf" if self.to == "peft" else "megatron"
            reason = (
                "trained the whole weights, so there is no adapter to write"
                if self.source.format == "run"
                else f"has no adapter, and --to {self.to} writes nothing else"
            )
            raise ValueError(f"{self.source.path} {reason}; write its weights with --to {model_format}")
        if self.merge and not adapted:
            raise ValueError(f"{self.source.path} has no adapter; leave out --merge")
        if self.to in _ADAPTER_FORMATS and self.merge:
            raise ValueError(f"--to {self.to} writes the adapter alone and --merge dissolves it; choose one of the two")
        if self.merge or self.to in _MODEL_FORMATS:
            lora.check_mergeable(self.source.adapter.unmergeable_targets)
        if self.to in _MODEL_FORMATS and adapted and not self.merge:
            adapter_format = "peft" if self.to == "hf" else "megatron-adapter"
            raise ValueError(
                f"{self.source.path} has an adapter, which --to {self.to} has no place for; "
                f"choose --merge for one model, or --to {adapter_format} for the adapter alone"
            )
        assert self.source.model is not None
        self._check_ranks(self.source.model)

    def _check_base(self) -> None:
        """Raises ValueError where the source is an adapter alone and the format needs its model, or its model's config.

        This comes before anything else is said of the adapter.
        """
        source = self.source
        if self.to not in _ADAPTER_FORMATS and source.lacks_base:
            raise ValueError(
                f"{source.describe_missing_base()}, and --to {self.to} writes them too; give that model as SRC and "
                f"this adapter as --adapter {source.path}"
            )
        if source.model is None:
            raise ValueError(
                f"{source.describe_missing_base()}; give that model as SRC and this adapter as --adapter "
                f"{source.path}, or the folder of the model's config.json as --hf-config"
            )

    def _check_ranks(self, model: ModelConfig) -> None:
        tensor, stages = self.ranks
        if self.ranks != (1, 1) and self.to != "megatron-legacy":
            raise ValueError(f"--to {self.to} is read at any parallelism; leave out --tp and --pp")
        sizes = {"kv_heads": model.kv_heads, "mlp_width": model.mlp_width, "vocab_size": model.vocab_size}
        for name, size, shards in (
            *((name, size, tensor) for name, size in sizes.items()),
            ("layers", model.layers, stages),
        ):
            if shards < 1 or size % shards:
                fitting = [n for n in range(1, size + 1) if size % n == 0 and n <= 64]
                raise ValueError(f"the model's {name} {size} do not divide into {shards}; {fitting} do")

    @property
    def warnings(self) -> list[str]:
        """Sentences about what programs that read the format compute otherwise than this one."""
        after_norm = self.adapter.unmergeable_targets
        if self.to == "peft" and after_norm:
            return [
                f"the adapter of {' and '.join(after_norm)} was trained to be added after the post-norm "
                "(adapter.after_norm), and PEFT adds it before: the tensors are the same, the logits are not. Run it "
                "with python -m gemma2_jax.generate, or train one without after_norm for PEFT"
            ]
        targets = table.match_targets(self.adapter)
        before_norm = [name for name in ("attn/o", "mlp/down") if name in targets and not self.adapter.after_norm]
        if self.to == "megatron-adapter" and before_norm:
            return [
                f"the adapter of {' and '.join(before_norm)} was trained to be added before the post-norm, and "
                "Megatron-Bridge adds it after: the tensors are the same, the logits are not. Merge it (--merge --to "
                "megatron), or train one with adapter.after_norm for Megatron-Bridge"
            ]
        return []

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter that is written as one, which a merged adapter is not."""
        return AdapterConfig() if self.merge else self.source.adapter

    @cached_property
    def groups(self) -> dict[str, tuple[Row, ...]]:
        """The rows of the weights and those of the adapter, as far as they are written; Orbax has a folder for each."""
        adapter_rows = table.table_rows(self.adapter)
        adapter = {"adapter": adapter_rows} if adapter_rows else {}
        return adapter if self.to in _ADAPTER_FORMATS else {"weights": table.MODEL} | adapter

    @cached_property
    def shapes(self) -> Abstract:
        """The shape of every array, and the dtype that it is written in."""
        stored = self.source.shapes
        hf = self.source.hf or {}
        start_dtype = hf.get("dtype") or hf.get("torch_dtype")
        fully_trained = self.source.format == "run" and self.source.adapter.kind == "none"
        dtype = self.dtype or (start_dtype if fully_trained else None)
        paths = {row.name: row.path for rows in self.groups.values() for row in rows}
        shapes = {
            path: jax.ShapeDtypeStruct(stored[path].shape, dtype or stored[path].dtype) for path in paths.values()
        }
        if self.to.startswith("megatron"):  # a fused tensor has one dtype, which holds the values of all its parts
            for fused in (*megatron.MODEL, *megatron.written_adapter(self.adapter, canonical=False)):
                parts = [shapes[paths[name]] for name in fused.parts if name in paths]
                for name in fused.parts if len(parts) > 1 else ():
                    shapes[paths[name]] = shapes[paths[name]].update(dtype=jnp.result_type(*parts))
        return shapes

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        copies = ["embedding"] if self.ranks[1] > 1 else []  # the last pipeline stage has it too
        return sum(_byte_count(self.shapes[path]) for path in [*self.shapes, *copies])

    def parts(self, rows: tuple[Row, ...]) -> Iterator[Part]:
        """The parts of the arrays of these rows, in order."""
        for row in rows:
            want = self.shapes[row.path]
            step = 1 if row.stacked else orbax.rows_at_once(want, stacked=False)
            for start in range(0, want.shape[0], step):
                stop = min(start + step, want.shape[0])
                yield Part(row, (slice(start, stop), *[slice(None)] * (len(want.shape) - 1)))

    def array_part(self, part: Part) -> np.ndarray:
        """A part in our layout and in the dtype that is written, merged if asked for; its order in memory is any."""
        row = part.row
        projection = row.path.removeprefix("blocks/").removesuffix("/w")
        if self.merge and projection in table.match_targets(self.source.adapter):
            return self._merged_part(projection, part)
        return read_array(self.source, row.path, part.index).astype(self.shapes[row.path].dtype, copy=False)

    def tensor_part(self, part: Part) -> np.ndarray:
        """A part as Hugging Face's or PEFT's tensor of one layer, or as some rows of the tensor, in C order."""
        array = self.array_part(part)
        return contiguous_copy(part.row.to_tensor(array[0] if part.row.stacked else array))

    def tensor_shape(self, row: Row) -> jax.ShapeDtypeStruct:
        """The shape and the dtype of a row's tensor, which of a stacked row is that of one layer."""
        assert self.source.model is not None
        size = dims.dim_sizes(self.source.model, self.adapter.rank)
        shape = tuple(math.prod(size[letter] for letter in group) for group in row.groups)
        return jax.ShapeDtypeStruct(shape, self.shapes[row.path].dtype)

    def _merged_part(self, projection: str, part: Part) -> np.ndarray:
        stored = self.source.shapes
        adapter_paths = {variable: row.path for variable, row in table.adapter_rows(projection).items()}
        paths = {variable: path for variable, path in {"w": part.row.path, **adapter_paths}.items() if path in stored}
        layers, *rest = part.index
        variables = {
            variable: contiguous_copy(
                read_array(self.source, path, (layers, *[slice(None)] * (len(stored[path].shape) - 1)))
            )
            for variable, path in paths.items()
        }
        merged = self._merge(projection, self.shapes[part.row.path].dtype, **variables)
        return np.asarray(merged)[(slice(None), *rest)]

    @cached_property
    def _merge(self) -> Callable:
        """`model.lora`'s merging of one projection, as a function of arrays: `merge(name, dtype, w=, a=, b=, m=)`."""
        assert self.source.model is not None
        skeleton = nnx.eval_shape(partial(_create_adapted, self.source.model, self.source.adapter))
        adapters = {name: projection.adapter for name, projection in lora.projections(skeleton).items()}

        @partial(jax.jit, static_argnums=(0, 1))
        def merge(name: str, dtype: np.dtype, w: jax.Array, **variables: jax.Array) -> jax.Array:
            adapter = adapters[name]
            assert isinstance(adapter, lora.Adapter)
            graph, _ = nnx.split(adapter)
            return nnx.merge(graph, nnx.State(variables)).merged_weight(w, dtype)

        return merge


def _create_adapted(model: ModelConfig, adapter: AdapterConfig) -> Gemma2:
    rngs = nnx.Rngs(0)
    gemma = Gemma2(model, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=rngs)
    lora.attach_adapters(gemma, adapter, rngs=rngs)
    return gemma


def write_checkpoint(job: Job, target: Path, progress: Progress = lambda size: None) -> None:
    """Writes what a job says into the folder `target`, which then exists whole, or not at all after an error.

    Raises ValueError where `target` holds something already or the disk has no room, and OSError where writing fails.
    """
    target = target.absolute()
    with atomic_folder(target, job.size) as partial_target:
        try:
            _write(partial_target, target, job, progress)
        except OSError as error:
            if error.filename is None:  # the error of a write does not name its file
                raise OSError(f"{target} could not be written: {error}") from error
            raise


def _write(folder: Path, target: Path, job: Job, progress: Progress) -> None:
    """Writes a job into `folder`, which is renamed to `target` afterwards."""
    source, model = job.source, job.source.model
    assert model is not None
    if job.to.startswith("megatron"):
        _write_megatron(folder, target, job, progress)
        return
    if job.to != "peft":
        dtype = job.shapes["embedding"].dtype.name
        safetensors.write_json(folder / "config.json", hf_config(model, dtype, source.hf))
    if job.adapter.kind != "none":
        config = peft_config(job.adapter, source.base, for_orbax=job.to == "orbax")
        safetensors.write_json(folder / "adapter_config.json", config)
    for name, rows in job.groups.items():
        if job.to == "orbax":
            _write_orbax(folder / name, job, rows, progress)
        else:
            _write_safetensors(folder, job, rows, progress)
    for companion in source.companions:
        copy_tokenizer(companion, folder)


def _write_safetensors(folder: Path, job: Job, rows: tuple[Row, ...], progress: Progress) -> None:
    assert job.source.model is not None
    wanted = {}
    for row in rows:
        wanted |= dict.fromkeys(row.names(job.source.model.layers), job.tensor_shape(row))
    parts = read_ahead(job.tensor_part, job.parts(rows))
    if job.to == "peft":  # PEFT reads one file only
        files = safetensors.ShardedFiles(folder, safetensors.ADAPTER, shard_bytes=sys.maxsize)
    else:
        files = safetensors.ShardedFiles(folder, safetensors.MODEL)
    safetensors.write_safetensors(files, wanted, parts, progress)


def _write_megatron(folder: Path, target: Path, job: Job, progress: Progress) -> None:
    """Writes a job into `folder`, which is renamed to `target` afterwards; run_config.yaml names the latter."""
    source, model = job.source, job.source.model
    assert model is not None
    iteration = folder / "iter_0000000"
    iteration.mkdir()
    dtype = next(iter(job.shapes.values())).dtype.name
    if job.to == "megatron-legacy":
        _write_legacy(iteration, job, dtype, progress)
    else:
        tokenizer = str(target / iteration.name / "tokenizer") if source.tokenizer else None
        adapter, fusings = None, megatron.MODEL
        if job.to == "megatron-adapter":
            canonical = not _is_fusable(job)
            adapter = megatron_config.SavedAdapter(job.adapter, source.base or None, canonical=canonical)
            fusings = megatron.written_adapter(job.adapter, canonical=canonical)
        run = megatron_config.run_config(model, dtype, adapter, tokenizer=tokenizer)
        with TorchDistWriter(iteration) as writer:
            _write_chunks(writer, job, fusings, progress)
            for name, content in megatron.extra_states(model.layers, fusings if adapter else ()):
                writer.object(name, content)
        (iteration / "run_config.yaml").write_text(megatron_config.to_yaml(run))
        safetensors.write_json(iteration / "metadata.json", megatron.BACKEND)
        for path, content in (
            (iteration / "common.pt", megatron_config.common_state()),
            (iteration / "train_state.pt", megatron_config.train_state()),
            (folder / "latest_train_state.pt", megatron_config.train_state()),
        ):
            with path.open("wb") as file:
                torch_files.save_torch(file, content)
    (folder / megatron.TRACKER).write_text("0")
    for companion in source.companions:
        (iteration / "tokenizer").mkdir(exist_ok=True)
        copy_tokenizer(companion, iteration / "tokenizer")


def _write_chunks(writer: TorchDistWriter, job: Job, fusings: tuple[megatron.Fused, ...], progress: Progress) -> None:
    model = job.source.model
    assert model is not None
    rows = {row.name: row for group in job.groups.values() for row in group}
    # Each fused tensor with the parts of its rows that are read together: a layer of q, of k and of v.
    fused_parts = [
        (fused, parts)
        for fused in fusings
        for parts in zip(*(list(job.parts((rows[name],))) for name in fused.parts), strict=True)
    ]
    stream = read_ahead(lambda item: [job.tensor_part(part) for part in item[1]], fused_parts)
    for (fused, parts), tensors in zip(fused_parts, stream, strict=True):
        # Gate and up are chunks of their own, as Megatron has them; a shared matrix is one chunk.
        separate = fused.rows == "halves" and not fused.rank_halves
        chunks = tensors if separate else [fused.fuse(tensors, model.kv_heads)]
        first, row = parts[0].index[0], 0
        for chunk in chunks:
            if fused.stacked:
                shape = (model.layers, sum(map(len, chunks)), *chunk.shape[1:])
                writer.chunk(fused.key, shape, (first.start, row, *(0,) * (chunk.ndim - 1)), chunk[None])
            else:
                shape = job.tensor_shape(parts[0].row).shape
                writer.chunk(fused.key, shape, (first.start, *(0,) * (chunk.ndim - 1)), chunk)
            row += len(chunk)
        progress(sum(tensor.nbytes for tensor in tensors))


def _is_fusable(job: Job) -> bool:
    """Whether projections that Megatron-Bridge fuses have one A. Raises ValueError where a DoRA's do not."""
    rows = {row.path: row for row in job.groups["adapter"]}

    def read_parts(path: str) -> Iterator[bytes]:
        return (job.array_part(part).tobytes() for part in job.parts((rows[path],)))

    for projections in megatron.shared_tensors(job.adapter):
        first, *others = (table.adapter_rows(name)["a"].path for name in projections)
        if rows.keys() >= {first, *others} and all(
            expected == part
            for path in others
            for expected, part in zip(read_parts(first), read_parts(path), strict=True)
        ):
            continue
        if job.adapter.kind == "dora":
            raise ValueError(
                f"{job.source.path} is a DoRA with an A of its own for each of {', '.join(projections)}, and "
                "Megatron-Bridge's has one for all of them; merge it (--merge --to megatron), or train a LoRA"
            )
        return False
    return True


@dataclass(frozen=True, eq=False)
class _RankShare:
    """The share that one tensor-parallel rank has of a tensor."""

    job: Job
    fused: megatron.Fused
    parts: tuple[Part, ...]
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.job.tensor_shape(part.row).shape for part in self.parts]
        shape = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if self.fused.rank_dim is not None:
            shape[self.fused.rank_dim] //= self.job.ranks[0]
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.job.tensor_shape(self.parts[0].row).dtype

    def load(self) -> np.ndarray:
        """Reads the share: an array of this shape and dtype in C order."""
        model, split = self.job.source.model, self.fused.rank_dim
        assert model is not None
        ranks = self.job.ranks[0]
        tensors = [self.job.tensor_part(part) for part in self.parts]
        if split is not None and self.fused.stacked:
            tensors = [np.split(tensor, ranks, split)[self.rank] for tensor in tensors]
        return self.fused.fuse(tensors, model.kv_heads // ranks)


@dataclass(frozen=True, eq=False)
class _QueuedTensor:
    """The next tensor of a queue, read when the file's writer asks for it. The writer takes tensors in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    queue: Iterator[np.ndarray]
    progress: Progress

    def read(self) -> np.ndarray:
        """Takes the tensor off the queue."""
        array = next(self.queue)
        self.progress(array.nbytes)
        return array


def _write_legacy(folder: Path, job: Job, dtype: DType, progress: Progress) -> None:
    model, (ranks, stages) = job.source.model, job.ranks
    assert model is not None
    args = megatron_config.megatron_args(model, dtype)
    args |= {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    for stage, rank in itertools.product(range(stages), range(ranks)):
        shares = {
            name: _RankShare(job, fused, _rank_parts(job, fused, layer, rank), rank)
            for fused, layer, name in megatron.rank_tensors(model, stages, stage)
        }
        queue = read_ahead(_RankShare.load, shares.values())
        state: dict[str, Any] = {
            name: _QueuedTensor(share.shape, share.dtype, queue, progress) for name, share in shares.items()
        }
        state |= megatron.rank_extra_states(model, stages, stage)
        content = {
            "args": Record("argparse.Namespace", state=args, new=True),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "model": state,
            "num_floating_point_operations_so_far": 0,
        }
        folder_name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if stages > 1 else "")
        (folder / folder_name).mkdir()
        with (folder / folder_name / megatron.RANK_FILE).open("wb") as file:
            reserve_disk(file, sum(math.prod(share.shape) * share.dtype.itemsize for share in shares.values()))
            torch_files.save_torch(file, content)


def _rank_parts(job: Job, fused: megatron.Fused, layer: int, rank: int) -> tuple[Part, ...]:
    """The parts to read for one rank's share of a tensor: its rows of the embedding, and the whole of a layer's."""
    rows, parts = {row.name: row for row in table.MODEL}, []
    for name in fused.parts:
        size, *rest = job.shapes[rows[name].path].shape
        if fused.stacked:
            span = slice(layer, layer + 1)
        elif fused.rank_dim == 0:
            span = slice(rank * size // job.ranks[0], (rank + 1) * size // job.ranks[0])
        else:
            span = slice(0, size)
        parts.append(Part(rows[name], (span, *[slice(None)] * len(rest))))
    return tuple(parts)


def _write_orbax(folder: Path, job: Job, rows: tuple[Row, ...], progress: Progress) -> None:
    writer = orbax.Writer(folder, {row.path: job.shapes[row.path] for row in rows})
    arrays = read_ahead(lambda part: contiguous_copy(job.array_part(part)), job.parts(rows))
    for part, array in zip(job.parts(rows), arrays, strict=True):
        writer.write(part.row.path, part.index, array)
        progress(array.nbytes)


def read_ahead[X, Y](function: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """Yields `function` of each item in order, and runs ahead in another thread by a few items."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Y]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _byte_count(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
