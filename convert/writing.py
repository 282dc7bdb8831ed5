"""Writes a checkpoint in one of three formats, a layer's matrix at a time; the folder appears whole or not at all.

What the source is and how its arrays are read is `checkpoints`'; merging is `lora`'s arithmetic. While a part is
written the next ones are read: in memory are a few parts, of which the largest is a matrix of a layer, or as many rows
of the embedding as make up `arrays.CHUNK_BYTES`.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from gemma2_jax import dims, lora
from gemma2_jax.config import AdapterConfig, ComputeConfig, DType, ModelConfig
from gemma2_jax.convert import arrays, folder, table, tensors
from gemma2_jax.convert.checkpoints import Abstract, Checkpoint, read
from gemma2_jax.convert.copying import contiguous
from gemma2_jax.convert.hf_config import hf_config
from gemma2_jax.convert.peft_config import peft_config
from gemma2_jax.convert.table import Row
from gemma2_jax.model import Gemma2

Format = Literal["orbax", "hf", "peft"]
Part = tuple[Row, table.Index]
_AHEAD = 2  # parts that are read before they are written


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, decided before a byte is."""

    source: Checkpoint
    to: Format
    merge: bool = False  # add the adapter into the weights
    dtype: DType | None = None  # None: as stored, or as the weights were that a full training run started from

    def __post_init__(self) -> None:
        adapted = self.source.adapter.kind != "none"
        if self.source.model is None:
            raise ValueError(
                f"{self.source.path} is an adapter to {self.source.base or 'a model it does not name'}, which is not a "
                "folder here; give that model as SRC, and this as --adapter"
            )
        if (self.merge or self.to == "peft") and not adapted:
            raise ValueError(f"{self.source.path} has no adapter; leave out --merge, or use --to hf or --to orbax")
        if self.to == "peft" and self.merge:
            raise ValueError("--to peft writes the adapter alone and --merge dissolves it; choose one of the two")
        if self.to == "hf" and adapted and not self.merge:
            raise ValueError(
                f"{self.source.path} has an adapter, which a Hugging Face model has no place for; "
                "choose --merge for one model, or --to peft for the adapter alone"
            )

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter that is still one when written."""
        return AdapterConfig() if self.merge else self.source.adapter

    @cached_property
    def groups(self) -> dict[str, tuple[Row, ...]]:
        """The rows that are written together."""
        adapter = {"adapter": table.rows(self.adapter)}
        return adapter if self.to == "peft" else {"weights": table.MODEL} | (adapter if adapter["adapter"] else {})

    @cached_property
    def shapes(self) -> Abstract:
        """Every array in the dtype it is written in."""
        stored = self.source.shapes
        hf = self.source.hf or {}
        started = hf.get("dtype") or hf.get("torch_dtype")
        trained_whole = self.source.format == "run" and self.source.adapter.kind == "none"
        dtype = self.dtype or (started if trained_whole else None)
        paths = [row.path for rows in self.groups.values() for row in rows]
        return {path: jax.ShapeDtypeStruct(stored[path].shape, dtype or stored[path].dtype) for path in paths}

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(_bytes(shape) for shape in self.shapes.values())

    def parts(self, rows: tuple[Row, ...]) -> Iterator[Part]:
        """What is read and written at a time: of stacked rows a layer, of others some rows."""
        for row in rows:
            want = self.shapes[row.path]
            step = 1 if row.stacked else arrays.rows_at_once(want, stacked=False)
            for at in range(0, want.shape[0], step):
                last = min(at + step, want.shape[0])
                yield row, (slice(at, last), *[slice(None)] * (len(want.shape) - 1))

    def part(self, row: Row, index: table.Index) -> np.ndarray:
        """A part of an array as it is written, merged if that is asked for, in whatever order in memory."""
        projection = row.path.removeprefix("blocks/").removesuffix("/w")
        if self.merge and projection in table.targets(self.source.adapter):
            return self._merged(projection, row.path, index)
        return read(self.source, row.path, index).astype(self.shapes[row.path].dtype, copy=False)

    def _merged(self, projection: str, path: str, index: table.Index) -> np.ndarray:
        rows = {part: row.path for part, row in table.adapter_rows(projection).items()}
        paths = {part: at for part, at in {"w": path, **rows}.items() if at in self.source.shapes}
        layers = {
            part: (index[0], *[slice(None)] * (len(self.source.shapes[at].shape) - 1)) for part, at in paths.items()
        }
        held = {part: contiguous(read(self.source, at, layers[part])) for part, at in paths.items()}
        return np.asarray(self._merge(projection, self.shapes[path].dtype, **held))[(slice(None), *index[1:])]

    @cached_property
    def _merge(self) -> Callable:
        """lora's merge of one projection, on arrays: `merge(name, dtype, w=, a=, b=, m=)`."""
        assert self.source.model is not None
        skeleton = nnx.eval_shape(partial(_adapted, self.source.model, self.source.adapter))
        found = {name: base.adapter for name, base in lora.projections(skeleton).items()}

        @partial(jax.jit, static_argnums=(0, 1))
        def merge(name: str, dtype: np.dtype, w: jax.Array, **variables: jax.Array) -> jax.Array:
            adapter = found[name]
            assert isinstance(adapter, lora.Adapter)
            graph, _ = nnx.split(adapter)
            return nnx.merge(graph, nnx.State(variables)).merged(w, dtype)

        return merge


def _adapted(model: ModelConfig, adapter: AdapterConfig) -> Gemma2:
    rngs = nnx.Rngs(0)
    gemma = Gemma2(model, ComputeConfig(), rngs=rngs)
    lora.attach(gemma, adapter, rngs=rngs)
    return gemma


def write(job: Job, target: Path, moved: Callable[[float], None] = lambda size: None) -> None:
    """Carries out a job; `moved` is told of the bytes that are written.

    Raises ValueError where `target` holds something already, or the disk has no room.
    """
    source, model, target = job.source, job.source.model, target.absolute()
    assert model is not None
    with folder.appearing(target, job.size) as partial_target:
        if job.to != "peft":
            dtype = job.shapes["embedding"].dtype.name
            tensors.write_json(partial_target / "config.json", hf_config(model, dtype, source.hf))
        if job.adapter.kind != "none":
            tensors.write_json(partial_target / "adapter_config.json", peft_config(job.adapter, source.base))
        for name, rows in job.groups.items():
            if job.to == "orbax":
                _write_orbax(partial_target / name, job, rows, moved)
            else:
                _write_safetensors(partial_target, job, rows, moved)
        for beside in source.beside:
            folder.carry(beside, partial_target)


def _write_safetensors(target: Path, job: Job, rows: tuple[Row, ...], moved: Callable[[float], None]) -> None:
    assert job.source.model is not None
    layers, size = job.source.model.layers, dims.sizes(job.source.model, job.adapter.rank)
    wanted = {}
    for row in rows:
        shape = tuple(math.prod(size[letter] for letter in group) for group in row.groups)
        wanted |= dict.fromkeys(row.names(layers), jax.ShapeDtypeStruct(shape, job.shapes[row.path].dtype))

    def theirs(part: Part) -> np.ndarray:
        ours = job.part(*part)
        return contiguous(part[0].theirs(ours[0] if part[0].stacked else ours))

    stream = ahead(theirs, job.parts(rows))
    if job.to == "peft":  # which reads one file only
        tensors.write(target, tensors.ADAPTER, wanted, stream, moved, shard_bytes=sys.maxsize)
    else:
        tensors.write(target, tensors.MODEL, wanted, stream, moved)


def _write_orbax(target: Path, job: Job, rows: tuple[Row, ...], moved: Callable[[float], None]) -> None:
    writer = arrays.Writer(target, {row.path: job.shapes[row.path] for row in rows})
    stream = ahead(lambda part: contiguous(job.part(*part)), job.parts(rows))
    for (row, index), part in zip(job.parts(rows), stream, strict=True):
        writer.write(row.path, index, part)
        moved(part.nbytes)


def ahead[X, Y](function: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
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
