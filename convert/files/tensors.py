"""Tensors by name, read in parts, from one file or from the files that an index lists.

`safetensors` and `torch_files` have the two kinds of file. What the names mean is in `formats`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma2_jax.convert.files import safetensors, torch_files
from gemma2_jax.convert.files.memory import Index, Shapes
from gemma2_jax.convert.files.safetensors import read_json


class Tensor(Protocol):
    """A tensor that can be read in parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self, index: Index) -> np.ndarray: ...


class Tensors:
    """Tensors by name: their `shapes`, their stored `dtypes`, and parts of them."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.by_name = tensors
        self.shapes: Shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """The slices `index` of a tensor, as stored."""
        return self.by_name[name].read(index)


def open_tensors(folder: Path, stem: str, optional: Callable[[str], bool] = lambda name: False) -> Tensors:
    """The tensors of `stem`, such as model.safetensors or pytorch_model.bin, or of the files of its index.

    Reads headers only.

    Args:
      optional: whether an index may list a tensor of this name that no file holds, or not list one that a file holds.

    Raises ValueError naming a file that is missing or damaged, or a tensor of which index and files disagree.
    """
    index = folder / f"{stem}.index.json"
    listed = _weight_map(index) if index.exists() else None
    if listed and (folder / stem).exists():
        raise ValueError(f"{folder} has both {stem} and {index.name}; delete the one that is out of date")
    found = dict[str, Tensor]()
    for file in sorted(set(listed.values())) if listed else [stem]:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{path} is missing; download it, or the whole checkpoint, again")
        opened = safetensors.open_file(path) if path.suffix == ".safetensors" else torch_files.open_state_dict(path)
        for name in opened:
            if name in found:
                raise ValueError(f"{path} holds {name}, which another file of {folder} holds too; delete one")
        found |= opened
    for name, file in (listed or {}).items():
        if name not in found and not optional(name):
            raise ValueError(f"{index} says that {file} holds {name}, which it does not; download both again")
    for name in found:
        if listed and name not in listed and not optional(name):
            raise ValueError(f"{folder} holds {name}, which {index.name} does not list; download both again")
    return Tensors(found)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; download it again")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise ValueError(
                f"{path} lists {file!r}; an index may only name {suffix.removeprefix('.')} files in its own folder"
            )
    return weight_map
