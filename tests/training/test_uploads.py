"""Copies of checkpoints elsewhere: whole or not there, tried again, and no reason to stop training."""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from small_runs import saved_run, small

from gemma2_jax.config import Config
from gemma2_jax.convert import steps
from gemma2_jax.training import uploads
from gemma2_jax.training.uploads import Uploads, open_target


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(uploads, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(uploads, "_RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(uploads, "_LAST_RETRY_SECONDS", (0.01, 0.01))


@pytest.fixture
def config(tmp_path) -> Config:
    """A run of two steps, whose checkpoints go to the folder `copy`."""
    config = small("tiny_sft", tmp_path / "run")
    config = replace(config, train=replace(config.train, upload=str(tmp_path / "copy")))
    weights = {"embedding": np.ones((40, 8), np.float32)}
    saved_run(tmp_path / "run", config, {5: weights, 10: weights})
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{}")
    return config


class Unreliable:
    """A target that refuses as often as it is told to, and notes what it was given."""

    def __init__(self, target: uploads.Target, failures: float):
        self.target, self.failures, self.paths = target, failures, []

    def read(self, path):
        return self.target.read(path)

    def put(self, files, progress):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the bucket is gone\nfor now")
        self.paths += files
        self.target.put(files, progress)


def copied(folder: Path) -> dict[str, str]:
    return {path.name: steps.find_damage(path) for path in (folder / "checkpoints").iterdir()}


def test_steps_are_copied(config, tmp_path, capsys):
    """The newest first, each once, and its checksums last; what was there already stays."""
    (tmp_path / "copy" / "checkpoints" / "3").mkdir(parents=True)
    for is_again in (False, True):
        uploading = Uploads(config)
        uploading._target = target = Unreliable(uploading._target, failures=0)
        with uploading:
            pass
        folders = [str(Path(path).parent) for path in target.paths if path.endswith("checksums.json")]
        assert folders == ([] if is_again else ["checkpoints/10", "checkpoints/5"])
        if not is_again:
            first = target.paths.index("checkpoints/10/checksums.json")
            assert {*target.paths[:2]} == {"config.txt", "tokenizer/tokenizer.json"}
            assert len([path for path in target.paths[:first] if path.startswith("checkpoints/10/")]) > 20
            assert not [path for path in target.paths[:first] if path.startswith("checkpoints/5/")]
    assert (tmp_path / "copy" / "checkpoints" / "3").is_dir()
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "3")
    assert copied(tmp_path / "copy") == {"5": "", "10": ""}
    assert [path.name for path in steps.list_folders(tmp_path / "copy")] == ["5", "10"]
    assert capsys.readouterr().err == f"all steps that are kept here are copied to {tmp_path}/copy\n" * 2


def test_a_service_that_is_gone_for_a_while(config, tmp_path, capsys):
    uploading = Uploads(config)
    uploading._target = Unreliable(uploading._target, failures=2)
    with uploading:
        while not (tmp_path / "copy" / "checkpoints" / "5" / "checksums.json").exists():
            pass
        # A step that is saved meanwhile.
        folder = tmp_path / "run" / "checkpoints"
        shutil.copytree(folder / "10", folder / "partial").rename(folder / "15")
    assert copied(tmp_path / "copy") == {"5": "", "10": "", "15": ""}
    assert capsys.readouterr().err == (
        f"step 10 could not be copied to {tmp_path}/copy (the bucket is gone); this is tried again, and training "
        "goes on\n"
        f"step 10 is copied to {tmp_path}/copy\n"
        f"all steps that are kept here are copied to {tmp_path}/copy\n"
    )


def test_a_service_that_stays_gone(config, tmp_path, capsys):
    uploading = Uploads(config)
    uploading._target = Unreliable(uploading._target, failures=float("inf"))
    with uploading:
        pass
    said = capsys.readouterr().err.splitlines()
    end = "(the bucket is gone); the same command tries again"
    assert len(said) == 2 and said[1] == f"warning: steps 10, 5 could not be copied to {tmp_path}/copy {end}"


def test_a_run_that_was_told_to_stop_does_not_wait(config, tmp_path, capsys):
    uploading, waiting = Uploads(config), threading.Event()
    uploading._target = SimpleNamespace(read=lambda path: None, put=lambda files, progress: waiting.wait(60))
    started = time.monotonic()
    with uploading:
        uploading.end_early()
    assert time.monotonic() - started < 30
    waiting.set()
    said = f"warning: steps 10, 5 could not be copied to {tmp_path}/copy; the same command tries again\n"
    assert capsys.readouterr().err == said


def test_a_step_without_checksums_is_not_copied(config, tmp_path):
    (tmp_path / "run" / "checkpoints" / "10" / "checksums.json").unlink()
    with Uploads(config):
        pass
    assert copied(tmp_path / "copy") == {"5": ""}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://bucket/run", "train.upload is 'nowhere://bucket/run', which is no URL to write to"),
        ("oci://bucket/run", "train.upload is oci://bucket/run, which needs a package more: .*ocifs"),
        ("hf://name", "train.upload is hf://name; a model's repository on the Hub is hf://ORG/NAME"),
        ("hf://datasets/name", "a model's repository on the Hub is"),
        ("hf://org/name", "nobody is logged in to the Hub: hf auth login, or set HF_TOKEN"),
    ],
)
def test_where_nothing_can_be_copied_to(url, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        open_target(url)


def test_the_hub(config, monkeypatch):
    """A step is one commit, of a repository that others do not see."""
    made, commits = [], []

    class Api:
        def create_repo(self, name, **options):
            made.append((name, options))

        def create_commit(self, name, operations, commit_message):
            commits.append((name, [operation.path_in_repo for operation in operations], commit_message))

    class FileSystem:
        def __init__(self, **options):
            assert options == {"use_listings_cache": False}

        def read_bytes(self, path):
            if path != "org/name/days/checkpoints/5/checksums.json":
                raise FileNotFoundError(path)
            return (config.output / "checkpoints" / "5" / "checksums.json").read_bytes()

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    with Uploads(replace(config, train=replace(config.train, upload="hf://org/name/days"))):
        pass
    assert made == [("org/name", {"private": True, "exist_ok": True})]
    [(name, paths, message)] = commits
    assert (name, message) == ("org/name", "Add checkpoints/10")
    sums = json.loads((config.output / "checkpoints" / "10" / "checksums.json").read_text())["files"]
    assert {*paths} == {f"days/checkpoints/10/{file}" for file in (*sums, "checksums.json")} | {
        "days/config.txt", "days/tokenizer/tokenizer.json",
    }  # fmt: skip


def test_what_is_being_copied_is_kept(config):
    uploading = Uploads(config)
    uploading._current = 5
    steps_there = [type("Info", (), {"step": step}) for step in (5, 10)]
    assert uploading.should_preserve(steps_there, context=None) == [True, False]
