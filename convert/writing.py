"""Writes a checkpoint in any of the formats, a layer's matrix at a time; the folder appears whole or not at all.

What the source is and how its arrays are read is `checkpoints`'; merging is `lora`'s arithmetic. While a part is
written the next ones are read: in memory are a few parts, of which the largest is a matrix of a layer, or as many rows
of the embedding as make up a chunk of `arrays`.
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
from gemma2_jax.convert.files import folder, orbax as arrays, safetensors as tensors, torch_files
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
_ADAPTER_ALONE = ("peft", "megatron-adapter")
Part = tuple[Row, Index]
_AHEAD = 2  # parts that are read before they are written


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, decided before a byte is."""

    source: Checkpoint
    to: Format
    merge: bool = False  # add the adapter into the weights
    ranks: tuple[int, int] = (1, 1)  # of megatron-legacy: tensor-parallel ranks and pipeline stages to write files for
    dtype: DType | None = None  # None: as stored, or as the weights were that a full training run started from

    def __post_init__(self) -> None:
        self._check_base()
        adapted = self.source.adapter.kind != "none"
        if self.to in _ADAPTER_ALONE and not adapted:
            whole_format = "hf" if self.to == "peft" else "megatron"
            reason = (
                "trained the whole weights, so there is no adapter to write"
                if self.source.format == "run"
                else f"has no adapter, and --to {self.to} writes nothing else"
            )
            raise ValueError(f"{self.source.path} {reason}; write its weights with --to {whole_format}")
        if self.merge and not adapted:
            raise ValueError(f"{self.source.path} has no adapter; leave out --merge")
        if self.to in _ADAPTER_ALONE and self.merge:
            raise ValueError(f"--to {self.to} writes the adapter alone and --merge dissolves it; choose one of the two")
        whole = self.to in ("hf", "megatron", "megatron-legacy")
        if self.merge or whole:
            lora.check_mergeable(self.source.adapter.unmergeable_targets)
        if whole and adapted and not self.merge:
            alone = "peft" if self.to == "hf" else "megatron-adapter"
            raise ValueError(
                f"{self.source.path} has an adapter, which --to {self.to} has no place for; "
                f"choose --merge for one model, or --to {alone} for the adapter alone"
            )
        assert self.source.model is not None
        self._check_ranks(self.source.model)

    def _check_base(self) -> None:
        """Raises ValueError where the source is an adapter alone and the format needs its model, or its model's config.

        This comes before anything else is said of the adapter.
        """
        source = self.source
        if self.to not in _ADAPTER_ALONE and source.lacks_base:
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
        """What the reader of the format will take for something else: sentences."""
        apart, targets = self.adapter.unmergeable_targets, table.match_targets(self.adapter)
        if self.to == "peft" and apart:
            return [
                f"the adapter of {' and '.join(apart)} was trained to be added after the post-norm "
                "(adapter.after_norm), and PEFT adds it before: the tensors are the same, the logits are not. Run it "
                "with python -m gemma2_jax.generate, or train one without after_norm for PEFT"
            ]
        inside = [name for name in ("attn/o", "mlp/down") if name in targets and not self.adapter.after_norm]
        if self.to == "megatron-adapter" and inside:
            return [
                f"the adapter of {' and '.join(inside)} was trained to be added before the post-norm, and "
                "Megatron-Bridge adds it after: the tensors are the same, the logits are not. Merge it (--merge --to "
                "megatron), or train one with adapter.after_norm for Megatron-Bridge"
            ]
        return []

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter that is still one when written."""
        return AdapterConfig() if self.merge else self.source.adapter

    @cached_property
    def groups(self) -> dict[str, tuple[Row, ...]]:
        """The rows that are written together."""
        adapter = {"adapter": table.table_rows(self.adapter)}
        alone = self.to in _ADAPTER_ALONE
        return adapter if alone else {"weights": table.MODEL} | (adapter if adapter["adapter"] else {})

    @cached_property
    def shapes(self) -> Abstract:
        """Every array in the dtype it is written in."""
        stored = self.source.shapes
        hf = self.source.hf or {}
        started = hf.get("dtype") or hf.get("torch_dtype")
        trained_whole = self.source.format == "run" and self.source.adapter.kind == "none"
        dtype = self.dtype or (started if trained_whole else None)
        paths = {row.name: row.path for rows in self.groups.values() for row in rows}
        shapes = {
            path: jax.ShapeDtypeStruct(stored[path].shape, dtype or stored[path].dtype) for path in paths.values()
        }
        if self.to.startswith("megatron"):  # a fused tensor has one dtype, in which no part of it loses anything
            for fused in (*megatron.MODEL, *megatron.written_adapter(self.adapter, canonical=False)):
                parts = [shapes[paths[name]] for name in fused.parts if name in paths]
                for name in fused.parts if len(parts) > 1 else ():
                    shapes[paths[name]] = shapes[paths[name]].update(dtype=jnp.result_type(*parts))
        return shapes

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        twice = ["embedding"] if self.ranks[1] > 1 else []  # the last stage has it too
        return sum(_bytes(self.shapes[path]) for path in [*self.shapes, *twice])

    def parts(self, rows: tuple[Row, ...]) -> Iterator[Part]:
        """What is read and written at a time: of stacked rows a layer, of others some rows."""
        for row in rows:
            want = self.shapes[row.path]
            step = 1 if row.stacked else arrays.rows_at_once(want, stacked=False)
            for at in range(0, want.shape[0], step):
                last = min(at + step, want.shape[0])
                yield row, (slice(at, last), *[slice(None)] * (len(want.shape) - 1))

    def part(self, row: Row, index: Index) -> np.ndarray:
        """A part of an array as it is written, merged if that is asked for, in whatever order in memory."""
        projection = row.path.removeprefix("blocks/").removesuffix("/w")
        if self.merge and projection in table.match_targets(self.source.adapter):
            return self._merged(projection, row.path, index)
        return read_array(self.source, row.path, index).astype(self.shapes[row.path].dtype, copy=False)

    def theirs(self, row: Row, index: Index) -> np.ndarray:
        """A part as Hugging Face's or PEFT's tensor: of one layer, or some rows of it."""
        ours = self.part(row, index)
        return contiguous_copy(row.theirs(ours[0] if row.stacked else ours))

    def their_shape(self, row: Row) -> jax.ShapeDtypeStruct:
        """Their tensor, of one layer if stacked."""
        assert self.source.model is not None
        size = dims.dim_sizes(self.source.model, self.adapter.rank)
        shape = tuple(math.prod(size[letter] for letter in group) for group in row.groups)
        return jax.ShapeDtypeStruct(shape, self.shapes[row.path].dtype)

    def _merged(self, projection: str, path: str, index: Index) -> np.ndarray:
        rows = {part: row.path for part, row in table.adapter_rows(projection).items()}
        paths = {part: at for part, at in {"w": path, **rows}.items() if at in self.source.shapes}
        layers = {
            part: (index[0], *[slice(None)] * (len(self.source.shapes[at].shape) - 1)) for part, at in paths.items()
        }
        held = {part: contiguous_copy(read_array(self.source, at, layers[part])) for part, at in paths.items()}
        return np.asarray(self._merge(projection, self.shapes[path].dtype, **held))[(slice(None), *index[1:])]

    @cached_property
    def _merge(self) -> Callable:
        """lora's merge of one projection, on arrays: `merge(name, dtype, w=, a=, b=, m=)`."""
        assert self.source.model is not None
        skeleton = nnx.eval_shape(partial(_write_adapted, self.source.model, self.source.adapter))
        found = {name: base.adapter for name, base in lora.projections(skeleton).items()}

        @partial(jax.jit, static_argnums=(0, 1))
        def merge(name: str, dtype: np.dtype, w: jax.Array, **variables: jax.Array) -> jax.Array:
            adapter = found[name]
            assert isinstance(adapter, lora.Adapter)
            graph, _ = nnx.split(adapter)
            return nnx.merge(graph, nnx.State(variables)).merged_weight(w, dtype)

        return merge


def _write_adapted(model: ModelConfig, adapter: AdapterConfig) -> Gemma2:
    rngs = nnx.Rngs(0)
    gemma = Gemma2(model, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=rngs)
    lora.attach_adapters(gemma, adapter, rngs=rngs)
    return gemma


def write_checkpoint(job: Job, target: Path, moved: Callable[[float], None] = lambda size: None) -> None:
    """Carries out a job; `moved` is told of the bytes that are written.

    Raises ValueError where `target` holds something already, or the disk has no room.
    """
    target = target.absolute()
    with folder.atomic_folder(target, job.size) as partial_target:
        try:
            _write(partial_target, target, job, moved)
        except OSError as error:
            if error.filename is None:  # a write's, which does not say of what
                raise OSError(f"{target} could not be written: {error}") from error
            raise


def _write(at: Path, final: Path, job: Job, moved: Callable[[float], None]) -> None:
    source, model = job.source, job.source.model
    assert model is not None
    if job.to.startswith("megatron"):
        _write_megatron(at, final, job, moved)
        return
    if job.to != "peft":
        dtype = job.shapes["embedding"].dtype.name
        tensors.write_json(at / "config.json", hf_config(model, dtype, source.hf))
    if job.adapter.kind != "none":
        config = peft_config(job.adapter, source.base, ours=job.to == "orbax")
        tensors.write_json(at / "adapter_config.json", config)
    for name, rows in job.groups.items():
        if job.to == "orbax":
            _write_orbax(at / name, job, rows, moved)
        else:
            _write_safetensors(at, job, rows, moved)
    for beside in source.beside:
        folder.copy_tokenizer(beside, at)


def _write_safetensors(target: Path, job: Job, rows: tuple[Row, ...], moved: Callable[[float], None]) -> None:
    assert job.source.model is not None
    wanted = {}
    for row in rows:
        wanted |= dict.fromkeys(row.names(job.source.model.layers), job.their_shape(row))
    stream = read_ahead(lambda part: job.theirs(*part), job.parts(rows))
    if job.to == "peft":  # which reads one file only
        tensors.write_safetensors(target, tensors.ADAPTER, wanted, stream, moved, shard_bytes=sys.maxsize)
    else:
        tensors.write_safetensors(target, tensors.MODEL, wanted, stream, moved)


def _write_megatron(target: Path, final: Path, job: Job, moved: Callable[[float], None]) -> None:
    source, model = job.source, job.source.model
    assert model is not None
    at = target / "iter_0000000"
    at.mkdir()
    dtype = next(iter(job.shapes.values())).dtype.name
    if job.to == "megatron-legacy":
        _write_legacy(at, job, dtype, moved)
    else:
        tokenizer = str(final / at.name / "tokenizer") if source.tokenizer else None
        adapter, base, canonical, fusings = None, None, False, megatron.MODEL
        if job.to == "megatron-adapter":
            adapter, base, canonical = job.adapter, source.base or None, not _fusable(job)
            fusings = megatron.written_adapter(adapter, canonical=canonical)
        run = megatron_config.run_config(model, dtype, adapter, base, canonical=canonical, tokenizer=tokenizer)
        with TorchDistWriter(at) as writer:
            _write_chunks(writer, job, fusings, moved)
            for name, content in megatron.extra_states(model.layers, fusings if adapter else ()):
                writer.object(name, content)
        (at / "run_config.yaml").write_text(megatron_config.to_yaml(run))
        tensors.write_json(at / "metadata.json", megatron.BACKEND)
        for path, content in (
            (at / "common.pt", megatron_config.common_state()),
            (at / "train_state.pt", megatron_config.train_state()),
            (target / "latest_train_state.pt", megatron_config.train_state()),
        ):
            with path.open("wb") as file:
                torch_files.save_torch(file, content)
    (target / megatron.TRACKER).write_text("0")
    for beside in source.beside:
        (at / "tokenizer").mkdir(exist_ok=True)
        folder.copy_tokenizer(beside, at / "tokenizer")


def _write_chunks(
    writer: TorchDistWriter, job: Job, fusings: tuple[megatron.Fused, ...], moved: Callable[[float], None]
) -> None:
    model = job.source.model
    assert model is not None
    rows = {row.name: row for group in job.groups.values() for row in group}
    parts = [
        (fused, indices)
        for fused in fusings
        for indices in zip(*(list(job.parts((rows[name],))) for name in fused.parts), strict=True)
    ]
    stream = read_ahead(lambda part: [job.theirs(*one) for one in part[1]], parts)
    for (fused, indices), found in zip(parts, stream, strict=True):
        # Gate and up are chunks of their own, as Megatron has them; a shared matrix is one.
        chunks = found if fused.rows == "halves" and not fused.gathered else [fused.join(found, model.kv_heads)]
        (_, (first, *_)), at = indices[0], 0
        for chunk in chunks:
            if fused.stacked:
                shape = (model.layers, sum(map(len, chunks)), *chunk.shape[1:])
                writer.chunk(fused.key, shape, (first.start, at, *(0,) * (chunk.ndim - 1)), chunk[None])
            else:
                shape = job.their_shape(indices[0][0]).shape
                writer.chunk(fused.key, shape, (first.start, *(0,) * (chunk.ndim - 1)), chunk)
            at += len(chunk)
        moved(sum(part.nbytes for part in found))


def _fusable(job: Job) -> bool:
    """Whether projections that Megatron-Bridge fuses have one A. Raises ValueError where a DoRA's do not."""
    rows = {row.path: row for row in job.groups["adapter"]}

    def whole(path: str) -> Iterator[bytes]:
        return (job.part(*part).tobytes() for part in job.parts((rows[path],)))

    for together in megatron.shared_tensors(job.adapter):
        first, *others = (table.adapter_rows(name)["a"].path for name in together)
        if rows.keys() >= {first, *others} and all(
            one == other for path in others for one, other in zip(whole(first), whole(path), strict=True)
        ):
            continue
        if job.adapter.kind == "dora":
            raise ValueError(
                f"{job.source.path} is a DoRA with an A of its own for each of {', '.join(together)}, and "
                "Megatron-Bridge's has one for all of them; merge it (--merge --to megatron), or train a LoRA"
            )
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Share:
    """What one rank has of a tensor."""

    job: Job
    fused: megatron.Fused
    parts: tuple[Part, ...]
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.job.their_shape(row).shape for row, _ in self.parts]
        shape = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if self.fused.split is not None:
            shape[self.fused.split] //= self.job.ranks[0]
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.job.their_shape(self.parts[0][0]).dtype

    def load(self) -> np.ndarray:
        """Reads it."""
        model, split = self.job.source.model, self.fused.split
        assert model is not None
        ranks = self.job.ranks[0]
        found = [self.job.theirs(*part) for part in self.parts]
        if split is not None and self.fused.stacked:
            found = [np.split(part, ranks, split)[self.rank] for part in found]
        return self.fused.join(found, model.kv_heads // ranks)


@dataclass(frozen=True, eq=False)
class _Queued:
    """A tensor of a file that is read when the file's writer comes to it, which takes them in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    queue: Iterator[np.ndarray]
    moved: Callable[[float], None]

    def read(self) -> np.ndarray:
        """Takes the next one."""
        array = next(self.queue)
        self.moved(array.nbytes)
        return array


def _write_legacy(target: Path, job: Job, dtype: DType, moved: Callable[[float], None]) -> None:
    model, (ranks, stages) = job.source.model, job.ranks
    assert model is not None
    rows = {row.name: row for row in table.MODEL}
    args = megatron_config.megatron_args(model, dtype)
    args |= {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}

    def part(fused: megatron.Fused, name: str, layer: int, rank: int) -> Part:
        row = rows[name]
        first, *rest = job.shapes[row.path].shape
        if not fused.stacked and fused.split == 0:  # whose rows can be told apart before they are read
            return row, (slice(rank * first // ranks, (rank + 1) * first // ranks), *[slice(None)] * len(rest))
        return row, (slice(layer, layer + 1) if fused.stacked else slice(0, first), *[slice(None)] * len(rest))

    for stage, rank in itertools.product(range(stages), range(ranks)):
        shares = {
            name: _Share(job, fused, tuple(part(fused, one, layer, rank) for one in fused.parts), rank)
            for fused, layer, name in megatron.rank_tensors(model, stages, stage)
        }
        queue = read_ahead(_Share.load, shares.values())
        state: dict[str, Any] = {
            name: _Queued(share.shape, share.dtype, queue, moved) for name, share in shares.items()
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
        (target / folder_name).mkdir()
        with (target / folder_name / megatron.RANK_FILE).open("wb") as file:
            reserve_disk(file, sum(math.prod(share.shape) * share.dtype.itemsize for share in shares.values()))
            torch_files.save_torch(file, content)


def _write_orbax(target: Path, job: Job, rows: tuple[Row, ...], moved: Callable[[float], None]) -> None:
    writer = arrays.Writer(target, {row.path: job.shapes[row.path] for row in rows})
    stream = read_ahead(lambda part: contiguous_copy(job.part(*part)), job.parts(rows))
    for (row, index), part in zip(job.parts(rows), stream, strict=True):
        writer.write(row.path, index, part)
        moved(part.nbytes)


def read_ahead[X, Y](function: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """`function` of each item, of some in another thread before they are asked for."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Y]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
