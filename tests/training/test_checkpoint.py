"""Checkpoints of a run that were damaged after they were written: what is said, and that nothing is lost."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemma2_jax.training.checkpoint import Checkpoints

PARAMS = {"blocks/attn/q/w": (2, 3, 4), "embedding": (8, 4)}
OPTIMIZER = {"count": (), "mu": {"embedding": (8, 4)}}


def arrays(shapes):
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))


def abstract(shapes):
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        arrays(shapes),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, arrays(PARAMS), arrays(OPTIMIZER), {"step": step})
    return workdir


def test_a_disk_without_room_is_said(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert not checkpoints.describe_shortage(abstract(PARAMS), abstract(OPTIMIZER))
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=355))
        said = f"needs 356 bytes, and {tmp_path}/checkpoints has 355 bytes free"  # 24 + 32 + 1 + 32 floats
        assert checkpoints.describe_shortage(abstract(PARAMS), abstract(OPTIMIZER)) == said
        with pytest.raises(OSError, match=f"step 1 {said}; make room, and the same command starts from the beginning"):
            checkpoints.save(1, arrays(PARAMS), arrays(OPTIMIZER), {})


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ("optimizer", "it has no optimizer"),
        ("params/_METADATA", ""),
        ("params/manifest.ocdbt", ""),
        ("loop/metadata", ""),
    ],
)
def test_a_damaged_step_is_named(whole, damaged, reason, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    path = workdir / "checkpoints" / "3" / damaged
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = (
        f"the checkpoint {workdir}/checkpoints/3 is damaged or not whole: {reason}.*; copy that folder again, or "
        "move it away to go on from step 2"
    )
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=said) as raised:
            checkpoints.restore(3, abstract(PARAMS), abstract(OPTIMIZER))
        assert "\n" not in str(raised.value)
        shutil.rmtree(workdir / "checkpoints" / "2")
    with (
        Checkpoints(workdir, keep=2) as checkpoints,
        pytest.raises(ValueError, match=r"or move it away to start from the beginning$"),
    ):
        checkpoints.restore(3, abstract(PARAMS), abstract(OPTIMIZER))
