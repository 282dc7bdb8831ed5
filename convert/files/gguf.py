"""GGUF files: key-value pairs, the places of tensors and the tensors themselves, read and written in parts of tensors.

This module knows bytes only; `formats.gguf` has the names. The header is parsed here, as the reader of the gguf library
believes every count and length in it. The library (the extra `gguf`) knows the types of tensors, quantizes and
dequantizes, and writes headers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from gemma2_jax.convert.files import memory
from gemma2_jax.convert.files.memory import Index

ALIGNMENT = 32  # bytes, where a file does not say another (general.alignment)
# What is believed of a header. Gemma 2 has 508 tensors at 27B; its tokenizer has three arrays of 256,000 elements and
# one of 580,000, and its tokenizer.json, which may be a string of the header, 17.5 MB.
_MOST_ENTRIES, _MOST_ELEMENTS, _STRING_BYTES = 1 << 16, 1 << 23, 128 << 20
_MOST_DIMS, _MOST_ALIGNMENT = 4, 1 << 20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_UNQUANTIZED = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
# The types that tensors are written in, by the names of dtypes.
WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_BLOCK = 1 << 22  # elements that are quantized or dequantized at a time, as both take several times their memory


@dataclass(frozen=True)
class Array:
    """An array of the header, of which only the place is kept: `read_elements` reads it."""

    length: int
    kind: int  # the number of its elements' type
    start: int  # of its elements in the file


Written = int | float | bool | str | list[str] | list[int] | list[float]


def library() -> ModuleType:
    """The gguf library. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the gguf library: pip install 'gemma2-jax[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file. A quantized one is read as the float32 values that it encodes, which is exact."""

    path: Path
    type: str  # "Q8_0"
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    row_bytes: int  # of all elements with the same index in the first dim
    version: memory.Version

    @property
    def quantized(self) -> bool:
        """Whether it is stored in blocks of small numbers."""
        return self.type not in _UNQUANTIZED

    @property
    def dtype(self) -> np.dtype:
        """The dtype that it is read in."""
        return np.dtype(_UNQUANTIZED.get(self.type, np.float32))

    def read(self, index: Index) -> np.ndarray:
        """The slices `index` of the tensor. Reads the rows that they are in, and no others."""
        rows = range(self.shape[0])[index[0]]
        shape = (len(rows), *self.shape[1:])
        start, size = self.start + rows.start * self.row_bytes, len(rows) * self.row_bytes
        data = memory.read_bytes(self.path, start, size, self.version)
        if not self.quantized:
            return data.view(self.dtype).reshape(shape)[(slice(None), *index[1:])]
        gguf, array = library(), memory.reuse_memory(shape, np.float32)
        blocks, kind = data.reshape(*shape[:-1], -1), gguf.GGMLQuantizationType[self.type]
        with np.errstate(all="ignore"):  # a damaged file's scales may be infinite
            for span in _row_spans(shape):
                array[span] = gguf.dequantize(blocks[span], kind)
        return array[(slice(None), *index[1:])]


@dataclass(frozen=True)
class File:
    """The key-value pairs and the tensors of a file. Strings and numbers are kept, of arrays only the length."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def open_file(path: Path) -> File:
    """Reads the header of a file. Raises ValueError where it is damaged, or has what files of models have not."""
    library()
    version = memory.Version.of(path)
    try:
        with path.open("rb") as file:
            header = _Header(file, version.size)
            metadata, places = header.parse()
            tensors = {name: _locate_tensor(path, name, place, version) for name, place in places.items()}
    except ValueError as error:
        raise ValueError(f"{path} is no GGUF file, or is damaged: {error}; get it again") from error
    return File(path, metadata, tensors)


def read_elements(path: Path, array: Array) -> list[Any]:
    """The elements of an array of a header that `open_file` has read. Raises ValueError where it is damaged."""
    with path.open("rb") as file:
        try:
            return _Header(file, memory.Version.of(path).size).elements_of(array)
        except ValueError as error:
            raise ValueError(f"{path} is no GGUF file, or is damaged: {error}; get it again") from error


@dataclass(frozen=True)
class _Place:
    """Where a header says that a tensor is."""

    shape: tuple[int, ...]
    number: int  # of its type
    start: int


def _locate_tensor(path: Path, name: str, place: _Place, version: memory.Version) -> Tensor:
    """A tensor of a file. Raises ValueError where it is of no known type, or not in the file."""
    gguf, shape = library(), place.shape
    try:
        kind = gguf.GGMLQuantizationType(place.number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in _UNQUANTIZED:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{name} is of type {place.number}, which the gguf library does not read ({error})") from error
    row_bytes = math.prod(shape[1:]) // block * block_bytes
    tensor = Tensor(path, kind.name, shape, place.start, row_bytes, version)
    if not shape or (tensor.quantized and len(shape) < 2) or shape[-1] % block:
        raise ValueError(f"{name} has the shape {shape}, which its type {kind.name} does not allow")
    if place.start + shape[0] * row_bytes > version.size:
        raise ValueError(f"it ends before {name} does")
    return tensor


class _Header:
    """A header that is being read, of a file of `size` bytes. No length or count in it is believed."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.position = file, size, 0
        self.elements, self.kept = 0, 0  # of arrays, and bytes of strings, so far

    def parse(self) -> tuple[dict[str, Any], dict[str, _Place]]:
        """The key-value pairs, and where each tensor is."""
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin as one")
        version = self._number("<I")
        if version not in (2, 3):
            order = "; it is a big-endian one" if version & 0xFFFF == 0 else ""
            raise ValueError(f"it says version {version}, and this program reads 2 and 3, little-endian{order}")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        if max(tensors, pairs) > _MOST_ENTRIES:
            raise ValueError(f"it says that it has {tensors:,} tensors and {pairs:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                raise ValueError(f"it has the key {key} twice")
            metadata[key] = self._value(key, self._number("<I"))
        places: dict[str, _Place] = {}
        for _ in range(tensors):
            name = self._string()
            if name in places:
                raise ValueError(f"it has the tensor {name} twice")
            dims = self._number("<I")
            if dims > _MOST_DIMS:
                raise ValueError(f"it says that {name} has {dims:,} dims")
            shape = tuple(reversed([self._number("<Q") for _ in range(dims)]))
            places[name] = _Place(shape, self._number("<I"), self._number("<Q"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _MOST_ALIGNMENT:
            raise ValueError(f"its general.alignment is {alignment!r:.50}")
        for name, place in places.items():
            if place.start % alignment:
                raise ValueError(f"{name} is {place.start:,} bytes after its header, which is not aligned")
        start = self.position + -self.position % alignment
        return metadata, {name: replace(place, start=start + place.start) for name, place in places.items()}

    def _take(self, count: int) -> bytes:
        self._advance(count)
        return self.file.read(count)

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self.size:
            raise ValueError("it ends within its header")

    def _number(self, layout: str):
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        length = self._number("<Q")
        self.kept += length
        if self.kept > _STRING_BYTES:
            raise ValueError(f"the strings of its header have more than {_STRING_BYTES >> 20} MiB")
        return self._take(length).decode()

    def _value(self, key: str, kind: int) -> int | float | bool | str | Array:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            number = self._number(_SCALARS[kind])
            # The shortest decimal that is this float32: 1e-06, where a float has 9.99999997e-07.
            return float(str(np.float32(number))) if kind == _FLOAT32 else number
        if kind != _ARRAY:
            raise ValueError(f"{key} is of type {kind}, which there is not")
        kind, length = self._number("<I"), self._number("<Q")
        self.elements += length
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"the arrays of its header have {self.elements:,} elements or more")
        array = Array(length, kind, self.position)
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._number("<Q"))
        elif kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise ValueError(f"{key} is an array of type {kind}; there are arrays of numbers and of strings only")
        return array

    def elements_of(self, array: Array) -> list[Any]:
        """The elements of an array that was passed over."""
        self.file.seek(array.start)
        self.position = array.start
        if array.kind == _STRING:
            return [self._string() for _ in range(array.length)]
        layout = np.dtype(_SCALARS[array.kind])
        return np.frombuffer(self._take(array.length * layout.itemsize), layout).tolist()

    def _skip(self, count: int) -> None:
        self._advance(count)
        self.file.seek(count, 1)


def _row_spans(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dim of a tensor, of at most `_BLOCK` elements unless a row has more."""
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class Wanted:
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: str  # of WRITTEN

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor as it is written, without the padding after it."""
        gguf = library()
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[WRITTEN[self.dtype]]]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Written],
    wanted: Mapping[str, Wanted],
    parts: Iterable[np.ndarray],
    progress: Callable[[float], None],
) -> None:
    """Writes the key-value pairs, and the tensors of `wanted` in its order.

    Args:
      metadata: must have general.architecture. Numbers are written as uint32 and float32, in arrays as int32.
      parts: the tensors, in the order of `wanted`, each whole or as several blocks of its rows, in the dtype that is
        written or, for q8_0, in any.
      progress: is told how many more bytes have been written.

    Raises ValueError where values are beyond a dtype's range.
    """
    gguf = library()
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has begun with it
            kinds.get(type(value), writer.add_array)(key, value)
    for name, want in wanted.items():
        kind = gguf.GGMLQuantizationType[WRITTEN[want.dtype]]
        writer.add_tensor_info(name, want.shape, np.dtype(np.float32), want.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    stream = iter(parts)
    with path.open("ab") as file:
        memory.reserve_disk(file, sum(want.nbytes + ALIGNMENT for want in wanted.values()))
        for name, want in wanted.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            left = want.nbytes
            while left:
                for data in _encode(next(stream), want.dtype, name):
                    file.write(data)
                    left -= data.nbytes
                    progress(data.nbytes)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _encode(part: np.ndarray, dtype: str, name: str) -> Iterator[np.ndarray]:
    """The bytes of some rows of a tensor, a block of rows at a time."""
    if dtype != "q8_0":
        assert part.dtype == np.dtype(dtype), name
        if dtype == "float16" and np.isinf(part).any():
            raise ValueError(f"{name} has values that float16 has no room for; write bfloat16")
        yield memory.contiguous_copy(part).reshape(-1).view(np.uint8)
        return
    gguf = library()
    for span in _row_spans(part.shape):
        block = np.ascontiguousarray(part[span], np.float32)
        if not np.abs(block).max() <= 127 * float(np.finfo(np.float16).max):  # a block's scale is a float16
            raise ValueError(f"{name} has values that q8_0 has no room for; write bfloat16")
        yield gguf.quantize(block, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
