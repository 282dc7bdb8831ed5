"""Runs that earlier versions of the program wrote still go on: their config, their checkpoints, their data position."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import lines_of

from gemma2_jax import config_text
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data import packing
from gemma2_jax.training import loop

pytestmark = pytest.mark.usefixtures("compiled_once")

FIXTURES = Path(__file__).parents[1] / "fixtures"
# Losses of steps 5 to 8 as version 0.1 had them when it went on from its own checkpoint of step 4.
LOSSES = {5: 6.481631278991699, 6: 6.806430339813232, 7: 6.741625785827637, 8: 6.696861743927002}


@pytest.fixture
def saved(tmp_path) -> Path:
    return shutil.copytree(FIXTURES / "run-0.1", tmp_path / "run")


def go_on(saved: Path) -> None:
    config = config_text.from_text((saved / "config.txt").read_text())
    loop.train(replace(config, workdir=str(saved), steps=8, train=replace(config.train, micro_batch_size=1)))


def pack_like_version_0_1(lengths, length, random):
    """Each document in turn goes to the row that it fills best, of which version 0.1 had a thousand open."""
    space, rows = [], []
    for document, need in enumerate(lengths.tolist()):
        fitting = [row for row, left in enumerate(space) if left >= need]
        best = min(fitting, key=lambda row: (space[row], row)) if fitting else len(space)
        if not fitting:
            space.append(length)
            rows.append([])
        space[best] -= need
        rows[best].append(document)
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def test_a_run_of_version_0_1_goes_on(saved, monkeypatch):
    """The same adapter, optimizer and, were rows still packed as then, losses that version 0.1 would have had."""
    monkeypatch.setattr(packing, "assign_rows", pack_like_version_0_1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved.parent / "cache"))  # where no other plan of these rows is kept
    (position,) = (saved / "checkpoints/4/loop").glob("metadata")
    state = json.loads(position.read_text())
    state["data"]["of"]["packing"] = "by length"
    position.write_text(json.dumps(state))
    go_on(saved)
    losses = {line["step"]: line["loss"] for line in lines_of(saved) if "loss" in line}
    assert sorted(losses) == list(range(1, 9))
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-5)


def test_a_run_of_version_0_1_with_packed_documents_says_why_it_cannot_go_on(saved):
    message = (
        r"its position is one in 144 rows of 64 with 7,482 tokens, 8 to a batch, and the data is now \d+ rows of 64 "
        r"with 7,482 tokens, packed by length, 8 to a batch. Give back the data, the sizes and the version of "
        r"gemma2_jax of that run, or start a new run from this one's weights: --init assets/tiny-gemma2 --adapter"
    )
    with pytest.raises(ValueError, match=message):
        go_on(saved)


def test_a_run_says_that_its_model_was_named_from_another_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"trained an adapter on init assets/tiny-gemma2, which was not found from .*run"
    ):
        open_checkpoint(str(saved))


def test_an_adapter_of_version_0_1_opens(saved):
    """Its folder is known for what it is, with the adapter's config from config.txt."""
    checkpoint = open_checkpoint(str(saved))
    assert checkpoint.format == "run" and checkpoint.adapter.rank == 2
    assert {path.rpartition("/")[2] for path in checkpoint.shapes if "/adapter/" in path} == {"a", "b"}
