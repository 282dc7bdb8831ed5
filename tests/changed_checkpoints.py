"""A checkpoint whose files are changed one at a time: in the trees that they hold, in their bytes, and as files.

`fuzzing` changes the bytes of one file alone. `Case` remembers what was changed, and puts it back.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzzing import mutate
from gguf_files import data_start, read_tree, write_tree

from gemma2_jax.convert.files import pickles, torch_files
from gemma2_jax.convert.files.pickles import Record

OUTSIDE = ["../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/environ", "..", "/", ".", "~"]
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2.5, 2.0, -0.0, 1e308, 1e-320, 10**12, 10**18, 2**63, -(2**63), 10**400),
    *(float("nan"), float("inf"), -float("inf"), "", "4", "nan", "a", "\0", "\ud800", "x" * 300, "int8", "float64"),
    *([], {}, [1], [[]], [None, "a"], {"a": 1}, {"": {}}, [0, 10**12], [[0, 1]] * 40, (1, 2)),
    *OUTSIDE,
]
DEEP = "\1deep"  # stands for what JSON's own writer would not write


@dataclass
class Case:
    """A whole checkpoint, with the files that are changed at the moment."""

    root: Path  # the folder of all files that may be read
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("hf", "orbax", "megatron", "megatron-legacy")

    def __post_init__(self) -> None:
        self.files = {path: path.read_bytes() for path in sorted(self.root.rglob("*")) if path.is_file()}
        self.trees: dict[Path, Any] = {path: tree for path in self.files if (tree := _decode(path)) is not None}
        self.listing = list_files(self.root)
        self.changed: list[Path] = []

    def put(self, path: Path, content: bytes | Callable[[Path], object] | None) -> None:
        """Replaces a file by bytes, by whatever the function `content` makes at its path, or removes it (None)."""
        self.changed.append(path)
        _clear(path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            content(path)

    def restore(self) -> None:
        for path in self.changed:
            _clear(path)
            if path in self.files:
                path.write_bytes(self.files[path])
        self.changed = []


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_files(root: Path) -> list[tuple[str, list[str], list[str]]]:
    return sorted((folder, sorted(folders), sorted(files)) for folder, folders, files in os.walk(root))


# The tree that a file holds, and the bytes of a file that holds a tree


def _decode(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".gguf":
        return read_tree(path)
    if path.suffix == ".safetensors":
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if path.suffix in (".json", "") and data[:1] == b"{":
        return json.loads(data)
    if path.suffix == ".yaml":
        return yaml.safe_load(data)
    if path.suffix in (".pt", ".bin"):
        return torch_files.load_torch(path)
    if path.name == ".metadata":
        return pickles.load_pickle(data, path)
    if path.name == "config.txt":
        return dict(line.split(" = ", 1) for line in data.decode().splitlines())
    return None


def _encode(path: Path, tree: Any, before: bytes, chance: random.Random) -> bytes | Callable[[Path], object]:
    if path.suffix in (".pt", ".bin"):
        content = _loaded_tensors(tree)

        def save(path: Path) -> None:
            with path.open("wb") as file:
                torch_files.save_torch(file, content)

        return save
    if path.name == ".metadata":
        return pickles.dump_pickle(tree)
    if path.suffix == ".gguf":
        counts = chance.choice([None] * 8 + [(1 << 40, 1), (1, 1 << 63), (0, 0)])
        return write_tree(tree, before[data_start(path) :], counts)
    if path.name == "config.txt":
        values = {key: value if type(value) is str else repr(value) for key, value in tree.items()}
        return "".join(f"{key} = {value}\n" for key, value in values.items()).encode(errors="surrogatepass")
    text = json.dumps(tree)
    deep = chance.choice([50, 2000, 100_000])
    text = text.replace(json.dumps(DEEP), chance.choice(["[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep]))
    text = text.replace("\\u0001", "")  # a key that began with it is now the same as another
    if path.suffix != ".safetensors":
        return text.encode()
    header = text.encode()
    size = chance.choice([len(header)] * 8 + [0, len(header) - 1, len(header) + 8, 1 << 40, (1 << 64) - 1])
    return size.to_bytes(8, "little") + header + before[8 + int.from_bytes(before[:8], "little") :]


class _LoadedTensor:
    """A tensor of a torch file, in memory, as the file may be replaced before the tensor is written again."""

    def __init__(self, stored: torch_files.Stored):
        self.shape, self.dtype, self.array = stored.shape, stored.dtype, stored.read()

    def read(self) -> np.ndarray:
        return self.array


def _loaded_tensors(tree: Any) -> Any:
    match tree:
        case dict():
            return {key: _loaded_tensors(value) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(map(_loaded_tensors, tree))
        case torch_files.Stored():
            return _LoadedTensor(tree)
    return tree


# Changes


def _children(tree: Any) -> list[Any]:
    match tree:
        case dict():
            return list(tree)
        case list() | tuple():
            return list(range(len(tree)))
        case Record():
            return ["state"] if isinstance(tree.state, dict | tuple | list) else []
    return []


def _child(tree: Any, key: Any) -> Any:
    return tree.state if isinstance(tree, Record) else tree[key]


def _paths(tree: Any, depth: int = 8) -> Iterator[tuple]:
    for key in _children(tree):
        yield (key,)
        if depth:
            yield from ((key, *rest) for rest in _paths(_child(tree, key), depth - 1))


def _replace_part(tree: Any, path: tuple, change: Callable[[Any], Any]) -> Any:
    """The tree with the value at `path` changed; a `KeyError` of `change` removes the value."""
    if not path:
        return change(tree)
    key, *rest = path
    if isinstance(tree, Record):
        state = None if not rest and change is _remove else _replace_part(tree.state, tuple(rest), change)
        return Record(tree.name, tree.args, state, tree.new)
    try:
        new = _replace_part(tree[key], tuple(rest), change)
    except KeyError:
        if isinstance(tree, dict):
            return {k: v for k, v in tree.items() if k is not key}
        return type(tree)(value for at, value in enumerate(tree) if at != key)
    if isinstance(tree, dict):
        return {k: new if k is key else v for k, v in tree.items()}
    return type(tree)(new if at == key else value for at, value in enumerate(tree))


def _remove(value: Any) -> Any:
    raise KeyError


def _similar_value(value: Any, chance: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return chance.choice([value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value)])
    if isinstance(value, str):
        return chance.choice([value + "x", value[:-1], value.upper(), value.replace("0", "1"), value * 3, [value]])
    return chance.choice(HOSTILE)


def edit_tree(tree: Any, chance: random.Random) -> Any:
    """A tree with one thing changed in it."""
    top = [(key,) for key in _children(tree)]
    paths = list(_paths(tree)) if chance.random() < 0.6 else top
    if not paths:
        return chance.choice(HOSTILE)
    path, other = chance.choice(paths), chance.choice(paths)
    at = tree
    for key in other:
        at = _child(at, key)
    match chance.randrange(8):
        case 0:
            return _replace_part(tree, path, _remove)
        case 1 | 2 | 3:
            value = chance.choice(HOSTILE)
            return _replace_part(tree, path, lambda _: value)
        case 4 | 5:
            return _replace_part(tree, path, lambda value: _similar_value(value, chance))
        case 6:
            return _replace_part(tree, path, lambda _: at)
    if isinstance(path[-1], str) and not any(isinstance(key, Record) for key in path):
        value = chance.choice([at, *HOSTILE])
        key = chance.choice(["\1" + path[-1], path[-1] + "x", chance.choice(OUTSIDE)])
        return _replace_part(tree, path[:-1], lambda part: {**part, key: value} if isinstance(part, dict) else value)
    return _replace_part(tree, path, lambda _: DEEP)


def change(case: Case, chance: random.Random) -> str:
    """Changes one thing in the folder; gives a description of the change."""
    path = chance.choice(list(case.trees) if chance.random() < 0.5 else list(case.files))
    before, name = case.files[path], path.relative_to(case.root)
    if path in case.trees and chance.random() < 0.75:
        tree = edit_tree(case.trees[path], chance)
        try:
            case.put(path, _encode(path, tree, before, chance))
        except (TypeError, OverflowError, ValueError, RecursionError, AttributeError, AssertionError) as error:
            case.put(path, before)  # the test's writers have no place for every tree
            return f"{name} as it was: {error}"
        return f"{name} as a tree: {path.read_bytes()[:3000] if len(before) < 3000 else 'long'}"
    kind = chance.choice(list(KINDS))
    KINDS[kind](case, path, chance)
    return f"{name}: {kind}"


def _cut_short(case: Case, path: Path, chance: random.Random) -> None:
    case.put(path, case.files[path][: chance.randrange(len(case.files[path]) or 1)])


def _swap(case: Case, path: Path, chance: random.Random) -> None:
    other = chance.choice(list(case.files))
    case.put(path, case.files[other])
    case.put(other, case.files[path])


def _add_file(case: Case, path: Path, chance: random.Random) -> None:
    """Adds a file where a reader may look for one."""
    names = [
        "pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    names += ["config.json", "manifest.ocdbt", "_METADATA", ".zarray", "zarr.json", "common.pt", ".metadata"]
    names += [
        "mp_rank_00",
        "mp_rank_9999_9999",
        "mp_rank_x",
        "mp_rank_01",
        "run_config.yaml",
        "tokenizer.json",
        "²",
        "state",
    ]
    new = path.parent / chance.choice(names)
    if not new.exists():
        case.put(new, chance.choice([b"", b"{}", b"x", other_bytes(case, chance), Path.mkdir]))


def other_bytes(case: Case, chance: random.Random) -> bytes:
    return case.files[chance.choice(list(case.files))]


def _empty_folder(case: Case, path: Path, chance: random.Random) -> None:
    """Removes the files of a folder of the checkpoint."""
    folder = chance.choice([parent for parent in path.parents if parent.is_relative_to(case.folder)] or [path.parent])
    for file in [file for file in case.files if file.is_relative_to(folder)]:
        case.put(file, None)


KINDS: dict[str, Callable[[Case, Path, random.Random], object]] = {
    "cut short": _cut_short,
    "bytes": lambda case, path, chance: case.put(path, mutate(case.files[path] or b"x", chance)),
    "bytes again": lambda case, path, chance: case.put(path, mutate(case.files[path] or b"x", chance)),
    "longer": lambda case, path, chance: case.put(path, case.files[path] + bytes(chance.randrange(1, 100))),
    "gone": lambda case, path, chance: case.put(path, None),
    "empty": lambda case, path, chance: case.put(path, b""),
    "a folder": lambda case, path, chance: case.put(path, Path.mkdir),
    "a pipe": lambda case, path, chance: case.put(path, os.mkfifo),
    "a link": lambda case, path, chance: case.put(
        path, lambda new: new.symlink_to(chance.choice([new.name, "gone", "/dev/zero", ".", *list(case.files)]))
    ),
    "swapped": _swap,
    "one more": _add_file,
    "emptied": _empty_folder,
    "other text": lambda case, path, chance: case.put(
        path, chance.choice(["1", "-1", "release", "1e9", "9" * 5000, "[]", "null", "\ud800", "\0", "é" * 50, *OUTSIDE])
        .encode(errors="surrogatepass"),
    ),
}  # fmt: skip
