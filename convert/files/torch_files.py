"""Files as torch.save writes them, read and written without torch: a zip archive of a pickle and of raw storages.

A tensor is read when it is asked for, and only the bytes of the part that is asked for; nothing is mapped into memory,
where pages that have been read would count as the process's own. All that a file says of sizes and places is compared
with the file before memory is taken. What the tensors of a file mean is not known here.
"""

import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma2_jax.convert.files import memory, pickles
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.files.pickles import Global, Persistent, Record

_ALIGNMENT = 64  # of an entry's data from the start of its archive, as torch's readers like to have it
_ZIP64 = 0xFFFFFFFF  # in a field of 32 bits: too large for it, see the extra field
_LARGE = _ZIP64  # what is written there
_MOST_ELEMENTS = 1 << 56
_STORAGE_NAMES = {dtype: name for name, dtype in pickles.STORAGES.items()}

# The structures of APPNOTE.TXT 4.3, by their signatures.
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Storage:
    """Where a storage's bytes are."""

    path: Path
    name: str
    dtype: np.dtype | None  # None: of bytes
    start: int
    size: int
    crc: int  # 0: not recorded (torch.serialization.set_crc32_options(False))

    def read(self, start: int, size: int) -> np.ndarray:
        """Some of its bytes; the checksum can be compared where it is all of them."""
        buffer = memory.read_bytes(self.path, self.start + start, size)
        if self.crc and size == self.size and zlib.crc32(buffer) != self.crc:
            raise ValueError(f"{self.path} is damaged: {self.name} does not have its checksum; copy it again")
        return buffer


@dataclass(frozen=True, eq=False, kw_only=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] = field(repr=False)  # in elements, as torch counts
    offset: int = field(repr=False)  # the first element's
    storage: _Storage = field(repr=False)

    def read(self, index: Index = ()) -> np.ndarray:
        """The tensor, or the part of it at `index`, slices of step 1: a new array in C order.

        Reads what lies between the part's first element and its last. Raises ValueError where the file is damaged.
        """
        index = index + (slice(None),) * (len(self.shape) - len(index))
        spans = [range(size)[at] for size, at in zip(self.shape, index, strict=True)]
        assert all(span.step == 1 for span in spans)
        shape = tuple(len(span) for span in spans)
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        first = self.offset + sum(span.start * stride for span, stride in zip(spans, self.strides, strict=True))
        # Torch gives a dim of one element any stride.
        strides = [stride if size > 1 else 0 for size, stride in zip(shape, self.strides, strict=True)]
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        width = self.dtype.itemsize
        held = self.storage.read(first * width, count * width)
        part = np.ndarray(shape, self.dtype, held.data, strides=[stride * width for stride in strides])
        return np.asarray(part, order="C")


def load_torch(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """The content of a file, or of an archive within one, with a `Stored` for each tensor and `Record`s for objects.

    Raises ValueError where it is damaged or no such file, naming what is wrong.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
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


@dataclass(frozen=True)
class _Entry:
    header: int  # where its local header is, from the start of the archive
    size: int
    crc: int
    limit: int  # where what follows it begins


class _Archive:
    """One archive: the entries of its directory, by their names below its one folder."""

    def __init__(self, path: Path, file: BinaryIO, offset: int, length: int | None):
        self.path, self.file, self.offset = path, file, offset
        rest = file.seek(0, 2) - offset
        self.length = rest if length is None else length
        if offset < 0 or not 0 <= self.length <= rest:
            raise ValueError(
                f"{path} has {rest + offset:,} bytes where its checkpoint expects an archive at {offset:,} of "
                f"{self.length:,}; copy it again"
            )
        self.entries = self._directory()
        self._placed = dict[str, int]()

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged or cut short ({what}); copy it again")

    def read(self, at: int, size: int) -> bytes:
        if not 0 <= at <= self.length - size:
            raise self.damaged("its archive points outside itself")
        return memory.read_bytes(self.path, self.offset + at, size).tobytes()

    def _directory(self) -> dict[str, _Entry]:
        at, size, count = self._end()
        central = self.read(at, size)
        if size < count * _CENTRAL.size:
            raise self.damaged("its archive's directory is short")
        found, where = list[tuple[int, str, int, int]](), 0
        for _ in range(count):
            if where + _CENTRAL.size > size:
                raise self.damaged("its archive's directory is short")
            mark, _, _, flags, method, _, _, crc, packed, full, n_name, n_extra, n_note, _, _, _, header = (
                _CENTRAL.unpack_from(central, where)
            )
            where += _CENTRAL.size + n_name + n_extra + n_note
            if mark != b"PK\1\2" or where > size:
                raise self.damaged("its archive's directory is wrong")
            name = central[where - n_note - n_extra - n_name : where - n_note - n_extra]
            extra = central[where - n_note - n_extra : where - n_note]
            full, packed, header = self._large(extra, full, packed, header)
            if method or flags & 1 or full != packed:
                raise ValueError(f"{self.path} is a compressed archive, which torch does not write; get the original")
            found.append((header, name.decode("utf-8", "replace"), full, crc))
        found.sort()
        entries = dict[str, _Entry]()
        folder = found[0][1].partition("/")[0] + "/" if found else ""
        for (header, name, full, crc), limit in zip(found, [header for header, *_ in found[1:]] + [at], strict=False):
            if not name.startswith(folder):
                raise self.damaged("its archive has more than one folder")
            if entries.setdefault(name.removeprefix(folder), entry := _Entry(header, full, crc, limit)) is not entry:
                raise self.damaged("two of its archive's entries have one name")
        if "data.pkl" not in entries:
            raise ValueError(
                f"{self.path} is a zip archive, but not one of torch.save; check that it is the right file"
            )
        return entries

    def _end(self) -> tuple[int, int, int]:
        """Where the directory is, its size, and the number of entries."""
        start = self.read(0, min(self.length, 16))
        if self.length < _END.size or not start.startswith(b"PK\3\4"):
            if start.startswith((b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"\x80\x02c__torch__", b"././@")):
                raise ValueError(
                    f"{self.path} is in the format of torch before 1.6; load it with torch and torch.save it again"
                )
            raise ValueError(f"{self.path} is not a file of torch.save, or is damaged; copy it again")
        mark, _, _, _, count, size, at, _ = _END.unpack(self.read(self.length - _END.size, _END.size))
        if mark != b"PK\5\6":
            raise self.damaged("its archive has no end")
        if count == 0xFFFF or _ZIP64 in (size, at):
            mark, _, at, _ = _LOCATOR.unpack(self.read(self.length - _END.size - _LOCATOR.size, _LOCATOR.size))
            if mark != b"PK\6\7":
                raise self.damaged("its archive has no end")
            mark, *_, count, size, at = _END64.unpack(self.read(at, _END64.size))
            if mark != b"PK\6\6":
                raise self.damaged("its archive has no end")
        return at, size, count

    def _large(self, extra: bytes, *fields: int) -> list[int]:
        """The fields of a directory's entry, those that are too large for it from its extra field."""
        while len(extra) >= 4:
            kind, size = struct.unpack_from("<2H", extra)
            if kind == 1:
                wide = list(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
                if len(wide) < fields.count(_ZIP64):
                    raise self.damaged("its archive's directory is wrong")
                return [wide.pop(0) if value == _ZIP64 else value for value in fields]
            extra = extra[4 + size :]
        return list(fields)

    def place(self, name: str) -> int:
        """Where an entry's data is."""
        if name not in self._placed:
            entry = self.entries[name]
            mark, *_, n_name, n_extra = _LOCAL.unpack(self.read(entry.header, _LOCAL.size))
            at = entry.header + _LOCAL.size + n_name + n_extra
            if mark != b"PK\3\4" or at + entry.size > entry.limit:
                raise self.damaged("its archive's entries overlap")
            self._placed[name] = at
        return self._placed[name]

    def bytes(self, name: str) -> bytes:
        """A whole entry."""
        entry = self.entries[name]
        data = self.read(self.place(name), entry.size)
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
                start = self.offset + self.place(name)
                return _Storage(path=self.path, name=name, dtype=dtype, start=start, size=entry.size, crc=entry.crc)
        raise self.damaged("a reference to something other than a tensor's data")

    def tensor(self, args: tuple) -> Stored:
        """torch._utils._rebuild_tensor_v2 and _v3(storage, offset, shape, strides, requires_grad, hooks[, dtype])."""
        match args[:7]:
            case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest):
                dtype = storage.dtype or (rest[0] if rest else None)
                if not isinstance(dtype, np.dtype):
                    raise self.damaged("a tensor of an unknown kind")
                # Numpy has 64 dims, and counts the elements that there would be if no dim were 0.
                if (
                    not len(shape) == len(strides) <= 64
                    or not all(type(size) is int and size >= 0 for size in (offset, *shape, *strides))
                    or math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS
                ):
                    raise self.damaged("a tensor of impossible shape")
                held, count = storage.size // dtype.itemsize, math.prod(shape)
                last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
                if count and last >= held:
                    raise self.damaged("a tensor larger than its data")
                if count > held:
                    raise ValueError(f"{self.path} holds an expanded tensor; save it again after .contiguous()")
                return Stored(shape=shape, dtype=dtype, strides=strides, offset=offset, storage=storage)
        raise self.damaged("a tensor of an unknown kind")

    def parameter(self, args: tuple) -> Stored:
        """torch._utils._rebuild_parameter(data, requires_grad, hooks)."""
        if not args or not isinstance(args[0], Stored):
            raise self.damaged("a parameter that is no tensor")
        return args[0]


def save_torch(file: BinaryIO, content: Any) -> None:
    """Writes what `load_torch` gives where `file` stands: an archive that torch.load reads, with weights_only=True too.

    Tensors are numpy arrays, or objects that have .shape, .dtype and .read(), which gives one: these are read one by
    one, as they are written.
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
    """A zip archive byte for byte as torch lays it out, from where `file` stands."""

    def __init__(self, file: BinaryIO):
        self.file, self.start, self.central = file, file.tell(), list[bytes]()

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Writes an entry, with its data at a multiple of the alignment."""
        path, at, size, crc = f"archive/{name}".encode(), self.file.tell() - self.start, len(data), zlib.crc32(data)
        full, header = (_ZIP64 if value >= _LARGE else value for value in (size, at))
        wide = ([size, size] if full == _ZIP64 else []) + ([at] if header == _ZIP64 else [])
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        pad = -(at + _LOCAL.size + len(path) + len(extra) + 4) % _ALIGNMENT
        padding = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        # Flags: UTF-8, and the sizes after the data, which miniz writes wherever there is data.
        flags = 0x0808 if size else 0x0800
        self.file.write(
            _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra + padding)) + path + extra + padding
        )
        self.file.write(data)
        if size:
            descriptor = _DESCRIPTOR64 if full == _ZIP64 else _DESCRIPTOR
            self.file.write(descriptor.pack(b"PK\7\x08", crc, size, size))
        central = (b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, full, full, len(path), len(extra), 0, 0, 0, 0, header)
        self.central.append(_CENTRAL.pack(*central) + path + extra)

    def close(self) -> None:
        """Writes the directory."""
        at, count, central = self.file.tell() - self.start, len(self.central), b"".join(self.central)
        end = at + len(central)
        self.file.write(central)
        self.file.write(_END64.pack(b"PK\6\6", 44, 798, 45, 0, 0, count, count, len(central), at))
        self.file.write(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        few, size, start = min(count, 0xFFFF), min(len(central), _ZIP64), min(at, _ZIP64)
        self.file.write(_END.pack(b"PK\5\6", 0, 0, few, few, size, start, 0))
