"""Arrays by our paths, read in slices from tensors that have other names, or from an Orbax checkpoint of our arrays.

`opening` decides which of the two a folder is, and which rows of `formats.table` apply.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from gemma2_jax import dims
from gemma2_jax.convert.files import orbax, safetensors
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.files.tensors import Tensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.dims import Abstract
from gemma2_jax.model_config import ModelConfig

EMBEDDING = "embedding"  # the path of it
_BLOCK_BYTES = 8 << 20  # of rows that are read at once, where they are transposed: few enough to stay in the cache


class Source(Protocol):
    """A store of arrays by our paths, such as blocks/attn/q/w, in our layouts."""

    @property
    def shapes(self) -> Abstract:
        """The shape and the stored dtype of every array."""
        ...

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slices `index` of an array, cast to `dtype`, on the host; not necessarily C-contiguous."""
        ...

    def stored_rows(self, path: str) -> tuple[int, int]:
        """The dim of an array or of a stack's layers whose rows lie one after another, and how many to read at once."""
        ...


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Tensors with Hugging Face's or PEFT's names, stacked and laid out as our arrays while they are read."""

    rows: dict[str, Row]
    model: ModelConfig
    tensors: Tensors
    shapes: Abstract

    @classmethod
    def open(cls, folder: Path, tensors: Tensors, rows: tuple[Row, ...], model: ModelConfig):
        named = {name: shape for name, shape in tensors.shapes.items() if name != table.HEAD}
        table.claim_tensors(table.tensor_shapes(rows, model), named, folder)
        for name in named:
            safetensors.check_dtype(tensors.dtypes[name], f"{folder}: {name}")
        shapes: Abstract = {}
        for row in rows:
            dtype = jnp.result_type(*(tensors.dtypes[name] for name in row.names(model.layers)))
            shapes[row.path] = jax.ShapeDtypeStruct(dims.weight_shape(row.letters, model, row.rank), dtype)
        by_path = {row.path: row for row in rows}
        return cls(rows=by_path, model=model, tensors=tensors, shapes=shapes)

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        row = self.rows[path]
        return row.read_array(dims.dim_sizes(self.model, row.rank), dtype, self.tensors.read, index)

    def stored_rows(self, path: str) -> tuple[int, int]:
        row, stored = self.rows[path], self.shapes[path]
        dim = row.letters.index(row.groups[0][0])
        row_bytes = stored.size * stored.dtype.itemsize // (stored.shape[dim] * (stored.shape[0] if row.stacked else 1))
        return dim, max(1, _BLOCK_BYTES // row_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightTensor:
    """A weight as Hugging Face's tensor, read from any source: one layer of a stack, or an array without layers."""

    source: Source
    model: ModelConfig
    row: Row
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return table.tensor_shape(self.row, self.model)

    @property
    def dtype(self) -> np.dtype:
        return self.source.shapes[self.row.path].dtype

    def read(self, index: Index) -> np.ndarray:
        if self.layer is None:  # arrays that are not stacked have the tensor's layout
            return self.source.read(self.row.path, index, self.dtype)
        layer = slice(self.layer, self.layer + 1), *[slice(None)] * (len(self.row.letters) - 1)
        return self.row.to_tensor(self.source.read(self.row.path, layer, self.dtype)[0])[index]


@dataclass(frozen=True, kw_only=True)
class GrownEmbedding:
    """The embedding of a source with more rows, each of which is the mean of those stored: see `load_weights`."""

    source: Source
    rows: int

    @property
    def shapes(self) -> Abstract:
        stored = self.source.shapes[EMBEDDING]
        return {EMBEDDING: stored.update(shape=(self.rows, *stored.shape[1:]))}

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        rows, stored = range(self.rows)[index[0]], self.source.shapes[path].shape[0]
        known = slice(rows.start, min(rows.stop, stored))
        part = [self.source.read(path, (known, index[1]), dtype)] if known.start < known.stop else []
        added = rows.stop - max(rows.start, stored)
        if added > 0:
            part.append(
                np.broadcast_to(self._mean_row[index[1]].astype(dtype), (added, *self._mean_row[index[1]].shape))
            )
        return np.concatenate(part) if len(part) > 1 else part[0]

    @cached_property
    def _mean_row(self) -> np.ndarray:
        return _mean_row(self.source, EMBEDDING)

    def stored_rows(self, path: str) -> tuple[int, int]:
        return self.source.stored_rows(path)


@dataclass(frozen=True, kw_only=True)
class OrbaxSource:
    """An Orbax checkpoint of a nested dict of our arrays."""

    reader: orbax.Reader
    shapes: Abstract

    @classmethod
    def open(cls, folder: Path, rows: tuple[Row, ...], model: ModelConfig, *, of_run: bool = False):
        reader, expected = orbax.Reader(folder), table.array_shapes(rows, model)
        shapes = dict(reader.shapes)
        if of_run:  # a run's stacks may end in layers of zeros, which fill up the last pipeline stage
            for path, shape in expected.items():
                if path.startswith("blocks/") and path in shapes and shapes[path].shape > shape:
                    shapes[path] = shapes[path].update(shape=(shape[0], *shapes[path].shape[1:]))
        table.claim_tensors(expected, {path: stored.shape for path, stored in shapes.items()}, folder)
        for path, stored in shapes.items():
            safetensors.check_dtype(stored.dtype, f"{folder}: {path}")
        return cls(reader=reader, shapes=shapes)

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        # Slices are counted in the shape given here, as the stored stack of a run may be longer.
        spans = tuple(range(size)[span] for size, span in zip(self.shapes[path].shape, index, strict=True))
        return self.reader.read(path, tuple(slice(span.start, span.stop) for span in spans)).astype(dtype, copy=False)

    def stored_rows(self, path: str) -> tuple[int, int]:
        dim = int(path.startswith("blocks/"))
        return dim, self.reader.chunk(path)[dim]


def load_array(source: Source, path: str, want: jax.ShapeDtypeStruct) -> jax.Array:
    """An array in the shape, dtype and sharding of `want`, with what `checkpoints.load_weights` says after its end."""
    stored_shape = source.shapes[path].shape

    @cache
    def added_row() -> np.ndarray:
        return _mean_row(source, path) if path == "embedding" else np.broadcast_to(0, stored_shape[1:])

    @cache  # devices that hold copies of a slice ask for it once each
    def read_slice(index: Index):
        rows, *rest = (range(size)[span] for size, span in zip(want.shape, index, strict=True))
        spans = tuple(slice(span.start, span.stop) for span in rest)
        count = len(range(stored_shape[0])[index[0]])
        if count == len(rows):
            return source.read(path, (slice(rows.start, rows.stop), *spans), want.dtype)
        array = np.empty((len(rows), *map(len, rest)), want.dtype)
        for part in _row_parts(source.shapes[path], rows.start, rows.start + count):  # so that it is not there twice
            array[part.start - rows.start : part.stop - rows.start] = source.read(path, (part, *spans), want.dtype)
        array[count:] = added_row()[spans]
        return array

    sharding = want.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(want.shape, sharding, read_slice)


def _mean_row(source: Source, path: str) -> np.ndarray:
    """The mean of all rows of an array, float64 [D]."""
    stored = source.shapes[path]
    total = np.zeros(stored.shape[1:])
    for part in _row_parts(stored, 0, stored.shape[0]):
        total += source.read(path, (part, *[slice(None)] * total.ndim), np.dtype(np.float32)).sum(0, dtype=np.float64)
    return total / stored.shape[0]


def _row_parts(stored: jax.ShapeDtypeStruct, start: int, stop: int) -> Iterator[slice]:
    """The rows from `start` to `stop` in parts that are read at a time."""
    step = orbax.rows_at_once(stored, stacked=False)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
