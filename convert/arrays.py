"""Orbax checkpoints by parts of arrays: read and written with TensorStore, which is what Orbax itself stores with.

Orbax's own calls move whole arrays, and of a 27B model one stack of layers is 15 GB. Checkpoints are written as Orbax
has them without OCDBT: an array a folder, in Zarr 2, uncompressed (weights hardly shrink), a chunk for a layer or for a
part of one. Zarr 3 would have checksums, with which reading took three times as long. Names of arrays are
`checkpoints`'.
"""

import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import unflatten_dict

from gemma2_jax.checkpoint import CHUNK_BYTES
from gemma2_jax.convert.copying import contiguous
from gemma2_jax.convert.table import Index


def rows_at_once(want: jax.ShapeDtypeStruct, stacked: bool) -> int:
    """How many rows of an array, or of each layer of a stack, make up a chunk."""
    dim = 1 if stacked else 0
    row = math.prod(want.shape[dim + 1 :]) * want.dtype.itemsize
    return max(1, min(want.shape[dim], CHUNK_BYTES // row))


class Reader:
    """The arrays of an Orbax checkpoint that any of its versions or settings has written."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        self._ocdbt = (folder / "manifest.ocdbt").is_file()
        self._stores: dict[str, ts.TensorStore] = {}
        self._held: dict[str, tuple[int, np.ndarray]] = {}

    def read(self, path: str, index: Index) -> np.ndarray:
        """A part of an array, as stored.

        Where a chunk holds more layers than are asked for, as a run's may, the last ones read are kept for the next
        call: three, as many as one tensor of Megatron has of ours.
        """
        store = self._open(path)
        first, *rest = index
        span = range(store.shape[0])[first]
        depth = self.chunk(path)[0]
        start = span.start // depth * depth
        if not path.startswith("blocks/") or len(span) >= depth or span.stop > start + depth:
            return self._read(store, (slice(span.start, span.stop), *rest), path)
        if self._held.get(path, (None,))[0] != start:
            self._held.pop(path, None)
            while len(self._held) > 2:
                del self._held[next(iter(self._held))]
            end = min(start + depth, store.shape[0])
            self._held[path] = start, self._read(store, (slice(start, end), *[slice(None)] * len(rest)), path)
        return self._held[path][1][(slice(span.start - start, span.stop - start), *rest)]

    def chunk(self, path: str) -> tuple[int, ...]:
        """The shape of the pieces that an array is stored in."""
        return tuple(size or 1 for size in self._open(path).chunk_layout.read_chunk.shape or ())

    def _read(self, store: ts.TensorStore, index: Index, path: str) -> np.ndarray:
        try:
            return np.asarray(store[index].read().result())
        except ValueError as error:
            raise ValueError(f"{self._folder}: {path} is damaged ({first_line(error)}); copy it again") from error

    def _open(self, path: str) -> ts.TensorStore:
        if path in self._stores:
            return self._stores[path]
        name, base = path.replace("/", ".") + "/", f"{self._folder}/"
        file = {"driver": "file", "path": base if self._ocdbt else base + name}
        kvstore = {"driver": "ocdbt", "base": file, "path": name} if self._ocdbt else file
        try:
            found = ts.open({"driver": "auto", "kvstore": kvstore}, open=True, read=True).result()
            # Which only a driver that is named takes: that chunks which are gone are an error, and not zeros.
            spec = {"driver": found.spec().to_json()["driver"], "kvstore": kvstore, "fill_missing_data_reads": False}
            self._stores[path] = store = ts.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise ValueError(f"{self._folder}: {path} is damaged ({first_line(error)}); copy it again") from error
        chunk = store.chunk_layout.read_chunk.shape or store.shape
        if any(size > max(whole, 1) for size, whole in zip(chunk, store.shape, strict=True)):
            raise ValueError(f"{self._folder}: {path} of {store.shape} has chunks of {chunk}; copy it again")
        return store


class Writer:
    """A checkpoint of these arrays, whose parts are then written."""

    def __init__(self, folder: Path, shapes: dict[str, jax.ShapeDtypeStruct]):
        # Orbax writes what it keeps beside the arrays; their own metadata is then replaced by what we want.
        tree = {path: np.zeros((1,) * len(want.shape), want.dtype) for path, want in shapes.items()}
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        handler.save(epath.Path(folder.absolute()), args=ocp.args.PyTreeSave(unflatten_dict(tree, sep="/")))
        handler.close()
        self._stores = {path: _create(folder.absolute(), path, want) for path, want in shapes.items()}

    def write(self, path: str, index: Index, part: np.ndarray) -> None:
        """Writes a part of an array, best one that ends where chunks end."""
        self._stores[path][index].write(contiguous(part)).result()


def _create(folder: Path, path: str, want: jax.ShapeDtypeStruct) -> ts.TensorStore:
    stacked = path.startswith("blocks/")
    dim = 1 if stacked else 0
    chunk = (*(1,) * dim, rows_at_once(want, stacked), *want.shape[dim + 1 :])
    metadata = {
        "shape": want.shape,
        "chunks": chunk,
        "dtype": "bfloat16" if want.dtype == "bfloat16" else np.dtype(want.dtype).str,  # as TensorStore spells it
        "compressor": None,
        "fill_value": None,
        "dimension_separator": ".",
    }
    kvstore = {"driver": "file", "path": f"{folder}/{path.replace('/', '.')}/"}
    spec = {
        "driver": "zarr",
        "kvstore": kvstore,
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
        "context": {"file_io_sync": False},  # the folder gets its name when all is written: see `folder`
    }
    return ts.open(spec, create=True, delete_existing=True).result()


def first_line(error: Exception) -> str:
    """What a library said, in short."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
