"""Orbax checkpoints by parts of arrays, read with TensorStore, which is what Orbax itself stores with.

Orbax's own calls move whole arrays, and of a 27B model one stack of layers is 15 GB. Checkpoints are written as Orbax
has them without OCDBT: an array a folder, in Zarr 2 (zarr-specs.readthedocs.io), uncompressed, as weights hardly
shrink, and a chunk for a layer or for a part of one. Zarr 3 would have checksums, with which reading took three times
as long. `opening` knows which arrays there are.
"""

import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from gemma2_jax.convert.files.memory import Index, contiguous_copy, read_bytes, reserve_disk
from gemma2_jax.convert.files.safetensors import read_json
from gemma2_jax.dims import Abstract

CHUNK_BYTES = 64 << 20  # arrays are stored in chunks of this size, so that a device reads little more than its slice
METADATA = "_METADATA"  # Orbax's file about the whole checkpoint
_ARRAY_METADATA = (".zarray", "zarr.json")  # Zarr's file about one array, in Zarr 2 and in Zarr 3
_METADATA_BYTES, _METADATA_DEPTH = 1 << 20, 1000  # limits of such a file, which has 1 kB and less than 20 brackets
_MOST_ARRAYS = 1000  # a model has 13 arrays, with adapters 34, and 508 where layers are apart
_MOST_FOLDERS = 20  # in a folder, that are searched for a checkpoint
_LONGEST_SUMMARY = 500  # characters of a library's message


def rows_at_once(want: jax.ShapeDtypeStruct, stacked: bool) -> int:
    """How many rows of an array, or of each layer of a stack, make up a chunk.

    Chunks have about the same number of rows, as each takes as much disk as the largest.
    """
    dim = 1 if stacked else 0
    row = math.prod(want.shape[dim + 1 :]) * want.dtype.itemsize
    chunks = math.ceil(want.shape[dim] / max(1, CHUNK_BYTES // row))
    return math.ceil(want.shape[dim] / chunks)


class Reader:
    """The arrays of an Orbax checkpoint that any of its versions or settings has written."""

    def __init__(self, folder: Path):
        """Reads the arrays' metadata. Raises ValueError where it is missing, damaged or something else."""
        self._folder = folder.absolute()
        self._ocdbt = (folder / "manifest.ocdbt").is_file()
        self._stores: dict[str, ts.TensorStore] = {}
        self._cached: dict[str, tuple[int, np.ndarray]] = {}  # for some paths the first layer and the layers of a chunk
        _check_files(self._folder)
        self._names = _checked_paths(folder)
        stores = {path: self._open(path) for path in self._names}
        self.shapes: Abstract = {
            path: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype) for path, store in stores.items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        """The slices `index` of an array, as stored.

        A chunk may hold more layers of a stack, or rows of an embedding, than are asked for. The chunks that were read
        last are then kept for the next calls: those of three arrays, as Megatron fuses up to three. Raises ValueError
        where a chunk is damaged.
        """
        store = self._open(path)
        if not index:
            return self._read(store, (), path)
        first, *rest = index
        span = range(store.shape[0])[first]
        depth = self.chunk(path)[0]
        start = span.start // depth * depth
        in_parts = _stacked(path) or "embedding" in path  # callers read these a layer or some rows at a time
        if not in_parts or len(span) >= depth or span.stop > start + depth:
            return self._read(store, (slice(span.start, span.stop), *rest), path)
        if self._cached.get(path, (None,))[0] != start:
            self._cached.pop(path, None)
            while len(self._cached) > 2:
                del self._cached[next(iter(self._cached))]
            end = min(start + depth, store.shape[0])
            self._cached[path] = start, self._read(store, (slice(start, end), *[slice(None)] * len(rest)), path)
        return self._cached[path][1][(slice(span.start - start, span.stop - start), *rest)]

    def chunk(self, path: str) -> tuple[int, ...]:
        """The shape of the pieces that an array is stored in."""
        store = self._open(path)
        return tuple(size or 1 for size in store.chunk_layout.read_chunk.shape or store.shape)

    def _read(self, store: ts.TensorStore, index: Index, path: str) -> np.ndarray:
        part = self._read_file(store, index, path)
        try:
            return np.asarray(store[index].read().result()) if part is None else part
        except ValueError as error:
            raise self._damaged(path, error) from error

    def _read_file(self, store: ts.TensorStore, index: Index, path: str) -> np.ndarray | None:
        """The slices `index` where they lie in one chunk, whose file is as `Writer` has it; otherwise None.

        TensorStore could read them too, but always the whole chunk and into fresh memory, which takes several times as
        long. It is left the files of a wrong size, as it says what is wrong.
        """
        chunk, dtype = self.chunk(path), store.dtype.numpy_dtype
        if self._ocdbt or not chunk or store.spec().to_json().get("metadata") != _metadata(store.shape, chunk, dtype):
            return None
        spans = [range(size)[span] for size, span in zip(store.shape, index, strict=True)]
        numbers = [span.start // size for span, size in zip(spans, chunk, strict=True)]
        file = self._folder / self._names[path] / ".".join(map(str, numbers))
        ends = [(number + 1) * size for number, size in zip(numbers, chunk, strict=True)]
        size = math.prod(chunk) * dtype.itemsize
        if not all(span.stop <= end for span, end in zip(spans, ends, strict=True)) or not _has_size(file, size):
            return None
        # The file has one row after another of the first dim that is not 1.
        dim = next((dim for dim, size in enumerate(chunk) if size > 1), len(chunk) - 1)
        row = math.prod(chunk[dim + 1 :]) * dtype.itemsize
        data = read_bytes(file, spans[dim].start % chunk[dim] * row, len(spans[dim]) * row)
        whole = data.view(dtype).reshape(*chunk[:dim], len(spans[dim]), *chunk[dim + 1 :])
        rest = zip(spans[dim + 1 :], chunk[dim + 1 :], strict=True)
        return whole[(..., *(slice(span.start % size, span.start % size + len(span)) for span, size in rest))]

    def _open(self, path: str) -> ts.TensorStore:
        if path in self._stores:
            return self._stores[path]
        name, base = f"{self._names[path]}/", f"{self._folder}/"
        file = {"driver": "file", "path": base if self._ocdbt else base + name}
        kvstore = {"driver": "ocdbt", "base": file, "path": name} if self._ocdbt else file
        try:
            if self._ocdbt:
                values = ts.KvStore.open(kvstore).result()
                if not all(_is_metadata(values.read(key).result().value) for key in _ARRAY_METADATA):
                    raise ValueError("its metadata is not that of an array")
            probe = ts.open({"driver": "auto", "kvstore": kvstore}, open=True, read=True).result()
            # A missing chunk is to be an error, and not zeros. Only a driver that is named takes this option.
            spec = {"driver": probe.spec().to_json()["driver"], "kvstore": kvstore, "fill_missing_data_reads": False}
            self._stores[path] = store = ts.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise self._damaged(path, error) from error
        chunk = self.chunk(path)
        if any(size > max(whole, 1) for size, whole in zip(chunk, store.shape, strict=True)):
            raise ValueError(f"{self._folder}: {path} of {store.shape} has chunks of {chunk}; copy it again")
        return store

    def _damaged(self, path: str, error: Exception) -> ValueError:
        return ValueError(f"{self._folder}: {path} is damaged ({error_summary(error)}); copy it again")


def _check_files(folder: Path) -> None:
    """Raises ValueError where the folder holds what TensorStore would wait for, read without end, or crash on."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not path.is_file():
                raise ValueError(f"{path} is not a file, nor a link to one; copy the checkpoint again")
            if name in _ARRAY_METADATA:
                with path.open("rb") as file:
                    if not _is_metadata(file.read(_METADATA_BYTES + 1)):
                        raise ValueError(f"{path} is not the metadata of an array; copy it again")


def _is_metadata(text: bytes) -> bool:
    """Whether the text is within the limits of an array's metadata, in bytes and in the depth of its JSON."""
    return len(text) <= _METADATA_BYTES and text.count(b"[") + text.count(b"{") <= _METADATA_DEPTH


def find_roots(folder: Path, depth: int = 3) -> list[Path]:
    """The folders with an Orbax checkpoint's arrays: `folder`, or folders up to `depth` levels below it."""
    if (folder / METADATA).is_file():
        return [folder]
    with os.scandir(folder) as entries:
        below = sorted(entry.name for entry in itertools.islice(entries, _MOST_ARRAYS) if Path(entry).is_dir())
    return [root for name in below[:_MOST_FOLDERS] for root in find_roots(folder / name, depth - 1)] if depth else []


def list_paths(folder: Path) -> dict[str, str]:
    """The paths of the arrays that Orbax's own metadata lists, and the names that they are stored under.

    Raises ValueError where it is damaged.
    """
    try:
        entries = read_json(folder / METADATA)["tree_metadata"].values()
        arrays = [
            entry for entry in entries if not entry.get("value_metadata", {}).get("skip_deserialize")
        ]  # else None
        keys = [[key["key"] for key in entry["key_metadata"]] for entry in arrays]
        return {"/".join(names): ".".join(names) for names in keys}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / METADATA} is damaged, or of no Orbax checkpoint; copy it again") from error


def _checked_paths(folder: Path) -> dict[str, str]:
    paths = list_paths(folder)
    for path in paths:
        if len(paths) > _MOST_ARRAYS or not re.fullmatch(r"\w+(/\w+)*", path):
            raise ValueError(
                f"{folder / METADATA} lists {len(paths)} arrays, of which {path[:200]!r} is none of Gemma 2's"
            )
    return paths


class Writer:
    """An Orbax checkpoint that is written in parts of arrays."""

    def __init__(self, folder: Path, shapes: dict[str, jax.ShapeDtypeStruct]):
        """Creates the folder and the metadata of arrays of these shapes and dtypes, by path."""
        self._folder, self._shapes = folder, shapes
        # Imported here: importing the library adds a handler to the root logger, and reading does without it.
        import orbax.checkpoint as ocp
        from etils import epath

        # Orbax writes what it keeps beside the arrays; their own metadata is then replaced by what we want.
        tree = {path: np.zeros((1,) * len(want.shape), want.dtype) for path, want in shapes.items()}
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        handler.save(epath.Path(folder.absolute()), args=ocp.args.PyTreeSave(ocp.tree.from_flat_dict(tree, sep="/")))
        handler.close()
        for path, want in shapes.items():
            dim = int(_stacked(path))
            chunk = (*(1,) * dim, rows_at_once(want, _stacked(path)), *want.shape[dim + 1 :])
            (folder / _name(path) / ".zarray").write_text(json.dumps(_metadata(want.shape, chunk, want.dtype)))

    def write(self, path: str, index: Index, part: np.ndarray) -> None:
        """Writes the slices `index` of an array: a layer of a stack, or rows that begin and end where chunks do."""
        # A chunk is a file, which has the bytes that are in memory, as chunks are in C order and not compressed.
        # TensorStore could write them too, in twice the time.
        want, dim = self._shapes[path], int(_stacked(path))
        rows, span = rows_at_once(want, _stacked(path)), range(want.shape[dim])[index[dim]]
        assert span.start % rows == 0 and (span.stop % rows == 0 or span.stop == want.shape[dim])
        part = contiguous_copy(part[0] if dim else part)
        for start in range(0, len(part), rows):
            numbers = [index[0].start] * dim + [(span.start + start) // rows] + [0] * (len(want.shape) - dim - 1)
            with (self._folder / _name(path) / ".".join(map(str, numbers))).open("wb") as file:
                chunk = part[start : start + rows]
                reserve_disk(file, chunk.nbytes)
                file.write(chunk.reshape(-1).view(np.uint8))
                if len(chunk) < rows:  # the last chunk is filled up
                    file.write(bytes((rows - len(chunk)) * chunk[0].nbytes))


def _metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """Zarr's metadata of an array whose chunks are files of their elements as they are in memory, in C order."""
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk),
        "dtype": "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).str,  # as TensorStore calls them
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _stacked(path: str) -> bool:
    return path.startswith("blocks/")


def _name(path: str) -> str:
    return path.replace("/", ".")


def error_summary(error: Exception) -> str:
    """The first line of a library's message, its middle left out where it is long; without one, the error's name."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    half = _LONGEST_SUMMARY // 2
    return line if len(line) <= _LONGEST_SUMMARY else f"{line[:half]} ... {line[-half:]}"
