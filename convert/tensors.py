"""Folders of safetensors files: one, or several with an index, read by slices and written one file at a time.

Names and layouts are `table`'s, this module knows bytes only. Reading opens headers; a tensor's bytes are read when a
slice is asked for. Writing holds one file's tensors in memory.
"""

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma2_jax.convert.table import Index, Shapes

MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
SHARD_BYTES = 5_000_000_000  # as Hugging Face's own writer has it

_DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}


class Tensors:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path, stem: str):
        """Opens `stem` (model.safetensors) or the files of its index, and reads their headers."""
        self.folder, self.shapes, self.dtypes, self._files = folder, Shapes(), dict[str, np.dtype](), dict[str, Any]()
        index = folder / f"{stem}.index.json"
        listed = _weight_map(index) if index.exists() else None
        if listed and (folder / stem).exists():
            raise ValueError(f"{folder} has both {stem} and {index.name}; delete the one that is out of date")
        for name in sorted(set(listed.values())) if listed else [stem]:
            self._open(folder / name)
        for name, file in (listed or {}).items():
            if name not in self.shapes:
                raise ValueError(f"{index} says that {file} holds {name}, which it does not; download both again")
        for name in self.shapes:
            if listed and name not in listed:
                raise ValueError(f"{folder} holds {name}, which {index.name} does not list; download both again")

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, as stored."""
        return self._files[name].get_slice(name)[index]

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is missing; download it, or the whole checkpoint, again")
        try:
            file = safe_open(path, framework="np")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error
        for name in file.offset_keys():
            if name in self._files:
                raise ValueError(f"{path} holds {name}, which another file of {self.folder} holds too; delete one")
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: {name} is stored as {tensor.get_dtype()}; this program reads {', '.join(_DTYPES)}, "
                    "so use the checkpoint before it was quantized"
                )
            self._files[name] = file
            self.shapes[name] = tuple(tensor.get_shape())
            self.dtypes[name] = np.dtype(_DTYPES[tensor.get_dtype()])


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} lists {file!r}; an index may only name safetensors files in its own folder")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file when it is missing or something else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy it beside the weights") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object as Hugging Face's libraries do: sorted, two spaces."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write(
    folder: Path,
    stem: str,
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, np.ndarray]],
    moved: Callable[[float], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `tensors` as `stem`, or as numbered files and an index where they take more than `shard_bytes`.

    Args:
      sizes: bytes of each tensor, in the order in which `tensors` come.
      moved: told of bytes: half of a tensor's when it has been read, half when it is on disk.
    """
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    base = stem.removesuffix(".safetensors")
    files = [f"{base}-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    stream = iter(tensors)
    for file, names in zip(files if len(shards) > 1 else [stem], shards, strict=True):
        # The library wants contiguous arrays; and a copy does not keep alive the stack that it was cut from.
        held = dict[str, np.ndarray]()
        for name, tensor in islice(stream, len(names)):
            held[name] = np.array(tensor, order="C")
            moved(tensor.nbytes / 2)
        assert {name: array.nbytes for name, array in held.items()} == {name: sizes[name] for name in names}
        try:
            save_file(held, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} could not be written: {error}") from error
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library lets only its user read a file
        moved(sum(sizes[name] for name in names) / 2)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        write_json(folder / f"{stem}.index.json", {"metadata": total, "weight_map": weight_map})
