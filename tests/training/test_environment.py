"""What a run says that it ran with: versions, devices, commit and command, of each start, and no secrets."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version

import jax
import pytest

from gemma2_jax.training import environment


def test_each_start_has_an_entry(tmp_path, monkeypatch):
    command = ["python", "-m", "gemma2_jax.train", "--config", "2b_lora", "--data.train", "s3://me:pass@host/a b.jsonl"]
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    environment.record_start(tmp_path, 0)
    environment.record_start(tmp_path, 7)
    text = (tmp_path / "environment.json").read_text()
    assert "hf_verysecret" not in text and "pass" not in text
    first, second = json.loads(text)
    assert (first["step"], second["step"]) == (0, 7)
    assert first["command"] == "python -m gemma2_jax.train --config 2b_lora --data.train 's3://***@host/a b.jsonl'"
    assert first["versions"]["python"] == platform.python_version()
    assert first["versions"]["jax"] == version("jax") and first["versions"]["gemma2-jax"] == version("gemma2-jax")
    assert first["devices"] == {"cpu": 8} and first["processes"] == 1


@pytest.mark.parametrize("text", ['{"cut off', "7", "[" * 100_000])
def test_a_file_of_something_else_is_replaced(text, tmp_path):
    (tmp_path / "environment.json").write_text(text)
    environment.record_start(tmp_path, 3)
    assert [entry["step"] for entry in json.loads((tmp_path / "environment.json").read_text())] == [3]


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    environment.record_start(tmp_path, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a.jsonl?X-Amz-Signature=12&b=3 --steps 3", "https://host/a.jsonl?*** --steps 3"),
        ("0.5*https://u:p@h/a,0.5*s3://b/c", "0.5*https://***@h/a,0.5*s3://b/c"),
        ("hf://datasets/a/b@main/c.jsonl", "hf://datasets/a/b@main/c.jsonl"),
        ("/a/b@c.jsonl me@host", "/a/b@c.jsonl me@host"),
    ],
)
def test_secrets_of_urls_are_hidden(text, shown):
    assert environment.hide_secrets(text) == shown


def test_the_commit_says_whether_files_were_changed(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file, other = tmp_path / "code.py", tmp_path / "installed.py"
    file.write_text("1\n")
    other.write_text("1\n")
    assert environment.find_commit(file) is None
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert environment.find_commit(file) == commit
    file.write_text("2\n")
    assert environment.find_commit(file) == f"{commit}-dirty"
    assert environment.find_commit(other) is None, "it is no part of that repository"
