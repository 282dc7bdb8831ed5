"""Checkpoints of a run: damaged after they were written, without room, never written to their end; nothing is lost."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.convert import steps
from gemma2_jax.convert.files import checksums
from gemma2_jax.training.checkpoint import Checkpoints

PARAMS = {"blocks/attn/q/w": (2, 3, 4), "embedding": (8, 4)}
OPTIMIZER = {"count": (), "mu": {"embedding": (8, 4)}}
POSITION = {  # beside the step
    "data": {"batches": {"next_index": 3}, "of": {"rows": 9, "length": 64, "tokens": 99, "batch_size": 8}},
    "history": {"count": 3.0, "mean": 0.5, "variance": 0.1},
    "guard": {"skipped": 0, "row": 0, "losses": [3, 2.0, 0.5]},
    "best": {"step": 0, "loss": None, "passed": 0},
}


def arrays(shapes, value: float = 1.0):
    return jax.tree.map(lambda shape: jnp.full(shape, value), shapes, is_leaf=lambda node: isinstance(node, tuple))


def abstract(shapes):
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        arrays(shapes),
    )


def save(checkpoints: Checkpoints, step: int) -> None:
    position = {"step": step, **POSITION}
    checkpoints.save(step, arrays(PARAMS, float(step)), arrays(OPTIMIZER, float(step)), position)


def save_and_close(checkpoints: Checkpoints, step: int) -> None:
    with checkpoints:
        save(checkpoints, step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (2, 3):
            save(checkpoints, step)
    return workdir


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy, whose newest step is 3."""
    return shutil.copytree(whole, tmp_path / "run")


def test_each_file_has_its_checksum(whole):
    step = whole / "checkpoints" / "3"
    sums = checksums.read_checksums(step)
    assert sums is not None
    files = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()}
    assert sums.keys() == files - {"checksums.json"} and {"loop/metadata", "_CHECKPOINT_METADATA"} < files
    listed = "".join(f"{digest}  {name}\n" for name, (_, digest) in sums.items())
    subprocess.run(["sha256sum", "--check", "--quiet"], input=listed, text=True, cwd=step, check=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "{name} has {shorter} bytes, and {size} were written"),
        (Path.unlink, "{name} is missing"),
        (flip_bit, "{name} is not as it was written"),
    ],
)
def test_damage_of_each_file_is_found(damage: Callable[[Path], None], said: str, run):
    step = run / "checkpoints" / "3"
    assert steps.find_damage(step) == ""
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "checksums.json"]
    assert len(files) > 20
    for path in files:
        data, name = path.read_bytes(), path.relative_to(step).as_posix()
        damage(path)
        assert steps.find_damage(step) == said.format(name=name, size=len(data), shorter=len(data) - 1)
        # Of two processes one finds it, and it does not matter which.
        assert sorted(steps.find_damage(step, index, 2) != "" for index in range(2)) == [False, True]
        path.write_bytes(data)
    for damage_checksums in (truncate, flip_bit):
        path, data = step / "checksums.json", (step / "checksums.json").read_bytes()
        damage_checksums(path)
        assert steps.find_damage(step) == "checksums.json is not as it was written"
        path.write_bytes(data)


@pytest.mark.parametrize("text", ["[]", '{"step": 1000000}', '{"step": "x"}', "[" * 100_000])
def test_a_position_of_something_else_is_damage(text, run):
    """Where no checksums tell: a run that took its step from there would never come to its last."""
    step = run / "checkpoints" / "3"
    (step / "checksums.json").unlink()
    assert steps.find_damage(step) == steps.find_damage(step.rename(step.with_name("3.damaged"))) == ""
    (step.with_name("3.damaged")).rename(step)
    (step / "loop" / "metadata").write_text(text)
    assert steps.find_damage(step)
    (step / "checksums.json").write_text("[" * 100_000)
    assert steps.find_damage(step) == "checksums.json is not as it was written"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("data", None),
        ("data", {}),
        ("data", {"batches": {"next_index": -1}, "of": POSITION["data"]["of"]}),
        ("data", {"batches": {"next_index": 3}, "of": {"rows": 9, "batch_size": 8}}),
        ("history", None),
        ("history", {"count": 3.0, "mean": 0.5}),
        ("guard", {"skipped": 0, "row": 0, "losses": [3, "2.0", 0.5]}),
        ("guard", {"skipped": 0, "row": 0, "losses": [3, 2.0]}),
        ("best", None),
        ("best", {"step": 1}),
    ],
)
def test_a_strange_part_of_a_position_is_damage(name, part, run, capsys):
    """Of the right step, and not as training writes it: the step before is used."""
    step = run / "checkpoints" / "3"
    (step / "checksums.json").unlink()
    (step / "loop" / "metadata").write_text(json.dumps({"step": 3, **POSITION, name: part}))
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.latest == 2
    assert capsys.readouterr().err == (
        f"the checkpoint {step} is damaged: the {name} of its loop/metadata is not what training writes; it is kept as "
        "3.damaged, and the run goes on from step 2\n"
    )


@pytest.mark.parametrize(
    ("of", "batches"),
    [
        ({"stream": "a.jsonl", "length": 64, "batch_size": 8}, {"rows": 24, "digest": "1f"}),
        ({"order": "ab", "length": 64, "batch_size": 8}, {"next_index": 3}),
        ({"sources": [POSITION["data"]["of"]] * 2, "weights": ["0.5", "0.5"], "batch_size": 8}, {"next_index": 3}),
    ],
)
def test_positions_that_training_writes_are_whole(of, batches, run):
    step = run / "checkpoints" / "3"
    (step / "checksums.json").unlink()
    for position in (POSITION, {}):  # the latter of version 0.1, which kept the data alone
        text = json.dumps({"step": 3, **position, "data": {"batches": batches, "of": of}})
        (step / "loop" / "metadata").write_text(text)
        assert steps.find_damage(step) == ""


def test_a_damaged_step_is_set_aside(run, capsys):
    """The run goes on from the one before, and all that belongs to it; the folder keeps what was damaged."""
    folder = run / "checkpoints"
    flip_bit(folder / "3" / "loop" / "metadata")
    for _ in range(2):
        shutil.copytree(folder / "2", folder / "4")
        (folder / "4" / "params" / "_METADATA").unlink()
        with Checkpoints(run, keep=2) as checkpoints:
            assert checkpoints.latest == 2
            params, optimizer, loop = checkpoints.restore(2, abstract(PARAMS), abstract(OPTIMIZER))
        assert (params["embedding"][0, 0], optimizer["count"], loop) == (2, 2, {"step": 2, **POSITION})
    said = capsys.readouterr().err.splitlines()
    end = "and the run goes on from step 2"
    assert said == [
        f"the checkpoint {folder}/4 is damaged: params/_METADATA is missing; it is kept as 4.damaged, {end}",
        f"the checkpoint {folder}/3 is damaged: loop/metadata is not as it was written; it is kept as 3.damaged, {end}",
        f"the checkpoint {folder}/4 is damaged: params/_METADATA is missing; it is kept as 4.damaged-2, {end}",
    ]
    assert {path.name for path in folder.iterdir()} == {"2", "3.damaged", "4.damaged", "4.damaged-2"}


def test_no_step_is_whole(run):
    """Nothing begins from the beginning unasked, and nothing is renamed."""
    folder = run / "checkpoints"
    for step in (2, 3):
        flip_bit(folder / f"{step}" / "params" / "manifest.ocdbt")
    said = (
        f"the checkpoint {folder}/3 is damaged: params/manifest.ocdbt is not as it was written, and none of the "
        f"earlier ones is whole; copy a step again, or move {folder} away to start from the beginning"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Checkpoints(run, keep=2)
    shutil.rmtree(folder / "2")
    with pytest.raises(ValueError, match="as it was written, and there is none before it; copy a step again"):
        Checkpoints(run, keep=2)
    assert [path.name for path in folder.iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ("optimizer", "it has no optimizer"),
        ("loop", "it has no loop"),
        ("params/_METADATA", r".*params/_METADATA .*"),
        ("params/manifest.ocdbt", ".*params: .* is damaged .*"),
        ("params/d", ".*params: .* is damaged .*"),
        ("loop/metadata", "Unterminated string.*|Expecting .*"),
    ],
)
def test_a_step_without_checksums(run, damaged, reason, capsys):
    """As a run leaves it that is killed between a step and its checksums: read to its end before it is used."""
    step = run / "checkpoints" / "3"
    (step / "checksums.json").unlink()
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.latest == 3
        assert checkpoints.opened.startswith("step 3 has no checksums")
    path = step / damaged
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert re.fullmatch(reason, steps.find_damage(step))
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.latest == 2
        assert checkpoints.opened == "step 2 is as it was written, by its checksums"
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("has_checksums", [True, False])
def test_checksums_that_were_half_written(has_checksums, run, capsys):
    """As a run leaves them that is killed at that moment: no damage, and not there after the next start."""
    step = run / "checkpoints" / "3"
    (step / "checksums.json.partial").write_text('{"sha256": "1')
    if not has_checksums:
        (step / "checksums.json").unlink()
    assert steps.find_damage(step) == ""
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.latest == 3
        assert not (step / "checksums.json.partial").exists()
    assert capsys.readouterr().err == ""


def test_arrays_of_another_run(whole):
    with Checkpoints(whole, keep=2) as checkpoints:
        wider = abstract({**PARAMS, "embedding": (8, 5)})
        end = "; give that folder the checkpoints of its own run back, or give another --workdir"
        with pytest.raises(
            ValueError, match=r"its embedding is float32\[8, 4\], and this run's is float32\[8, 5\]" + end
        ):
            checkpoints.restore(3, wider, abstract(OPTIMIZER))
        less = abstract({"count": ()})
        with pytest.raises(
            ValueError, match=r"3/optimizer is not of this run: its mu/embedding is float32\[8, 4\], and"
        ):
            checkpoints.restore(3, abstract(PARAMS), less)
        longer = abstract({**PARAMS, "blocks/attn/q/w": (3, 3, 4)})
        params, _, _ = checkpoints.restore(3, longer, abstract(OPTIMIZER))
        np.testing.assert_array_equal(params["blocks/attn/q/w"][:, 0, 0], [3, 3, 0])


def test_a_disk_without_room(tmp_path, monkeypatch, capsys):
    """Training goes on; it is said once, and the next step is saved as soon as there is room."""
    usage = shutil.disk_usage(tmp_path)
    shortage = f"needs 356 bytes, and {tmp_path}/checkpoints has 355 bytes free"  # 24 + 32 + 1 + 32 floats
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert not checkpoints.describe_shortage(abstract(PARAMS), abstract(OPTIMIZER))
        save(checkpoints, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=355))
        assert checkpoints.describe_shortage(abstract(PARAMS), abstract(OPTIMIZER)) == shortage
        for step in (5, 15):
            save(checkpoints, step)
        assert [checkpoints.is_overdue(step) for step in (19, 20)] == [False, False]
        assert capsys.readouterr().err == (
            f"the checkpoint of step 5 was not saved: it {shortage}. Training goes on, and the next is tried when "
            f"there is room, which is looked for every 10 steps, or when due; the newest weights saved are "
            f"{tmp_path}/checkpoints/1/params\n"
        )
        monkeypatch.undo()
        assert [checkpoints.is_overdue(step) for step in (29, 30)] == [False, True]
        save(checkpoints, 30)
    assert capsys.readouterr().err == "the checkpoint of step 30 is saved\n"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=355))
    with pytest.raises(OSError, match="the checkpoint of step 40 was not saved") as raised:
        save_and_close(Checkpoints(tmp_path, keep=2), 40)
    assert str(raised.value) == (
        f"the checkpoint of step 40 was not saved: it {shortage}. The newest weights saved are "
        f"{tmp_path}/checkpoints/30/params; once that is mended, the same command resumes after step 30"
    )


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte, and what to put on it to have it full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"this user may not mount a disk: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_during_a_write(small_disk, monkeypatch, capsys):
    """What Orbax raises in a thread of its own; its folder goes, so that there is room for others."""
    noise = np.random.default_rng(0).standard_normal(40_000, np.float32)  # which cannot be compressed
    large = {"embedding": jnp.asarray(noise)}
    with Checkpoints(small_disk, keep=2) as checkpoints:
        checkpoints.save(1, large, {"count": jnp.zeros(())}, {})
        checkpoints._finish_write()
        monkeypatch.setattr(Checkpoints, "describe_shortage", lambda *_: "")  # others fill the disk after it looked
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(1 << 20))
        checkpoints.save(2, large, {"count": jnp.zeros(())}, {})
        checkpoints._write.ended.wait()
        for step in range(10, 1000):  # Orbax may still write while it reports a failure
            assert not checkpoints.is_overdue(step)
            if [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"]:
                break
            time.sleep(0.01)
        said = capsys.readouterr().err
        assert re.fullmatch(
            rf"the checkpoint of step 2 was not saved: {small_disk}/checkpoints could not be written to: .*No space "
            rf"left on device.* Training goes on, and the next is tried when due; the newest weights saved are "
            rf"{small_disk}/checkpoints/1/params\n",
            said,
        ), said
        assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"]
        ballast.unlink()
        checkpoints.save(3, large, {"count": jnp.zeros(())}, {})
    assert capsys.readouterr().err == "the checkpoint of step 3 is saved\n"
    assert steps.find_damage(small_disk / "checkpoints" / "3") == ""


# Three steps saved by two processes, the second of them while files that process 1 writes may have 1 kB at most.
SAVED_BY_TWO = """
import resource, signal, sys
from pathlib import Path
from gemma2_jax.cluster import hosts, platforms
from gemma2_jax.config import HostsConfig
platforms.prepare_process()
index, workdir = int(sys.argv[2]), Path(sys.argv[3])
with hosts.process_group(HostsConfig(coordinator=sys.argv[1], count=2, index=index)):
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from gemma2_jax.training.checkpoint import Checkpoints
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = NamedSharding(mesh, PartitionSpec("data"))
    def make(seed):
        values = np.random.default_rng(seed).standard_normal((40, 100), np.float32)
        return jax.make_array_from_callback(values.shape, halves, lambda index: values[index])
    def limit(size):
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpoints(workdir, keep=3) as checkpoints:
        for step in (1, 2, 3):
            limit(1000 if step == 2 else resource.RLIM_INFINITY)
            checkpoints.save(step, {"embedding": make(step)}, {"count": make(step)}, {"step": step})
            checkpoints._finish_write()
            print(step, checkpoints.latest, flush=True)
    name = next(path for path in (workdir / "checkpoints/3").glob("params/ocdbt.process_1/d/*"))
    hosts.wait_for_processes("all is written")
    if index == 0:
        name.write_bytes(name.read_bytes()[:-1])
    hosts.wait_for_processes("one is damaged")
    with Checkpoints(workdir, keep=3) as checkpoints:
        wanted = jax.ShapeDtypeStruct((40, 100), np.float32, sharding=halves)
        params, _, loop = checkpoints.restore(checkpoints.latest, {"embedding": wanted}, {"count": wanted})
        part = params["embedding"].addressable_data(0)
        print(loop, bool((part == make(loop["step"]).addressable_data(0)).all()), flush=True)
"""


def test_two_processes_agree(tmp_path):
    """On a step that one of them cannot write, without waiting for a deadline, and on one whose file is damaged."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVED_BY_TWO, address, str(index), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
        assert output.endswith("1 1\n2 1\n3 3\n{'step': 1} True\n"), output
    folder = tmp_path / "checkpoints"
    said = [line for line in outputs[0][1].splitlines() if line.startswith("the checkpoint")]
    assert re.fullmatch(
        rf"the checkpoint of step 2 was not saved: {folder} could not be written to: .*File too large.*", said[0]
    )
    assert said[1] == "the checkpoint of step 3 is saved"
    damage = r"params/ocdbt.process_1/d/\w+ has [\d,]+ bytes, and [\d,]+ were written"
    kept = "it is kept as 3.damaged, and the run goes on from step 1"
    assert re.fullmatch(f"the checkpoint {folder}/3 is damaged: {damage}; {kept}", said[2])
    assert len(said) == 3 and "the checkpoint" not in outputs[1][1]
    assert {path.name for path in folder.iterdir()} == {"1", "3.damaged"}


def test_a_write_that_hangs(tmp_path, monkeypatch):
    """As on a disk behind a network that is gone: the run ends, though the write does not."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
    checkpoints = Checkpoints(tmp_path, keep=2, deadline=1)
    answers = threading.Event()
    hash_files = checksums.hash_files
    monkeypatch.setattr(checksums, "hash_files", lambda *names: answers.wait(60) and hash_files(*names))
    save(checkpoints, 2)
    assert not checkpoints.is_overdue(3)
    time.sleep(1)
    with pytest.raises(TimeoutError) as raised:
        checkpoints.is_overdue(4)
    with pytest.raises(TimeoutError):
        checkpoints.__exit__(None)
    assert str(raised.value) == (
        "the checkpoint of step 2 had not been written after 1 s, which is train.save_deadline: does the disk of "
        f"{tmp_path}/checkpoints still answer? The newest weights saved are {tmp_path}/checkpoints/1/params; once that "
        "is mended, the same command resumes after step 1"
    )
    answers.set()


@pytest.mark.parametrize("name", ["9", "007", "1" * 30])
def test_what_is_no_step_is_not_taken_for_one(name, tmp_path):
    """Orbax takes every folder or file whose name is a number."""
    (tmp_path / "checkpoints").mkdir()
    strange = tmp_path / "checkpoints" / name
    strange.touch() if name == "9" else strange.mkdir()
    with pytest.raises(ValueError, match=f"{strange} is no step of a run, and has the name of one; move it away"):
        Checkpoints(tmp_path, keep=1)
