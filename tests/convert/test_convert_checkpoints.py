"""Checkpoints as folders: told apart, read by slices, written whole or not at all, and exact through every format."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import torch
import transformers
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from peers import BITING, hf_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_runs import saved_run

from gemma2_jax import config_text, mesh as meshes, recipes
from gemma2_jax.config import Config, MeshConfig, OptimConfig
from gemma2_jax.convert import job, sources
from gemma2_jax.convert.__main__ import main
from gemma2_jax.convert.checkpoints import load_weights
from gemma2_jax.convert.files import folder, memory, orbax, safetensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.hf_config import hf_config
from gemma2_jax.convert.job import Format, Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import AdapterConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Every biting model as transformers writes it, in one file."""
    folder = tmp_path_factory.mktemp("hf")
    return {(name, dtype): _save_model(folder / f"{name}-{dtype}", name, dtype) for name in BITING for dtype in DTYPES}


def _save_model(path: Path, name: str, dtype: str, **options) -> Path:
    hf_model(BITING[name]).to(DTYPES[dtype]).save_pretrained(path, **options)
    for file, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "{{ bos_token }}")):
        (path / file).write_text(text)
    return path


@pytest.fixture
def copy(hf, tmp_path) -> Path:
    """A float32 model that a test may damage."""
    return Path(shutil.copytree(hf["2b", "float32"], tmp_path / "copy"))


def _convert(source: Path, target: Path, to: Format, **options) -> Path:
    write_checkpoint(Job(source=open_checkpoint(source), to=to, **options), target)
    return target


def _load_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _are_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and left[key].tobytes() == right[key].tobytes() for key in left
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BITING)
def test_round_trip_through_orbax_is_exact(hf, tmp_path, name, dtype):
    orbax = _convert(hf[name, dtype], tmp_path / "orbax", "orbax")
    back = _convert(orbax, tmp_path / "back", "hf")
    assert _are_same(_load_tensors(back), _load_tensors(hf[name, dtype]))
    found = open_checkpoint(orbax)
    assert (found.format, found.model, found.tokenizer) == ("orbax", BITING[name], orbax)
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (back / file).read_bytes() == (hf[name, dtype] / file).read_bytes()
    assert back.joinpath("model.safetensors").stat().st_mode & 0o777 == (back / "config.json").stat().st_mode & 0o777


def test_matrices_are_transposed_block_by_block(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)  # 6 of 96 rows
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 2000)  # 5 of 36 rows
    monkeypatch.setattr(memory, "_ROWS", 4)
    monkeypatch.setattr(memory, "_COLUMNS", 7)
    copied = []

    def copy_counted(target, source):
        copied.append(source.nbytes)
        memory.copy_array(target, source)

    monkeypatch.setattr(job, "copy_array", copy_counted)
    stored = _convert(hf["2b", "float32"], tmp_path / "orbax", "orbax")
    assert max(copied) <= 1000 and len(copied) > 3 * 3 * 10
    copied.clear()
    assert _are_same(_load_tensors(_convert(stored, tmp_path / "back", "hf")), _load_tensors(hf["2b", "float32"]))
    assert max(copied) <= 2000 and len(copied) > 3 * 2 * 5
    bfloat16 = _convert(stored, tmp_path / "bf16", "hf", dtype="bfloat16")
    assert _are_same(_load_tensors(bfloat16), _load_tensors(hf["2b", "bfloat16"]))


def test_parts_of_chunks_are_read_from_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 200)  # at most 5 rows of 10
    stack, norm = np.arange(2 * 9 * 10, dtype=np.float32).reshape(2, 9, 10), np.arange(7).astype(jnp.bfloat16)
    writer = orbax.Writer(tmp_path / "out", {"blocks/w": stack, "norm": norm})
    for layer in range(2):
        writer.write("blocks/w", (slice(layer, layer + 1), slice(0, 9), slice(0, 10)), stack[layer : layer + 1])
    writer.write("norm", (slice(0, 7),), norm)
    reader, calls = orbax.Reader(tmp_path / "out"), []
    read_bytes = orbax.read_bytes
    monkeypatch.setattr(orbax, "read_bytes", lambda *place: calls.append(place[1:]) or read_bytes(*place))
    folder = tmp_path / "out" / "blocks.w"
    for index, place in (
        ((slice(1, 2), slice(5, 8), slice(None)), (0, 120)),  # in the last chunk, which has 4 rows of 5
        ((slice(0, 1), slice(1, 5), slice(3, 9)), (40, 160)),
        ((slice(0, 1), slice(3, 7), slice(None)), None),  # in two chunks, which TensorStore joins
        ((slice(0, 2), slice(0, 3), slice(None)), None),
    ):
        calls.clear()
        np.testing.assert_array_equal(reader.read("blocks/w", index), stack[index])
        assert calls == ([] if place is None else [place]), index
    np.testing.assert_array_equal(reader.read("norm", (slice(2, 6),)), norm[2:6])
    assert calls == [(4, 8)]
    os.truncate(folder / "1.1.0", 199)
    (folder / "0.0.0").unlink()
    for layer, start in ((1, 5), (0, 0)):
        with pytest.raises(ValueError, match=r"out: blocks/w is damaged \(.*\); copy it again"):
            reader.read("blocks/w", (slice(layer, layer + 1), slice(start, start + 2), slice(None)))
    metadata = json.loads((folder / ".zarray").read_text())
    for key, value in {"order": "F", "dtype": ">f4", "compressor": {"id": "zlib", "level": 1}}.items():
        calls.clear()
        (folder / ".zarray").write_text(json.dumps(metadata | {key: value}))
        with suppress(ValueError):  # what is stored is not of this kind
            orbax.Reader(tmp_path / "out").read("blocks/w", (slice(1, 2), slice(0, 2), slice(None)))
        assert calls == [], key


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_restores_what_is_written(hf, tmp_path, dtype):
    written = _convert(hf["2b", dtype], tmp_path / "orbax", "orbax") / "weights"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(written)
    assert _are_same(flatten_dict(tree, sep="/"), table.from_hf(_load_tensors(hf["2b", dtype]), BITING["2b"]))


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("zarr3", [False, True])
def test_what_orbax_writes_is_read(copy, tmp_path, ocdbt, zarr3):
    weights = table.from_hf(_load_tensors(copy), BITING["2b"])
    weights["embedding"] = weights["embedding"].astype(jnp.bfloat16)
    weights_folder = tmp_path / "orbax" / "weights"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    handler.save(epath.Path(weights_folder), args=ocp.args.PyTreeSave(unflatten_dict(weights, sep="/")))
    handler.finalize(epath.Path(weights_folder))
    handler.close()
    shutil.copy(copy / "config.json", weights_folder.parent)
    found = open_checkpoint(weights_folder.parent)
    assert _are_same({path: np.asarray(w) for path, w in load_weights(found, found.shapes).items()}, weights)
    if ocdbt:  # an OCDBT database holds the metadata of arrays too
        database = ts.KvStore.open(
            {"driver": "ocdbt", "base": {"driver": "file", "path": f"{weights_folder}/"}}
        ).result()
        name = "zarr.json" if zarr3 else ".zarray"
        database.write(f"final_norm.w/{name}", b"[" * 100_000).result()
    else:
        (weights_folder / "final_norm.w" / "zarr.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"weights.*final_norm.w.* is not (the metadata|that) of an array"):
        open_checkpoint(weights_folder.parent)  # where TensorStore overflows its stack


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_read_and_written(hf, tmp_path, monkeypatch, dtype):
    small_shards = partial(safetensors.ShardedFiles, shard_bytes=50_000)
    monkeypatch.setattr(safetensors, "ShardedFiles", small_shards)
    sharded = _save_model(tmp_path / "sharded", "2b", dtype, max_shard_size="50KB")
    ours = _convert(sharded, tmp_path / "ours", "hf")
    assert _are_same(_load_tensors(ours), _load_tensors(hf["2b", dtype]))
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(file.name for file in ours.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    with safe_open(ours / files[0], framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers 4 wants to be told
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in _load_tensors(ours).values())
    assert _are_same(_load_tensors(_convert(ours, tmp_path / "back", "hf")), _load_tensors(hf["2b", dtype]))


@pytest.mark.parametrize("name", BITING)
def test_transformers_loads_what_is_written(hf, tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    target = _convert(_convert(hf[name, "float32"], tmp_path / "orbax", "orbax"), tmp_path / "hf", "hf")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert not caplog.records
    config = loaded.config
    assert (config.query_pre_attn_scalar, config.sliding_window) == (BITING[name].query_pre_attn_scalar, 8)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        wanted = hf_model(BITING[name])(tokens).logits
        assert torch.equal(loaded.set_attn_implementation("eager") or loaded(tokens).logits, wanted)


def test_dtype_is_cast_when_asked_for(hf, tmp_path):
    bfloat16 = _convert(hf["2b", "float32"], tmp_path / "bf16", "hf", dtype="bfloat16")
    assert _are_same(_load_tensors(bfloat16), _load_tensors(hf["2b", "bfloat16"]))  # both round to nearest even
    config = json.loads((bfloat16 / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_load_reads_slices_into_any_sharding(hf, tmp_path, to):
    source = open_checkpoint(_convert(hf["2b", "float32"], tmp_path / "source", to))
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted = {
        row.path: jax.ShapeDtypeStruct(
            source.shapes[row.path].shape,
            jnp.bfloat16,
            sharding=meshes.stored_sharding(mesh, row.letters, source.shapes[row.path].shape),
        )
        for row in table.MODEL
    }
    loaded = load_weights(source, wanted)
    whole = table.from_hf(_load_tensors(hf["2b", "float32"]), BITING["2b"])
    for path, want in wanted.items():
        assert loaded[path].sharding == want.sharding and loaded[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(loaded[path], whole[path].astype(jnp.bfloat16))
    embedding = {"embedding": jax.ShapeDtypeStruct((384, 36), jnp.float32)}
    np.testing.assert_array_equal(load_weights(source, embedding)["embedding"], whole["embedding"])


def test_a_device_s_slice_is_all_that_is_read(hf, monkeypatch):
    source = open_checkpoint(hf["2b", "float32"])
    read = safetensors.StoredTensor.read
    sizes = []

    def read_counted(self, index):
        part = read(self, index)
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(safetensors.StoredTensor, "read", read_counted)
    shape = source.shapes["blocks/attn/q/w"]
    sharding = meshes.stored_sharding(meshes.make_mesh(MeshConfig(data=4, fsdp=1, tensor=2)), "LDNH", shape.shape)
    load_weights(source, {"blocks/attn/q/w": jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)})
    # Three layers, two slices, each once although four devices have it.
    assert sizes == [64 * 36 * 4 // 2] * 6


def test_load_names_another_config(hf):
    source = open_checkpoint(hf["2b", "float32"])
    with pytest.raises(
        ValueError, match=r"another config: it has final_norm/w with shape \(36,\), and \(40,\) is wanted"
    ):
        load_weights(source, {"final_norm/w": jax.ShapeDtypeStruct((40,), jnp.float32)})
    with pytest.raises(ValueError, match="has no blocks/attn/q/adapter/a; it holds 13 arrays"):
        load_weights(source, {"blocks/attn/q/adapter/a": jax.ShapeDtypeStruct((3, 36, 2), jnp.float32)})


def test_unknown_folders_say_what_was_found(tmp_path, monkeypatch):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"it holds weights\.npz\. Known are Hugging Face folders"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is a file; name the folder"):
        open_checkpoint(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match="there is no folder /no/such/folder"):
        open_checkpoint("/no/such/folder")
    (tmp_path / "one" / "two").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"there is no folder .*/one/twoo; did you mean .*/one/two\?"):
        open_checkpoint(tmp_path / "one" / "twoo")
    monkeypatch.chdir(tmp_path)  # where a misspelled folder looks like a Hub id
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set.*; did you mean one/two\?"):
        open_checkpoint("one/twoo")
    with pytest.raises(ValueError, match=r"google/gemma-2-2b, it is not in the cache at .* HF_HUB_OFFLINE is set"):
        open_checkpoint("google/gemma-2-2b")  # the suite is offline


def _cut_short(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _without(name: str):
    return lambda folder: _rewrite(folder, lambda stored: stored.pop(name))


def _rewrite(folder: Path, change):
    stored = _load_tensors(folder)
    change(stored)
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_short, r"model\.safetensors is damaged or cut short .*; download it again"),
        (_without("model.norm.weight"), r"lacks model\.norm\.weight;"),
        (lambda at: _rewrite(at, lambda s: s.update(extra=np.zeros(2))), "has unexpected extra;"),
        (lambda at: _rewrite(at, lambda s: s.update(extra=np.zeros(2, "f4"))), "has unexpected extra;"),
        (
            lambda at: _rewrite(at, lambda s: s.update({"model.norm.weight": np.zeros(37, "f4")})),
            r"model\.norm\.weight has shape \(37,\) where its config expects \(36,\)",
        ),
        (lambda at: _rewrite(at, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1})), "untied"),
        (lambda at: (at / "config.json").unlink(), r"config\.json is missing"),
        (lambda at: (at / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda at: (at / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda at: (at / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'), "both"),
    ],
)
def test_damaged_folders_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(copy)


def test_a_tied_head_is_read_as_the_embedding(copy, tmp_path):
    original = _load_tensors(copy)
    _rewrite(copy, lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"]}))
    assert _are_same(_load_tensors(_convert(copy, tmp_path / "out", "hf")), original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update({"model.norm.weight": "../other.safetensors"}),
            r"lists '\.\./other\.safetensors'; an index",
        ),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "lists '/etc/passwd'; an index"),
        (lambda m: m.update({"model.norm.weight": "config.json"}), r"lists 'config\.json'; an index"),
        (lambda m: m.update({"model.norm.weight": "gone.safetensors"}), r"gone\.safetensors is missing"),
        (lambda m: m.update({"extra": m["model.norm.weight"]}), "holds extra, which it does not"),
        (
            lambda m: m.pop("model.norm.weight"),
            r"holds model\.norm\.weight, which model\.safetensors\.index\.json does not",
        ),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, change, message):
    folder = _save_model(tmp_path / "sharded", "2b", "float32", max_shard_size="100KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = _save_model(tmp_path / "sharded", "2b", "float32", max_shard_size="100KB")
    first, *_, last = sorted(folder.glob("*.safetensors"))
    save_file(load_file(first) | load_file(last), last)
    with pytest.raises(ValueError, match=r"which another file of .* holds too"):
        open_checkpoint(folder)


@contextmanager
def _limit_file_size(size: int):
    """Makes writing fail in the middle of a file that grows beyond `size`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_nothing_is_left_when_writing_fails_midway(hf, tmp_path, to):
    target = tmp_path / "out" / to
    job = Job(source=open_checkpoint(hf["2b", "float32"]), to=to)
    with _limit_file_size(20_000), pytest.raises((OSError, ValueError)):
        write_checkpoint(job, target)
    assert list(target.parent.iterdir()) == []
    write_checkpoint(job, target)
    assert open_checkpoint(target).model == BITING["2b"]


def test_two_conversions_of_one_name_do_not_meet(tmp_path):
    """The second is refused while the first writes, and takes nothing from it."""
    target = tmp_path / "out"
    with folder.atomic_folder(target, 0) as partial_folder:
        (partial_folder / "weights").write_text("whole")
        with (
            pytest.raises(ValueError, match=r"another process is writing .*out; wait for it"),
            folder.atomic_folder(target, 0),
        ):
            pass
    assert (target / "weights").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_run_left_is_no_part_of_the_next(hf, tmp_path):
    partial_folder = tmp_path / ".out.partial"
    partial_folder.mkdir()
    (partial_folder / "model.safetensors.index.json").write_text("{}")
    target = _convert(hf["2b", "float32"], tmp_path / "out", "hf")
    assert not partial_folder.exists()
    assert not (target / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda out: out.symlink_to(out), "out", "out is a link that leads back to itself; delete it"),
        (lambda out: None, ".", "is the current folder, which no other folder can replace; write to .*NAME$"),
        (lambda out: None, "mounted", "is where another disk is mounted, .* write to .*/mounted/NAME"),
        (lambda out: out.with_name(".out.partial").touch(), "out", "out.partial, where .*out would be .* delete it$"),
        (lambda out: out.with_name(".out.partial").symlink_to("gone"), "out", "is no folder; delete it"),
    ],
)
def test_places_where_no_folder_can_be_put(make, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    (tmp_path / "mounted").mkdir(exist_ok=name == "mounted")
    if name == ".":
        (tmp_path / "mounted").rmdir()
    make(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message), folder.atomic_folder(Path(name).absolute(), 0):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "empty").mkdir()
    for name in ("empty", "new"):
        with folder.atomic_folder(tmp_path / name, 0) as partial_folder:
            assert partial_folder.is_relative_to(tmp_path / "disk")
            (partial_folder / "file").touch()
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / name / "file").exists()


@pytest.mark.parametrize("appears", [Path.touch, lambda path: (path / "mine").mkdir(parents=True)])
def test_what_takes_a_place_meanwhile_is_kept(appears, tmp_path):
    def write() -> None:
        with folder.atomic_folder(tmp_path / "a", 0):
            appears(tmp_path / "a")

    with pytest.raises(OSError, match="could not be put in its place"):
        write()
    appeared = tmp_path / "a"
    assert list(tmp_path.iterdir()) == [appeared] and (appeared.is_file() or (appeared / "mine").exists())


def test_a_file_that_changes_while_it_is_read_is_not_mixed(hf, tmp_path):
    source = Path(shutil.copytree(hf["2b", "float32"], tmp_path / "source"))
    opened, file = open_checkpoint(source), source / "model.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="was changed while it was read; once it is whole, give the same command"):
        write_checkpoint(Job(source=opened, to="hf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_folders_are_refused_and_kept(hf, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; delete it, or write somewhere else"):
        _convert(hf["2b", "float32"], tmp_path, "hf")
    with pytest.raises(
        OSError, match=rf"out cannot be written to \({tmp_path}/note.txt is a file\); write somewhere else"
    ):
        _convert(hf["2b", "float32"], tmp_path / "note.txt" / "out", "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_a_disk_without_room_is_refused_before_a_byte(hf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs \d\d\d\.\d kB, and .* has 1\.0 kB free; write to another disk"):
        _convert(hf["2b", "float32"], tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def _run_config(init: Path, adapter: AdapterConfig) -> Config:
    model = replace(BITING["2b"], max_length=2048)
    return Config(workdir="x", model=model, adapter=adapter, optim=OptimConfig(lr=1.0), init=str(init))


def test_a_run_stores_its_layers_apart(hf, tmp_path):
    weights = table.from_hf(_load_tensors(hf["2b", "float32"]), BITING["2b"])
    workdir = saved_run(tmp_path / "run", _run_config(hf["2b", "float32"], AdapterConfig()), {1: weights})
    reader = orbax.Reader(workdir / "checkpoints" / "1" / "params")
    for path in ("blocks/attn/q/w", "blocks/pre_attn_norm/w", "embedding"):
        chunk = reader.chunk(path)
        assert chunk == ((1, *weights[path].shape[1:]) if path.startswith("blocks/") else weights[path].shape), path


def test_a_full_run_is_its_newest_step(hf, tmp_path):
    weights = table.from_hf(_load_tensors(hf["2b", "float32"]), BITING["2b"])
    steps = {9: {path: w + 1 for path, w in weights.items()}, 10: weights}
    workdir = saved_run(tmp_path / "run", _run_config(hf["2b", "bfloat16"], AdapterConfig()), steps)
    (workdir / "checkpoints" / "11.orbax-checkpoint-tmp-1").mkdir()
    found = open_checkpoint(workdir)
    assert (found.format, found.tokenizer, found.model) == (
        "run",
        hf["2b", "bfloat16"],
        replace(BITING["2b"], max_length=2048),
    )
    # The weights it started from were bfloat16, so those it ends with are by default.
    assert _are_same(_load_tensors(_convert(workdir, tmp_path / "hf", "hf")), _load_tensors(hf["2b", "bfloat16"]))
    whole = _convert(workdir, tmp_path / "hf32", "hf", dtype="float32")
    assert _are_same(_load_tensors(whole), _load_tensors(hf["2b", "float32"]))
    assert json.loads((whole / "config.json").read_text())["max_position_embeddings"] == 2048
    ninth = open_checkpoint(workdir / "checkpoints" / "9")
    final = load_weights(ninth, {"final_norm/w": jax.ShapeDtypeStruct((36,), jnp.float32)})["final_norm/w"]
    np.testing.assert_array_equal(final, weights["final_norm/w"] + 1)
    os.truncate(workdir / "config.txt", 1 << 40)
    with pytest.raises(ValueError, match=r"config\.txt is damaged \(it is larger than 1 MiB\)"):
        open_checkpoint(workdir)


def test_a_run_s_own_tokenizer_and_config_come_first(hf, tmp_path):
    weights = table.from_hf(_load_tensors(hf["2b", "float32"]), BITING["2b"])
    workdir = saved_run(tmp_path / "run", _run_config(hf["2b", "bfloat16"], AdapterConfig()), {1: weights})
    tokenizer = workdir / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("[]")
    (tokenizer / "generation_config.json").write_text("{}")
    config = hf_config(BITING["2b"], "float32") | {"eos_token_id": [1, 107]}
    (tokenizer / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(workdir).tokenizer == tokenizer
    target = _convert(workdir, tmp_path / "hf", "hf")
    assert (target / "tokenizer.json").read_text() == "[]"
    assert (target / "generation_config.json").read_text() == "{}"
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == [1, 107]
    assert _are_same(_load_tensors(target), _load_tensors(hf["2b", "float32"]))


def test_command_line(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", str(hf["2b", "float32"]), "out", "--to", "orbax"])
    main()
    output = capsys.readouterr().out
    assert "as a Hugging Face model: Gemma 2 of 3 layers, 66,132 parameters" in output
    assert "wrote out: weights, 264.5 kB of float32" in output
    with pytest.raises(SystemExit, match=r"error: .* exists already"):
        main()


def test_help_comes_before_jax():
    script = "import sys, gemma2_jax.convert.__main__ as m; assert 'jax' not in sys.modules, 'slow'; m.main()"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True)
    assert "--to {orbax,hf,peft,megatron,megatron-legacy," in done.stdout


def test_a_run_without_a_checkpoint_is_known_for_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.txt").write_text(config_text.to_text(recipes.load_recipe("tiny_lora")))
    with pytest.raises(ValueError, match="is a training run that has no whole checkpoint yet; resume it"):
        open_checkpoint(tmp_path)
