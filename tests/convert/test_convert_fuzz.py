"""Whole checkpoints of every format with one thing changed: a checkpoint, or one sentence that says what is wrong.

`test_torch_files`, `test_torch_dist` and `test_megatron_config` change the bytes of single files; here it is folders,
and the trees that their files hold. Whatever was changed, opening and reading ends soon, takes little memory,
imports nothing, opens no file outside and writes none.
"""

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from fuzzing import mutate
from gguf_files import data_start, read_tree, write_tree
from megatron_files import FIXTURES
from peers import BITING
from small_runs import saved_run
from strange_folders import deepmind_tree, kaggle_tree, save_tree

from gemma2_jax.config import Config, OptimConfig, TrainConfig
from gemma2_jax.convert import checkpoints
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.files import gguf as gguf_files, pickles, safetensors, torch_files
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.formats import gguf, table
from gemma2_jax.convert.formats.hf_config import hf_config
from gemma2_jax.convert.formats.peft_config import peft_config
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import AdapterConfig

TINY = replace(
    BITING["2b"], layers=2, width=8, mlp_width=12, heads=4, kv_heads=2, head_width=4, vocab_size=16, max_length=32
)
LORA = AdapterConfig(kind="lora", rank=2, alpha=4.0, targets=tuple(table.PROJECTIONS))
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
        self.listing = _listing(self.root)
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


def _listing(root: Path) -> list[tuple[str, list[str], list[str]]]:
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


# Checkpoints


def _tensors(folder: Path, stem: str, rows: tuple[table.Row, ...], dtype=jnp.float32, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = table.tensor_shapes(rows, TINY)
    wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    numbers = np.random.default_rng(0)
    parts = (numbers.normal(size=shape).astype(dtype) for shape in shapes.values())
    files = safetensors.ShardedFiles(folder, stem, **options)
    safetensors.write_safetensors(files, wanted, parts, lambda size: None)
    return folder


def _model(folder: Path, **options) -> Path:
    _tensors(folder, safetensors.MODEL, table.MODEL, **options)
    safetensors.write_json(folder / "config.json", hf_config(TINY, "float32"))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _adapter(folder: Path, base: Path, adapter: AdapterConfig = LORA) -> Path:
    _tensors(folder, safetensors.ADAPTER, table.table_rows(adapter, TINY.layers))
    safetensors.write_json(folder / "adapter_config.json", peft_config(adapter, str(base), TINY.layers))
    return folder


def _huggingface(root: Path) -> Case:
    return Case(root, _model(root / "hf"))


def _sharded(root: Path) -> Case:
    return Case(root, _model(root / "sharded", shard_bytes=3000))


def _bin(root: Path) -> Case:
    """pytorch_model.bin in two shards."""
    folder = _model(root / "bin")
    tensors = {
        name: stored.read((slice(None),) * len(stored.shape))
        for name, stored in safetensors.open_file(folder / safetensors.MODEL).items()
    }
    (folder / safetensors.MODEL).unlink()
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        with (folder / file).open("wb") as opened:
            torch_files.save_torch(opened, {name: x for name, x in tensors.items() if weight_map[name] == file})
    safetensors.write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    return Case(root, folder, targets=("hf",))


def _deepmind(ocdbt: bool) -> Callable[[Path], Case]:
    def build(root: Path) -> Case:
        numbers = np.random.default_rng(0)
        shapes = table.array_shapes(table.MODEL, TINY)
        arrays = {path: numbers.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
        tree = deepmind_tree(arrays, transposed=True, padding=3)
        save_tree(root / "1" / "gemma", kaggle_tree(tree), use_ocdbt=ocdbt)
        return Case(root, root / "1", {"model": TINY}, targets=("hf",))

    return build


def _lora(root: Path) -> Case:
    return Case(root, _adapter(root / "peft", _model(root / "hf")), targets=("peft", "orbax", "megatron-adapter"))


def _dora(root: Path) -> Case:
    folder = _adapter(root / "peft", Path("gone"), replace(LORA, kind="dora"))
    _model(root / "hf").joinpath(safetensors.MODEL).unlink()
    return Case(root, folder, {"hf_config": root / "hf"}, targets=("peft",))


def _options(root: Path) -> Case:
    """Layers, ranks, alphas, tokens and a norm of their own, in PEFT's older kind of file."""
    folder, numbers = root / "peft", np.random.default_rng(0)
    _model(root / "hf")
    folder.mkdir()
    shapes = {
        "layers.1.self_attn.q_proj.lora_A.weight": (2, 8),
        "layers.1.self_attn.q_proj.lora_B.weight": (16, 2),
        "layers.1.mlp.down_proj.lora_A.weight": (3, 12),
        "layers.1.mlp.down_proj.lora_B.weight": (8, 3),
        "layers.0.input_layernorm.weight": (8,),
        "layers.1.input_layernorm.weight": (8,),
        "embed_tokens.token_adapter.trainable_tokens_delta": (2, 8),
    }
    tensors = {f"{table.PEFT}model.{name}": numbers.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    with (folder / "adapter_model.bin").open("wb") as file:
        torch_files.save_torch(file, tensors)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(root / "hf"),
        "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
        "rank_pattern": {"down_proj": 3}, "alpha_pattern": {r".*\.q_proj": 2.5}, "exclude_modules": ["lm_head"],
        "modules_to_save": ["input_layernorm"], "trainable_token_indices": [1, 5],
    }  # fmt: skip
    safetensors.write_json(folder / "adapter_config.json", config)
    return Case(root, folder, targets=("peft", "orbax", "merged"))


def _orbax(root: Path) -> Case:
    both = open_checkpoint(_adapter(root / "peft", _model(root / "hf")))
    write_checkpoint(Job(source=both, to="orbax"), root / "orbax")
    shutil.rmtree(root / "hf")
    shutil.rmtree(root / "peft")
    return Case(root, root / "orbax", targets=("peft", "orbax", "merged"))


def _trained(root: Path) -> Case:
    base = _model(root / "hf")
    config = Config(
        workdir="x", model=TINY, adapter=LORA, optim=OptimConfig(lr=1.0), init=str(base),
        train=TrainConfig(sequence_length=8),
    )  # fmt: skip
    shapes = table.array_shapes(table.table_rows(LORA, TINY.layers), TINY)
    folder = saved_run(root / "run", config, {3: {path: np.ones(at, "f4") for path, at in shapes.items()}})
    return Case(root, folder, targets=("peft", "orbax", "merged"))


def _trained_whole(root: Path) -> Case:
    base = _model(root / "hf")
    config = Config(
        workdir="x", model=TINY, optim=OptimConfig(lr=1.0), init=str(base), train=TrainConfig(sequence_length=8)
    )
    weights = {path: np.ones(shape, "f4") for path, shape in table.array_shapes(table.MODEL, TINY).items()}
    return Case(root, saved_run(root / "run", config, {9: weights, 10: weights}))


def _megatron(root: Path) -> Case:
    write_checkpoint(Job(source=open_checkpoint(_model(root / "hf")), to="megatron"), root / "megatron")
    shutil.rmtree(root / "hf")
    return Case(root, root / "megatron")


def _legacy(root: Path) -> Case:
    write_checkpoint(
        Job(source=open_checkpoint(_model(root / "hf")), to="megatron-legacy", ranks=(2, 2)), root / "legacy"
    )
    (root / "hf" / safetensors.MODEL).unlink()
    return Case(root, root / "legacy", {"hf_config": root / "hf"})


def _megatron_adapter(root: Path) -> Case:
    source = open_checkpoint(_adapter(root / "peft", _model(root / "hf")))
    write_checkpoint(Job(source=source, to="megatron-adapter"), root / "megatron")
    shutil.rmtree(root / "peft")
    return Case(root, root / "megatron", {"base": root / "hf"}, targets=("peft", "orbax", "megatron-adapter"))


def _fixture(name: str, config: bool = False) -> Callable[[Path], Case]:
    def build(root: Path) -> Case:
        shutil.copytree(FIXTURES / name, root / "megatron")
        options = {}
        if config:
            (root / "hf").mkdir()
            shutil.copy(FIXTURES / "hf" / "A_f32" / "config.json", root / "hf")
            options = {"hf_config": root / "hf"}
        return Case(root, root / "megatron", options, targets=())

    return build


def _gguf(root: Path) -> Case:
    config = replace(TINY, width=32, mlp_width=64, query_pre_attn_scalar=TINY.head_width, heads=8)
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ bos_token }}",
        "tokenizer.huggingface.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}),
    }
    dtypes = {path: "float32" if gguf.is_norm(path) else "q8_0" for path in (row.path for row in gguf.MODEL)}
    return _gguf_case(root, gguf.model_metadata(config, "model", "q8_0") | tokenizer, gguf.MODEL, config, dtypes)


def _gguf_adapter(root: Path) -> Case:
    rows = gguf.rename_rows(table.table_rows(LORA, TINY.layers))
    case = _gguf_case(root, gguf.adapter_metadata(LORA, "hf"), rows, TINY, {row.path: "bfloat16" for row in rows})
    return replace(case, options={"base": _model(root / "hf")}, targets=("peft", "orbax", "merged"))


def _gguf_case(root: Path, metadata, rows: tuple[table.Row, ...], config, dtypes: dict[str, str]) -> Case:
    shapes, wanted = table.tensor_shapes(rows, config), {}
    for row in rows:
        for name in row.names(config.layers):
            wanted[name] = gguf_files.Wanted(shapes[name], dtypes[row.path])
    numbers = np.random.default_rng(0)
    parts = [
        numbers.normal(size=want.shape).astype("float32" if want.dtype == "q8_0" else want.dtype)
        for want in wanted.values()
    ]
    (root / "gguf").mkdir(parents=True)
    gguf_files.write_gguf(root / "gguf/model.gguf", metadata, wanted, parts, lambda size: None)
    return Case(root, root / "gguf", targets=("hf", "orbax", "megatron"))


# Each format with the number of changes in the normal suite.
FORMATS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "huggingface": (_huggingface, 400),
    "sharded": (_sharded, 300),
    "bin": (_bin, 120),
    "deepmind": (_deepmind(ocdbt=True), 40),
    "deepmind without a database": (_deepmind(ocdbt=False), 40),
    "lora": (_lora, 200),
    "options of adapters": (_options, 100),
    "dora": (_dora, 200),
    "orbax": (_orbax, 150),
    "run": (_trained, 80),
    "whole run": (_trained_whole, 60),
    "torch_dist": (_megatron, 120),
    "legacy": (_legacy, 150),
    "adapter": (_megatron_adapter, 100),
    "bridge": (_fixture("torch_dist/A_bf16_tp2pp2"), 30),
    "bridge adapter": (_fixture("peft/A_f32_dora_tp1pp1", config=True), 30),
    "gguf": (_gguf, 200),
    "gguf adapter": (_gguf_adapter, 100),
    "megatron_lm": (_fixture("megatron_lm/A_f32_tp1pp1", config=True), 50),
    "optimizer": (_fixture("optimizer/A_bf16_tp1pp1"), 20),
    "legacy of theirs": (_fixture("legacy/A_bf16_tp2pp2", config=True), 50),
}


def read_all(checkpoint: Checkpoint, chance: random.Random) -> None:
    """Reads every array in parts, and asserts their shapes and dtypes."""
    for path, stored in checkpoint.shapes.items():
        cut = chance.randrange(stored.shape[0] + 1)
        rest = [slice(*sorted(chance.choices(range(size + 1), k=2))) for size in stored.shape[1:]]
        for index in ((slice(0, cut),), (slice(cut, stored.shape[0]),), (slice(0, stored.shape[0]), *rest)):
            index = (*index, *[slice(None)] * (len(stored.shape) - len(index)))
            wanted = tuple(len(range(size)[at]) for size, at in zip(stored.shape, index, strict=True))
            if all(wanted):
                part = checkpoints.read_array(checkpoint, path, index)
                assert (part.shape, part.dtype) == (wanted, stored.dtype), path


def convert(checkpoint: Checkpoint, to: str, case: Case, chance: random.Random) -> None:
    """Writes it in another format: whole, or not at all."""
    target = case.root.parent / "out" / to
    try:
        job = Job(source=checkpoint, to="hf" if to == "merged" else to, merge=to == "merged")
        write_checkpoint(job, target)
    except (ValueError, OSError):
        assert not target.exists()
        raise
    finally:
        assert [path for path in target.parent.iterdir() if path != target] == []
    alone = to in ("peft", "megatron-adapter")
    again = open_checkpoint(target, model=checkpoint.model) if to == "megatron-legacy" else open_checkpoint(target)
    assert again.shapes == {path: shape for path, shape in checkpoint.shapes.items() if path in again.shapes}
    assert alone or "embedding" in again.shapes
    read_all(again, chance)
    shutil.rmtree(target)


@contextmanager
def watched(opened: list[tuple[str, str]]) -> Iterator[None]:
    """Appends every file that Python opens in the `with` block, with its mode."""
    _WATCHING.append(opened)
    try:
        yield
    finally:
        _WATCHING.remove(opened)


_WATCHING: list[list[tuple[str, str]]] = []


def _audit(event: str, args: tuple) -> None:
    if event == "open" and _WATCHING:
        _WATCHING[-1].append((os.fsdecode(args[0]) if not isinstance(args[0], int) else "", str(args[1])))


sys.addaudithook(_audit)  # a hook cannot be removed


def attempt(case: Case, chance: random.Random) -> bool:
    """Whether the checkpoint as it is now was read; fails where it is refused in another way than by a sentence."""
    before, opened, start, modules = _listing(case.root), list[tuple[str, str]](), time.process_time(), set(sys.modules)
    try:
        with watched(opened):
            checkpoint = open_checkpoint(case.folder, **case.options)
            read_all(checkpoint, chance)
            if chance.random() < 0.1:
                loaded = checkpoints.load_weights(checkpoint, checkpoint.shapes)
                assert {path: (x.shape, x.dtype) for path, x in loaded.items()} == {
                    path: (x.shape, x.dtype) for path, x in checkpoint.shapes.items()
                }
        if case.targets and chance.random() < 0.1:
            convert(checkpoint, chance.choice(case.targets), case, chance)
        read = True
    except (ValueError, OSError) as error:
        if not any(place in str(error) for place in (str(case.root.parent), *OUTSIDE)):
            raise
        read = False
    assert time.process_time() - start < 5  # an attack that works takes minutes
    assert _listing(case.root) == before
    assert [file for file, mode in opened if not file.startswith(str(case.root)) or "w" in mode] == []
    assert set(sys.modules) - modules == set()
    return read


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_with_one_thing_changed_is_read_or_refused_in_a_sentence(name, times, tmp_path, monkeypatch):
    case, count = make_case(name, tmp_path, monkeypatch), FORMATS[name][1] * times
    peak, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in range(count):
        chance = random.Random(f"{name} {number}")
        what = change(case, chance)
        try:
            read += attempt(case, chance)
        except BaseException as error:
            error.add_note(f"{name} {number}: {what}")
            raise
        case.restore()
    assert _listing(case.root) == case.listing
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10
    assert count / 20 < read < count


def make_case(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The checkpoint as it should be; the working directory is in the folder that all is read from."""
    (folder / "root" / "cwd").mkdir(parents=True)
    (folder / "out").mkdir()
    monkeypatch.chdir(folder / "root" / "cwd")
    case = FORMATS[name][0](folder / "root")
    whole = open_checkpoint(case.folder, **case.options)
    read_all(whole, random.Random(0))
    checkpoints.load_weights(whole, whole.shapes)
    for to in case.targets:
        convert(whole, to, case, random.Random(0))
    return case
