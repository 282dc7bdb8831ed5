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
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changed_checkpoints import OUTSIDE, Case, change, list_files
from megatron_files import FIXTURES
from peers import BITING
from small_runs import saved_run
from strange_folders import deepmind_tree, kaggle_tree, save_tree

from gemma2_jax.config import Config, OptimConfig, TrainConfig
from gemma2_jax.convert import checkpoints
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.files import gguf as gguf_files, safetensors, torch_files
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
    "huggingface": (_huggingface, 200),
    "sharded": (_sharded, 150),
    "bin": (_bin, 60),
    "deepmind": (_deepmind(ocdbt=True), 20),
    "deepmind without a database": (_deepmind(ocdbt=False), 20),
    "lora": (_lora, 100),
    "options of adapters": (_options, 50),
    "dora": (_dora, 100),
    "orbax": (_orbax, 75),
    "run": (_trained, 40),
    "whole run": (_trained_whole, 30),
    "torch_dist": (_megatron, 60),
    "legacy": (_legacy, 75),
    "adapter": (_megatron_adapter, 50),
    "bridge": (_fixture("torch_dist/A_bf16_tp2pp2"), 15),
    "bridge adapter": (_fixture("peft/A_f32_dora_tp1pp1", config=True), 15),
    "gguf": (_gguf, 100),
    "gguf adapter": (_gguf_adapter, 50),
    "megatron_lm": (_fixture("megatron_lm/A_f32_tp1pp1", config=True), 25),
    "optimizer": (_fixture("optimizer/A_bf16_tp1pp1"), 10),
    "legacy of theirs": (_fixture("legacy/A_bf16_tp2pp2", config=True), 25),
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
    before, opened, start, modules = (
        list_files(case.root),
        list[tuple[str, str]](),
        time.process_time(),
        set(sys.modules),
    )
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
    assert list_files(case.root) == before
    assert [file for file, mode in opened if not file.startswith(str(case.root)) or "w" in mode] == []
    assert set(sys.modules) - modules == set()
    return read


@pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.exhaustive)])
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
    assert list_files(case.root) == case.listing
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
