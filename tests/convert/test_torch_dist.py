"""Folders of torch.distributed.checkpoint without torch: what Megatron wrote, what torch reads of ours, and damage."""

import io
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fuzzing import OURS, fuzz, mutate
from megatron_files import FIXTURES, load_torch_dist, torch_bytes, without_warnings
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from gemma2_jax.convert.files import pickles, torch_dist, torch_files
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.torch_dist import TorchDist, TorchDistWriter

FOLDERS = sorted(path.parent for path in FIXTURES.glob("**/.metadata"))
ONE = FIXTURES / "torch_dist" / "A_bf16_tp2pp2" / "iter_0000000"


def whole_index(shape) -> tuple[slice, ...]:
    return (slice(None),) * len(shape)


def id_of(folder: Path) -> str:
    return str(folder.relative_to(FIXTURES))


@pytest.mark.parametrize("folder", FOLDERS, ids=id_of)
def test_fixtures_read_as_torch_reads_them(folder):
    checkpoint, expected = TorchDist(folder), load_torch_dist(folder)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert {name: f"torch.{dtype.name}" for name, dtype in checkpoint.dtypes.items()} == {
        name: str(tensor.dtype) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert checkpoint.read(name, whole_index(tensor.shape)).tobytes() == torch_bytes(tensor)
        for part in range(3):
            index = tuple(slice(size * part // 4, size - size * part // 5) for size in tensor.shape)
            array = checkpoint.read(name, index)
            assert array.tobytes() == torch_bytes(tensor[index]) and array.shape == tuple(tensor[index].shape)
    assert all(isinstance(checkpoint.object(name), list) for name in checkpoint.objects if "_extra_state" in name)


@pytest.mark.parametrize("folder", FOLDERS, ids=id_of)
def test_what_we_write_is_to_torch_what_megatron_wrote(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 100_000)
    checkpoint = TorchDist(folder)
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    objects = [name for name in checkpoint.objects if "_extra_state" in name]
    (tmp_path / "out").mkdir()
    with TorchDistWriter(tmp_path / "out") as writer:
        for name, shape in checkpoint.shapes.items():
            for chunk in metadata.state_dict_metadata[name].chunks:
                index = tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
                writer.chunk(name, shape, tuple(chunk.offsets), checkpoint.read(name, index))
        for name in objects:
            content = checkpoint.object(name)
            # [None], or a list of one empty tensor, which is written as an array
            writer.object(name, [x.read() if isinstance(x, torch_files.Stored) else x for x in content])
        assert not (tmp_path / "out" / ".metadata").exists()
    with open(tmp_path / "out" / ".metadata", "rb") as file:
        written = pickle.load(file)
    for name, entry in metadata.state_dict_metadata.items():
        if name in checkpoint.shapes or name in objects:
            assert written.state_dict_metadata[name] == entry
    assert {(x.fqn, x.offset, x.index) for x in written.storage_data} == {
        (x.fqn, x.offset, x.index) for x in metadata.storage_data if x.fqn in checkpoint.shapes or x.fqn in objects
    }
    assert written.version == metadata.version and type(written.storage_meta) is type(metadata.storage_meta)
    before, after = load_torch_dist(folder), load_torch_dist(tmp_path / "out")
    assert {k: (v.shape, torch_bytes(v)) for k, v in before.items()} == {
        k: (v.shape, torch_bytes(v)) for k, v in after.items()
    }
    without_warnings(format_utils.dcp_to_torch_save, str(tmp_path / "out"), str(tmp_path / "one.pt"))
    converted = torch.load(tmp_path / "one.pt", weights_only=True)
    for name in objects:
        info = metadata.storage_data[dcp.metadata.MetadataIndex(name)]
        with open(folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            (expected,), (found,) = (
                torch.load(io.BytesIO(file.read(info.length)), weights_only=True),
                converted[name],
            )
        assert found is expected is None or (
            (found.shape, found.dtype) == (expected.shape, expected.dtype) == ((0,), torch.uint8)
        )


def test_reads_what_torch_saves(tmp_path):
    state = {"a": torch.arange(12.0).reshape(3, 4), "scalar": torch.tensor(5), "empty": torch.zeros(0, 3), "text": "x"}
    state["payload"] = [torch.zeros(0, dtype=torch.uint8)]
    planner = DefaultSavePlanner(flatten_state_dict=False)
    without_warnings(dcp.save, state, checkpoint_id=str(tmp_path), no_dist=True, planner=planner)
    checkpoint = TorchDist(tmp_path)
    for name in ("a", "scalar", "empty"):
        assert checkpoint.read(name, whole_index(state[name].shape)).tolist() == state[name].tolist()
    assert checkpoint.object("text") == "x" and checkpoint.object("payload")[0].shape == (0,)


def test_writes_lazily_and_leaves_no_metadata_after_an_error(tmp_path):
    class Lazy:
        shape, dtype = (2, 3), np.dtype(np.float32)

        def read(self):
            return np.ones(self.shape, self.dtype)

    with TorchDistWriter(tmp_path) as writer:
        writer.chunk("a", (4, 3), (0, 0), Lazy())
        writer.chunk("a", (4, 3), (2, 0), Lazy())
        writer.chunk("scalar", (), (), np.array(7, np.int64))
    checkpoint = TorchDist(tmp_path)
    assert (
        checkpoint.read("a", whole_index((4, 3))).tolist() == load_torch_dist(tmp_path)["a"].tolist() == [[1, 1, 1]] * 4
    )
    assert checkpoint.read("scalar", ()) == load_torch_dist(tmp_path)["scalar"] == 7
    (tmp_path / "other").mkdir()
    with pytest.raises(TypeError, match="no place"), TorchDistWriter(tmp_path / "other") as writer:
        writer.object("a", object())
    assert not (tmp_path / "other" / ".metadata").exists()


def test_a_part_of_one_chunk_is_not_copied(tmp_path, monkeypatch):
    with TorchDistWriter(tmp_path) as writer:
        writer.chunk("a", (4, 3), (0, 0), np.ones((2, 3), np.float32))
        writer.chunk("a", (4, 3), (2, 0), np.ones((2, 3), np.float32))
    checkpoint, read, load = TorchDist(tmp_path), [], torch_files.Stored.read
    monkeypatch.setattr(torch_files.Stored, "read", lambda *args: read.append(load(*args)) or read[-1])
    assert checkpoint.read("a", (slice(2, 4), slice(None))) is read[0] and len(read) == 1


# Damage


def copy_changed(tmp_path: Path, change=lambda state: None) -> Path:
    """A copy of the fixture whose metadata is changed."""
    folder = tmp_path / "copy"
    shutil.copytree(ONE, folder)
    metadata = pickles.load_pickle((folder / ".metadata").read_bytes(), "it")
    metadata.state.pop("all_local_plans")
    change(metadata.state)
    for entry in metadata.state["state_dict_metadata"].values():
        if entry.state:
            entry.state["size"] = Record("torch.Size", (entry.state["size"],))
    (folder / ".metadata").write_bytes(pickles.dump_pickle(metadata))
    return folder


EMBEDDING, FC1 = "embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc1.weight"


def _repeat_chunk(x):
    chunks = x["state_dict_metadata"][FC1].state["chunks"]
    chunks.append(chunks[0])


def _change_dtype(x):
    x["state_dict_metadata"][FC1].state["properties"].state = (np.dtype(np.int16),)


def _chunk(number: int, name: str = FC1, **state):
    return lambda x: x["state_dict_metadata"][name].state["chunks"][number].state.update(state)


def _entry(**state):
    return lambda x: x["state_dict_metadata"][FC1].state.update(state)


def _info(**state):
    def change(x):
        next(info for key, info in x["storage_data"].items() if key.state["fqn"] == FC1).state.update(state)

    return change


def _forget_place(x):
    x["storage_data"] = {key: info for key, info in x["storage_data"].items() if key.state["fqn"] != FC1}


WRONG = {
    "a gap": (lambda x: x["state_dict_metadata"][FC1].state["chunks"].pop(), "leave gaps or overlap"),
    "no chunks": (_entry(chunks=[]), "leave gaps or overlap"),
    "twice": (_repeat_chunk, "leave gaps or overlap"),
    "overlap": (_chunk(1, offsets=(0, 0, 0)), "leave gaps or overlap"),
    "outside": (_chunk(0, offsets=(9, 0, 0)), "leave gaps or overlap"),
    "larger": (_entry(size=(4, 256, 65)), "leave gaps or overlap"),
    "dims": (_chunk(0, offsets=(0, 0), sizes=(1, 64)), "leave gaps or overlap"),
    "negative": (_chunk(0, offsets=(0, -1, 0)), "entry of an unknown kind"),
    "absurd": (_entry(size=(1 << 60, 1 << 60)), "entry of an unknown kind"),
    "not placed": (_forget_place, "does not say where"),
    "no such file": (_info(relative_path="__9_9.distcp"), "is missing"),
    "another folder": (_info(relative_path="../__0_0.distcp"), "may only name files in its own folder"),
    "an absolute path": (_info(relative_path="/etc/passwd"), "may only name files in its own folder"),
    "no name": (_info(relative_path="a\ud800"), "may only name files in its own folder"),
    "the folder": (_info(relative_path=".."), "may only name files in its own folder"),
    "beyond the file": (_info(relative_path="new", offset=1 << 50), "is missing"),
    "negative offset": (_info(offset=-1), "entry of an unknown kind"),
    "overlapping": (_info(length=10_000), "entries that overlap"),
    "compressed": (_info(transform_descriptors=["zstd"]), "compressed by an extension; save the checkpoint without"),
    "other dtype": (_change_dtype, "does not hold what"),
    "no storage": (lambda x: x.pop("storage_data"), "is not a checkpoint's metadata"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_checkpoint_is_said(name, tmp_path):
    change, message = WRONG[name]
    folder = copy_changed(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        (lambda checkpoint: checkpoint.read(FC1, whole_index(checkpoint.shapes[FC1])))(TorchDist(folder))
    assert str(folder) in str(caught.value)


def test_only_what_is_read_must_be_right(tmp_path):
    for name in ("a gap", "dims", "not placed", "no such file", "compressed", "other dtype"):
        checkpoint = TorchDist(copy_changed(tmp_path, WRONG[name][0]))
        checkpoint.read(EMBEDDING, whole_index((512, 64)))
        shutil.rmtree(tmp_path / "copy")


def test_the_classes_of_older_megatron(tmp_path):
    folder = copy_changed(tmp_path)
    metadata = pickles.load_pickle((folder / ".metadata").read_bytes(), "it")
    metadata.name = "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"
    plan = Record("megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan", new=True, state={"items": []})
    metadata.state |= {"mcore_data": {"optimizer.x": {"nd_reformulated_orig_global_shape": (1, 2)}}, "plan": plan}
    (folder / ".metadata").write_bytes(pickles.dump_pickle(metadata))
    assert TorchDist(folder).shapes == TorchDist(ONE).shapes


def test_files_cut_short_or_missing(tmp_path):
    folder = copy_changed(tmp_path)
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-100])
    checkpoint = TorchDist(folder)
    with pytest.raises(ValueError, match=r"\.distcp is cut short: it lacks .*; copy it again"):
        [checkpoint.check(name) for name in checkpoint.shapes]
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata is missing; copy the whole checkpoint again"):
        TorchDist(folder)


def cut_randomly(shape, chance: random.Random, cuts: int):
    """A shape cut at random into boxes."""
    found = [[(0, size) for size in shape]]
    for _ in range(cuts):
        box = found.pop(chance.randrange(len(found)))
        dim = chance.randrange(len(shape))
        start, stop = box[dim]
        at = chance.randrange(start, stop)
        found += [[*box[:dim], span, *box[dim + 1 :]] for span in ((start, at), (at, stop)) if span[0] < span[1]]
    chance.shuffle(found)
    return found


def test_tiles():
    chance = random.Random(0)
    for _ in range(300):
        shape = tuple(chance.randrange(1, 8) for _ in range(chance.randrange(1, 4)))
        whole, boxes = [(0, size) for size in shape], cut_randomly(shape, chance, chance.randrange(5))
        assert torch_dist._tiles(whole, boxes)
        number, dim = chance.randrange(len(boxes)), chance.randrange(len(shape))
        changed = [list(box) for box in boxes]
        span = tuple(sorted(chance.randrange(-1, shape[dim] + 2) for _ in range(2)))
        changed[number][dim] = span
        seen = np.zeros(shape, int)
        inside = all(0 <= a < b <= size for box in changed for (a, b), size in zip(box, shape, strict=True))
        for box in changed if inside else []:
            seen[tuple(slice(*span) for span in box)] += 1
        assert torch_dist._tiles(whole, changed) == (inside and bool((seen == 1).all()))
    grid = [[(i, i + 1), (j * 10, j * 10 + 10)] for i in range(300) for j in range(100)]
    assert torch_dist._tiles([(0, 300), (0, 1000)], grid)
    assert not torch_dist._tiles([(0, 300), (0, 1000)], grid[:-1])
    nested = [[(i, i + 1), (i, 5000)] for i in range(5000)] + [[(i + 1, 5000), (i, i + 1)] for i in range(4999)]
    assert not torch_dist._tiles([(0, 5000)] * 2, nested)  # it tiles, but would take a step for every box


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_metadata_with_one_thing_changed(times, tmp_path):
    for file in ONE.glob("*.distcp"):
        (tmp_path / file.name).symlink_to(file)

    def attempt(data: bytes) -> None:
        (tmp_path / ".metadata").write_bytes(data)
        checkpoint = TorchDist(tmp_path)
        for name in checkpoint.shapes:
            try:
                assert checkpoint.read(name, whole_index(checkpoint.shapes[name])).shape == checkpoint.shapes[name]
            except ValueError as error:  # the next tensor may be right
                if not re.search(OURS, str(error)):
                    raise
        for name in checkpoint.objects:
            checkpoint.object(name)

    assert fuzz(attempt, (ONE / ".metadata").read_bytes(), 100 * times)


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_chunks_with_one_thing_changed_read_as_before_or_not_at_all(times, tmp_path):
    with TorchDistWriter(tmp_path) as writer:
        for start in range(0, 8, 2):
            writer.chunk("a", (8, 5), (start, 0), np.arange(10, dtype=np.float32).reshape(2, 5) + start)
    expected = TorchDist(tmp_path).read("a", whole_index((8, 5))).tolist()
    file = tmp_path / "__0_0.distcp"

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        assert TorchDist(tmp_path).read("a", whole_index((8, 5))).tolist() == expected

    fuzz(attempt, file.read_bytes(), 1500 * times)


def test_a_mutation_changes_something():
    data, chance = bytes(range(256)) * 4, random.Random(0)
    assert sum(mutate(data, chance) != data for _ in range(100)) > 90
