"""GGUF files as trees that tests change: every count, length and type can be written, right or wrong."""

import struct
from pathlib import Path
from typing import Any

from gemma2_jax.convert.files.gguf import open_file

Tree = dict[str, Any]  # metadata: values by key; tensors: by name [dims, as in the file], number of the type, offset
_ALIGNMENT = 32


def read_tree(path: Path) -> Tree:
    """The header of a file that has no arrays in it."""
    opened, first = open_file(path), data_start(path)
    numbers = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}
    return {
        "metadata": opened.metadata,
        "tensors": {
            name: [list(reversed(tensor.shape)), numbers[tensor.type], tensor.start - first]
            for name, tensor in opened.tensors.items()
        },
    }


def data_start(path: Path) -> int:
    """Where the tensors of a file begin."""
    return min(tensor.start for tensor in open_file(path).tensors.values())


def write_tree(tree: Tree, data: bytes, counts: tuple[int, int] | None = None) -> bytes:
    """A file with this header, before the bytes of its tensors. Raises ValueError where the format cannot say it.

    Args:
      counts: of tensors and keys, where they are not as many as there are.
    """
    try:
        header = _header(tree, counts)
    except struct.error as error:
        raise ValueError(error) from error
    return header + bytes(-len(header) % _ALIGNMENT) + data


def _header(tree: Tree, counts: tuple[int, int] | None) -> bytes:
    metadata, tensors = tree.get("metadata", {}), tree.get("tensors", {})
    header = b"GGUF" + struct.pack("<I2Q", 3, *(counts or (len(tensors), len(metadata))))
    header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    for name, (dims, kind, offset) in tensors.items():
        header += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return header


def _text(text: str) -> bytes:
    data = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    kind, data = _payload(value)
    return struct.pack("<I", kind) + data


def _payload(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int() if 0 <= value < 1 << 32:
            return 4, struct.pack("<I", value)
        case int() if 0 <= value < 1 << 64:
            return 10, struct.pack("<Q", value)
        case int() if -(1 << 63) <= value < 0:
            return 11, struct.pack("<q", value)
        case float():
            try:
                return 6, struct.pack("<f", value)
            except OverflowError:
                return 12, struct.pack("<d", value)
        case str():
            return 8, _text(value)
        case list():
            parts = [_payload(part) for part in value]
            kind = parts[0][0] if parts else 4
            return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(data for _, data in parts)
    raise ValueError(f"GGUF has no type for {value!r:.50}")
