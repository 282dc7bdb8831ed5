"""Files as torch.save writes them, read and written without torch: a zip archive of a pickle and of raw storages.

A tensor is read when it is asked for, and only the bytes of the part that is asked for; nothing is mapped into memory,
where pages that have been read would count as the process's own. All that a file says of sizes and places is compared
with the file before memory is taken. This module does not know what the tensors of a file mean.
"""

import math
import reprlib
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma2_jax.convert.files import memory, pickles
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.files.pickles import Global, Persistent, Record

_ALIGNMENT = 64  # an entry's data starts at a multiple of it, as in torch's own archives
_ZIP64 = 0xFFFFFFFF  # in a field of 32 bits it means that the value is in the extra field, as it is too large
_LARGE = _ZIP64  # values from here on are written into the extra field
_MOST_ELEMENTS = 1 << 56
_STORAGE_NAMES = {dtype: name for name, dtype in pickles.STORAGES.items()}

# The structures of PKWARE's APPNOTE.TXT, section 4.3.
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Storage:
    """The place of a storage's bytes."""

    path: Path
    name: str
    dtype: np.dtype | None  # None: the elements are bytes
    start: int
    size: int
    crc: int  # 0: not recorded (torch.serialization.set_crc32_options(False))
    version: memory.Version

    def read(self, start: int, size: int) -> np.ndarray:
        """`size` bytes from `start` on. The checksum is compared where these are all bytes."""
        buffer = memory.read_bytes(self.path, self.start + start, size, self.version)
        if self.crc and size == self.size and zlib.crc32(buffer) != self.crc:
            raise ValueError(f"{self.path} is damaged: {self.name} does not have its checksum; copy it again")
        return buffer


@dataclass(frozen=True, eq=False, kw_only=True)
class Stored:
    """A tensor in a file, which `read` reads."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] = field(repr=False)  # in elements, as torch counts
    offset: int = field(repr=False)  # elements of the storage before the first
    storage: _Storage = field(repr=False)

    def read(self, index: Index = ()) -> np.ndarray:
        """The tensor, or the part of it at `index`, slices of step 1: a new array in C order.

        Reads what lies between the part's first element and its last. Raises ValueError where the file is damaged.
        """
        index = index + (slice(None),) * (len(self.shape) - len(index))
        spans = [range(size)[span] for size, span in zip(self.shape, index, strict=True)]
        assert all(span.step == 1 for span in spans)
        shape = tuple(len(span) for span in spans)
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        first = self.offset + sum(span.start * stride for span, stride in zip(spans, self.strides, strict=True))
        # Torch may give a dim of one element any stride.
        strides = [stride if size > 1 else 0 for size, stride in zip(shape, self.strides, strict=True)]
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        width = self.dtype.itemsize
        data = self.storage.read(first * width, count * width)
        part = np.ndarray(shape, self.dtype, data.data, strides=[stride * width for stride in strides])
        return np.asarray(part, order="C")


def load_torch(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """The content of a file, or of an archive within one, with a `Stored` for each tensor and `Record`s for objects.

    Args:
      offset: where the archive begins in the file, in bytes.
      length: the bytes of the archive. None: up to the end of the file.

    Raises ValueError naming what is wrong where the file is missing, damaged or of another kind.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe could wait for ever
        raise ValueError(f"{path} is not a file; copy it again")
    try:
        with open(path, "rb", buffering=0) as file:
            archive = _Archive(path, file, offset, length)
            data = archive.bytes("data.pkl")
            if "byteorder" in archive.entries and archive.bytes("byteorder") != b"little":
                raise ValueError(f"{path} was written on a big-endian machine; save it again on another one")
            return pickles.load_pickle(
                data,
                path,
                archive.storage,
                {
                    "torch._utils._rebuild_tensor_v2": archive.tensor,
                    "torch._utils._rebuild_tensor_v3": archive.tensor,
                    "torch._utils._rebuild_parameter": archive.parameter,
                },
            )
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path} is missing; copy it, or the whole checkpoint, again") from error


def open_state_dict(path: Path) -> dict[str, Stored]:
    """The tensors of a file that holds a state dict, as pytorch_model.bin does, by name.

    Raises ValueError as `load_torch` does, and where the file holds something else.
    """
    content = load_torch(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict, but {type(content).__name__}; save model.state_dict()")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise ValueError(
                f"{path} holds {reprlib.repr(name)}, which is no tensor, so that it is no state dict of a model; "
                "save model.state_dict()"
            )
    return content


@dataclass(frozen=True)
class _Entry:
    """An entry of an archive; places are counted from the start of the archive, in bytes."""

    header: int  # the place of its local header
    size: int
    crc: int
    limit: int  # the place of the next entry, or of the directory


class _Archive:
    """An archive: the entries of its directory, by their names below its one folder."""

    def __init__(self, path: Path, file: BinaryIO, offset: int, length: int | None):
        self.path, self.file, self.offset = path, file, offset
        self.version = memory.Version.of(file.fileno())
        rest = self.version.size - offset
        self.length = rest if length is None else length
        if offset < 0 or not 0 <= self.length <= rest:
            raise ValueError(
                f"{path} has {rest + offset:,} bytes where its checkpoint expects an archive at {offset:,} of "
                f"{self.length:,}; copy it again"
            )
        self.entries = self._directory()
        self._starts = dict[str, int]()

    def damaged(self, problem: str) -> ValueError:
        return ValueError(f"{self.path} is damaged or cut short ({problem}); copy it again")

    def read(self, start: int, size: int) -> bytes:
        if not 0 <= start <= self.length - size:
            raise self.damaged("its archive points outside itself")
        return memory.read_bytes(self.path, self.offset + start, size).tobytes()

    def _directory(self) -> dict[str, _Entry]:
        directory, size, count = self._end()
        listed = sorted(self._directory_entries(self.read(directory, size), count))
        limits = [header for header, *_ in listed[1:]] + [directory]
        entries = dict[str, _Entry]()
        folder = listed[0][1].partition("/")[0] + "/" if listed else ""
        for (header, name, full, crc), limit in zip(listed, limits, strict=False):
            if not name.startswith(folder):
                raise self.damaged("its archive has more than one folder")
            if entries.setdefault(name.removeprefix(folder), entry := _Entry(header, full, crc, limit)) is not entry:
                raise self.damaged("two of its archive's entries have one name")
        if "data.pkl" not in entries:
            raise ValueError(
                f"{self.path} is a zip archive, but not one of torch.save; check that it is the right file"
            )
        return entries

    def _directory_entries(self, central: bytes, count: int) -> Iterator[tuple[int, str, int, int]]:
        """For each entry of a directory the place of its local header, its name, its size and its checksum."""
        size, end = len(central), 0
        if size < count * _CENTRAL.size:
            raise self.damaged("its archive's directory is short")
        for _ in range(count):
            if end + _CENTRAL.size > size:
                raise self.damaged("its archive's directory is short")
            mark, _, _, flags, method, _, _, crc, packed, full, n_name, n_extra, n_note, _, _, _, header = (
                _CENTRAL.unpack_from(central, end)
            )
            end += _CENTRAL.size + n_name + n_extra + n_note
            if mark != b"PK\1\2" or end > size:
                raise self.damaged("its archive's directory is wrong")
            name = central[end - n_note - n_extra - n_name : end - n_note - n_extra]
            extra = central[end - n_note - n_extra : end - n_note]
            full, packed, header = self._zip64_fields(extra, full, packed, header)
            if method or flags & 1 or full != packed:
                raise ValueError(f"{self.path} is a compressed archive, which torch does not write; get the original")
            yield header, name.decode("utf-8", "replace"), full, crc

    def _end(self) -> tuple[int, int, int]:
        """The place of the directory, its size, and the number of its entries."""
        start = self.read(0, min(self.length, 16))
        if self.length < _END.size or not start.startswith(b"PK\3\4"):
            if start.startswith((b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"\x80\x02c__torch__", b"././@")):
                raise ValueError(
                    f"{self.path} is in the format of torch before 1.6; load it with torch and torch.save it again"
                )
            raise ValueError(f"{self.path} is not a file of torch.save, or is damaged; copy it again")
        mark, _, _, _, count, size, directory, _ = _END.unpack(self.read(self.length - _END.size, _END.size))
        if mark != b"PK\5\6":
            raise self.damaged("its archive has no end")
        if count == 0xFFFF or _ZIP64 in (size, directory):
            mark, _, end64, _ = _LOCATOR.unpack(self.read(self.length - _END.size - _LOCATOR.size, _LOCATOR.size))
            if mark != b"PK\6\7":
                raise self.damaged("its archive has no end")
            mark, *_, count, size, directory = _END64.unpack(self.read(end64, _END64.size))
            if mark != b"PK\6\6":
                raise self.damaged("its archive has no end")
        return directory, size, count

    def _zip64_fields(self, extra: bytes, *fields: int) -> list[int]:
        """The fields of an entry of the directory; fields that are too large for 32 bits come from its extra field."""
        while len(extra) >= 4:
            kind, size = struct.unpack_from("<2H", extra)
            if kind == 1:
                large = list(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
                if len(large) < fields.count(_ZIP64):
                    raise self.damaged("its archive's directory is wrong")
                return [large.pop(0) if value == _ZIP64 else value for value in fields]
            extra = extra[4 + size :]
        return list(fields)

    def data_start(self, name: str) -> int:
        """The place of an entry's data, in bytes from the start of the archive."""
        if name not in self._starts:
            entry = self.entries[name]
            mark, *_, n_name, n_extra = _LOCAL.unpack(self.read(entry.header, _LOCAL.size))
            start = entry.header + _LOCAL.size + n_name + n_extra
            if mark != b"PK\3\4" or start + entry.size > entry.limit:
                raise self.damaged("its archive's entries overlap")
            self._starts[name] = start
        return self._starts[name]

    def bytes(self, name: str) -> bytes:
        """The data of a whole entry."""
        entry = self.entries[name]
        data = self.read(self.data_start(name), entry.size)
        if entry.crc and zlib.crc32(data) != entry.crc:
            raise self.damaged(f"{name} does not have its checksum")
        return data

    def storage(self, key: Any) -> _Storage:
        """A storage, as a pickle refers to it: ("storage", its class, the entry, a device, the number of elements)."""
        match key:
            case (str("storage"), Global(kind), str(name), str(), int(count)) if len(name) < 100:
                name, dtype = f"data/{name}", pickles.STORAGES.get(kind)
                entry = self.entries.get(name)
                if entry is None:
                    raise self.damaged("it lacks a tensor's data")
                if count * (dtype.itemsize if dtype else 1) != entry.size:
                    raise self.damaged("a tensor's data has not its size")
                if not dtype and kind != "torch.storage.UntypedStorage":
                    raise self.damaged("a storage of an unknown kind")
                start = self.offset + self.data_start(name)
                return _Storage(
                    path=self.path,
                    name=name,
                    dtype=dtype,
                    start=start,
                    size=entry.size,
                    crc=entry.crc,
                    version=self.version,
                )
        raise self.damaged("a reference to something other than a tensor's data")

    def tensor(self, args: tuple) -> Stored:
        """torch._utils._rebuild_tensor_v2 and _v3(storage, offset, shape, strides, requires_grad, hooks[, dtype])."""
        match args[:7]:
            case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest):
                dtype = storage.dtype or (rest[0] if rest else None)
                if not isinstance(dtype, np.dtype):
                    raise self.damaged("a tensor of an unknown kind")
                # Numpy has at most 64 dims, and counts elements as if no dim had size 0.
                if (
                    not len(shape) == len(strides) <= 64
                    or not all(type(size) is int and size >= 0 for size in (offset, *shape, *strides))
                    or math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS
                ):
                    raise self.damaged("a tensor of impossible shape")
                stored, count = storage.size // dtype.itemsize, math.prod(shape)
                last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
                if count and last >= stored:
                    raise self.damaged("a tensor larger than its data")
                if count > stored:
                    raise ValueError(f"{self.path} holds an expanded tensor; save it again after .contiguous()")
                return Stored(shape=shape, dtype=dtype, strides=strides, offset=offset, storage=storage)
        raise self.damaged("a tensor of an unknown kind")

    def parameter(self, args: tuple) -> Stored:
        """torch._utils._rebuild_parameter(data, requires_grad, hooks)."""
        if not args or not isinstance(args[0], Stored):
            raise self.damaged("a parameter that is no tensor")
        return args[0]


def save_torch(file: BinaryIO, content: Any) -> None:
    """Writes content of the types that `load_torch` gives, as an archive from the file's position on.

    torch.load reads it, with weights_only=True too. Tensors are numpy arrays, or objects that have .shape, .dtype and a
    method .read() that gives an array. Such an object is read when it is written, one at a time. Raises TypeError for
    an object of any other type.
    """
    arrays = list[Any]()

    def tensor(x: Any) -> Record:
        if not hasattr(x, "shape") or getattr(x, "dtype", None) not in _STORAGE_NAMES:
            raise TypeError(f"{type(x).__name__} of {getattr(x, 'dtype', 'no dtype')} has no place in a torch file")
        shape = tuple(int(size) for size in x.shape)
        strides = tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))
        kind = Global(_STORAGE_NAMES[x.dtype])
        storage = Persistent(("storage", kind, str(len(arrays)), "cpu", math.prod(shape)))
        arrays.append(x)
        hooks = Record("collections.OrderedDict")
        return Record("torch._utils._rebuild_tensor_v2", (storage, 0, shape, strides, False, hooks))

    archive = _Writer(file)
    archive.add("data.pkl", pickles.dump_pickle(content, tensor))
    archive.add("byteorder", b"little")
    for number, x in enumerate(arrays):
        array = x if isinstance(x, np.ndarray) else x.read()
        assert (array.shape, array.dtype) == (tuple(x.shape), x.dtype)
        archive.add(f"data/{number}", memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        del array  # before the next one is read
    archive.add("version", b"3\n")
    archive.close()


class _Writer:
    """A zip archive with the layout that torch writes, from the position of `file` on."""

    def __init__(self, file: BinaryIO):
        self.file, self.start, self.central = file, file.tell(), list[bytes]()

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Writes an entry, with its data at a multiple of the alignment."""
        path, start, size = f"archive/{name}".encode(), self.file.tell() - self.start, len(data)
        full, header = (_ZIP64 if value >= _LARGE else value for value in (size, start))
        large = ([size, size] if full == _ZIP64 else []) + ([start] if header == _ZIP64 else [])
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        pad = -(start + _LOCAL.size + len(path) + len(extra) + 4) % _ALIGNMENT
        padding = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        # The flags say that names are UTF-8 and that sizes come after the data, where there is any, as miniz has it.
        flags = 0x0808 if size else 0x0800
        self.file.write(
            _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra + padding)) + path + extra + padding
        )
        with ThreadPoolExecutor(1) as thread:
            checksum = thread.submit(zlib.crc32, data)
            self.file.write(data)
        crc = checksum.result()
        if size:
            descriptor = _DESCRIPTOR64 if full == _ZIP64 else _DESCRIPTOR
            self.file.write(descriptor.pack(b"PK\7\x08", crc, size, size))
        central = (b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, full, full, len(path), len(extra), 0, 0, 0, 0, header)
        self.central.append(_CENTRAL.pack(*central) + path + extra)

    def close(self) -> None:
        """Writes the directory."""
        start, count, central = self.file.tell() - self.start, len(self.central), b"".join(self.central)
        end = start + len(central)
        self.file.write(central)
        self.file.write(_END64.pack(b"PK\6\6", 44, 798, 45, 0, 0, count, count, len(central), start))
        self.file.write(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        # Numbers that are too large for these fields are in the structures just written.
        count, size, start = min(count, 0xFFFF), min(len(central), _ZIP64), min(start, _ZIP64)
        self.file.write(_END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0))
