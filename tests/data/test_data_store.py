"""The store of tokens: made once, by any number of processes, whole or not at all, and resumed after a kill."""

import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources, store, tokenizing
from gemma2_jax.data.records import Example
from gemma2_jax.data.store import build_store


def test_store_is_written_once_and_again_when_something_changes(jsonl, tmp_path, tokenizer, monkeypatch):
    calls = []
    encode = tokenizing.encode_examples
    monkeypatch.setattr(tokenizing, "encode_examples", lambda *given: calls.append(1) or encode(*given))
    monkeypatch.setattr(tokenizing, "_DOCUMENTS_PER_CALL", 2)
    path = jsonl({"text": "if x"}, {"text": "or"}, {"text": "in"})
    data = DataConfig(kind="text", train=path, eval=path)

    def build(data=data, split="train"):
        calls.clear()
        store = build_store(data, split, tokenizer, tmp_path / "cache")
        ids = tokenizer.convert_tokens_to_ids(
            ["<bos>", "if", "Ġx", "<eos>", "<bos>", "or", "<eos>", "<bos>", "in", "<eos>"]
        )
        np.testing.assert_array_equal(store.tokens[:10], ids)
        np.testing.assert_array_equal(store.learned[:10], [0, 1, 1, 1, 0, 1, 1, 0, 1, 1])
        np.testing.assert_array_equal(store.offsets[:4], [0, 4, 7, 10])
        return len(calls)

    assert build() == 2  # three documents, two at a time
    assert build() == 0
    assert build(DataConfig(kind="text", train=path, eval=path, packing=False, seed=1)) == 0  # no other tokens
    assert build(split="eval") == 2
    jsonl({"text": "if x"}, {"text": "or"}, {"text": "in"}, {"text": "is"})
    assert build() == 2


@pytest.mark.parametrize("choices", [{"kind": "instructions"}, {"columns": "text=prompt"}, {"eval": ""}])
def test_a_store_is_of_one_way_to_read(jsonl, tmp_path, tokenizer, choices):
    path = jsonl(*({"text": f"if {number}", "prompt": "x", "completion": "y"} for number in range(200)))
    data = DataConfig(kind="text", train=path, eval=path)
    first = build_store(data, "train", tokenizer, tmp_path / "cache")
    other = build_store(replace(data, **choices), "train", tokenizer, tmp_path / "cache")
    assert first.tokens.tolist() != other.tokens.tolist()


@pytest.mark.parametrize("name", ["tokens", "learned", "offsets", "report.json"])
def test_a_damaged_store_is_made_again(jsonl, tmp_path, tokenizer, name, caplog):
    path, cache = jsonl({"text": "a"}, {"text": "b"}), tmp_path / "cache"
    data = DataConfig(kind="text", train=path, eval=path)
    build_store(data, "train", tokenizer, cache)
    (file,) = cache.glob(f"train-*/{name}")
    whole = file.read_bytes()
    for end in (0, len(whole) // 2, len(whole) - 4):
        file.write_bytes(whole[:end])
        caplog.clear()
        build_store(data, "train", tokenizer, cache)
        assert re.search(f"data in {file.parent} is damaged .*; it is removed and made again", caplog.text)
        assert file.read_bytes() == whole


def test_a_store_that_failed_leaves_nothing(jsonl, tmp_path, tokenizer):
    path = jsonl({"text": "a"}, {"text": "b"}, "{")
    with pytest.raises(ValueError, match=r"data.jsonl:3: not JSON"):
        build_store(DataConfig(kind="text", train=path, eval=path), "train", tokenizer, tmp_path / "cache")
    assert {entry.suffix for entry in (tmp_path / "cache").iterdir()} == {".lock"}


def test_what_is_not_taken_of_a_source_is_said_once(jsonl, tmp_path, tokenizer, capsys):
    (tmp_path / "texts").mkdir()
    jsonl(*({"text": str(number)} for number in range(9)), name="texts/a.jsonl")
    (tmp_path / "texts" / "b.jsonl").symlink_to("nowhere")
    data = DataConfig(kind="text", train=str(tmp_path / "texts"))
    for split in sources.SPLITS:
        build_store(data, split, tokenizer, tmp_path / "cache", show=True)
    assert capsys.readouterr().err.count("1 link to nowhere passed over") == 1


def test_what_was_made_of_a_url_is_kept(tmp_path, tokenizer):
    path = "memory://kept/data.jsonl"
    fsspec.filesystem("memory").pipe(path, b'{"text": "a"}\n{')
    with pytest.raises(ValueError, match=r"data.jsonl:2: not JSON"):
        build_store(DataConfig(kind="text", train=path, eval=path), "train", tokenizer, tmp_path / "cache")
    assert {entry.suffix for entry in (tmp_path / "cache").iterdir()} == {".lock", ".partial"}


def test_a_document_is_not_trained_on_and_held_out(jsonl, tmp_path, tokenizer):
    data = DataConfig(kind="text", train=jsonl({"text": "a"}))
    message = r"data.eval_fraction 0.02 leaves no document of .* to train on, .*; give 0 to hold out none"
    with pytest.raises(ValueError, match=message):
        build_store(data, "train", tokenizer, tmp_path / "cache")
    whole = build_store(replace(data, eval_fraction=0.0), "train", tokenizer, tmp_path / "cache")
    assert len(whole.offsets) == 2


def test_documents_that_are_alike_are_held_out_together(jsonl, tmp_path, tokenizer):
    data = DataConfig(kind="text", train=jsonl(*[{"text": "a"}] * 20))
    with pytest.raises(ValueError, match=r"as its documents are all alike, and those are held out together; give 0"):
        build_store(data, "train", tokenizer, tmp_path / "cache")


STORE_FILES = ["learned", "offsets", "report.json", "tokens"]
FILE_BYTES = 60  # of those that `write_files` writes, at most


def write_files(folder, count):
    """Files of two documents each, the second of every other one bad."""
    folder.mkdir()
    for number in range(count):
        bad = "" if number % 2 else " "
        lines = [{"text": f"if {number}" * 5}, {"text": bad or f"or {number}"}]
        (folder / f"{number:02}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return DataConfig(kind="text", train=str(folder), eval="python-docs", on_bad="skip")


def assert_same(left, right):
    for name in ("tokens", "learned", "offsets"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.report == right.report


def interrupt(function, number, before=lambda: None):
    """The function, which ends in KeyboardInterrupt after its call for the piece of that number."""

    def run(first, second, *arguments):
        function(first, second, *arguments)
        if number == second:
            before()
            raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("moment", ["tokenized", "appended", "half appended", "checked", "named"])
def test_a_build_that_was_interrupted_goes_on(moment, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", FILE_BYTES)
    data, cache = write_files(tmp_path / "data", 6), tmp_path / "cache"
    expected = build_store(data, "train", tokenizer, tmp_path / "other")

    def leave_bytes():
        (folder,) = cache.glob("*.partial")
        with (folder / "tokens").open("ab") as file:
            file.write(b"123456")
        with (folder / "journal").open("a") as file:
            file.write('{"pieces": 4, "tok')
        (folder / "piece-0000002.tokens").write_bytes(b"of a piece that was put in")

    with monkeypatch.context() as patch:
        if moment == "appended":
            patch.setattr(store._Journal, "append", interrupt(store._Journal.append, 3))
        elif moment in ("checked", "named"):
            name = "_check_unchanged" if moment == "checked" else "_move_folder"
            patch.setattr(store, name, lambda *_: signal.raise_signal(signal.SIGINT))
        else:
            before = leave_bytes if moment == "half appended" else lambda: None
            patch.setattr(tokenizing, "tokenize_piece", interrupt(tokenizing.tokenize_piece, 3, before))
        with pytest.raises(KeyboardInterrupt):
            build_store(data, "train", tokenizer, cache)
    read, tokenized = sources.read_piece, []
    monkeypatch.setattr(
        sources, "read_piece", lambda *given: tokenized.append(given[2].parts[0].path[-8:-6]) or read(*given)
    )
    assert_same(build_store(data, "train", tokenizer, cache), expected)
    assert tokenized == ([] if moment in ("checked", "named") else ["04", "05"])
    assert expected.report.dropped["empty"].count == 3
    (folder,) = (entry for entry in cache.iterdir() if not entry.suffix)
    assert sorted(entry.name for entry in folder.iterdir()) == STORE_FILES


BUILD = """
import sys
from pathlib import Path
from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources, store
from gemma2_jax.data.encoding import load_tokenizer
store._SMALL_SOURCE_BYTES, sources.PIECE_BYTES = 0, int(sys.argv[3])
data = DataConfig(kind="text", train=sys.argv[1], eval="python-docs", on_bad="skip")
store.build_store(data, "train", load_tokenizer("assets/tiny-gemma2"), Path(sys.argv[2]))
"""


def is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_processes_that_are_killed_and_others_that_go_on(tmp_path, tokenizer, monkeypatch, caplog):
    """As many processes as there are CPUs make what one makes. Another job waits until the last of them has ended."""
    monkeypatch.setattr(sources, "PIECE_BYTES", FILE_BYTES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    data, cache = write_files(tmp_path / "data", 400), tmp_path / "cache"
    expected = build_store(data, "train", tokenizer, tmp_path / "other")
    parent = subprocess.Popen([sys.executable, "-c", BUILD, data.train, cache, str(FILE_BYTES)])
    while not list(cache.glob("*.partial/journal")) and parent.poll() is None:
        time.sleep(0.001)
    parent.send_signal(signal.SIGSTOP)
    listed = subprocess.run(["ps", "--ppid", str(parent.pid), "-o", "pid="], capture_output=True, text=True).stdout
    workers = [*map(int, listed.split())]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)
    monkeypatch.setattr(store, "_SMALL_SOURCE_BYTES", 0)
    with ThreadPoolExecutor(1) as threads:
        try:
            other = threads.submit(build_store, data, "train", tokenizer, cache)
            while not caplog.messages:
                assert not other.done()
                time.sleep(0.001)
            owner = (
                rf"another process \(pid {parent.pid} on {re.escape(socket.gethostname())}\) makes {cache}/train-\w+; "
            )
            assert re.match(f"{owner}this one waits", caplog.messages[0])
            parent.send_signal(signal.SIGKILL)
            parent.wait()
            time.sleep(0.3)
            assert f"pid {parent.pid} on" in next(cache.glob("*.lock")).read_text(), "a worker could still write"
        finally:
            os.kill(workers[0], signal.SIGCONT)
        assert_same(other.result(timeout=60), expected)
    assert not any(map(is_alive, workers))
    assert sorted(path.name for path in other.result().folder.iterdir()) == STORE_FILES
    assert len(list(cache.iterdir())) == 2  # with the lock


def test_a_worker_without_a_parent_ends_in_the_middle_of_a_piece(tmp_path, tokenizer):
    data = write_files(tmp_path / "data", 1)
    pieces = tuple(sources.list_pieces(data, "train", sources.PIECE_BYTES))
    job = tokenizing.Job(
        data=data, split="train", digest_bound=None, pieces=pieces, tokenizer=tokenizer, folder=tmp_path
    )
    path = tmp_path / "data" / "00.jsonl"
    path.unlink()
    os.mkfifo(path)
    with subprocess.Popen([sys.executable, "-m", tokenizing.__name__], stdin=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        worker.stdin.write(pickle.dumps(job) + pickle.dumps(0))
        worker.stdin.flush()
        try:
            with path.open("w"):  # which waits until the worker reads what is never written
                worker.stdin.close()
                assert worker.wait(timeout=60) == 1
        finally:
            worker.kill()


def test_a_bad_document_is_named_by_a_worker(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", FILE_BYTES)
    monkeypatch.setattr(store, "_SMALL_SOURCE_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    data = replace(write_files(tmp_path / "data", 4), on_bad="stop")
    with pytest.raises(ValueError, match=r"data/00.jsonl:2: 'text' is empty, .*; --data.on_bad skip"):
        build_store(data, "train", tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("bad", [False, True])
def test_a_source_that_changes_is_named(bad, tmp_path, tokenizer, monkeypatch):
    """Also where what it is while it changes cannot be read."""
    data, tokenize = write_files(tmp_path / "data", 2), tokenizing.tokenize_piece

    def tokenize_and_change(*arguments):
        tokenize(*arguments)
        (tmp_path / "data" / "01.jsonl").write_text('{"text": "in"}\n')
        if bad:
            raise ValueError("01.jsonl:1: not JSON")

    monkeypatch.setattr(tokenizing, "tokenize_piece", tokenize_and_change)
    with pytest.raises(ValueError, match=r"data changed while it was tokenized; the same command begins again"):
        build_store(data, "train", tokenizer, tmp_path / "cache")
    monkeypatch.setattr(tokenizing, "tokenize_piece", tokenize)
    assert build_store(data, "train", tokenizer, tmp_path / "cache").report.documents == 2


def test_large_documents_are_tokenized_few_at_a_time(monkeypatch):
    monkeypatch.setattr(tokenizing, "_CHARACTERS_PER_CALL", 10)
    examples = [Example(where="", completion="x" * size) for size in (3, 3, 4, 30, 1, 1)]
    batches = [[len(example.completion) for example in batch] for batch in tokenizing.batch_examples(examples)]
    assert batches == [[3, 3, 4], [30], [1, 1]]


def test_a_full_disk_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b " * 9999}))
    data = DataConfig(train=str(tmp_path / "a.jsonl"), kind="text", eval_fraction=0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may be longer, as if the disk were full
    try:
        with pytest.raises(OSError, match=f"data could not be written to {tmp_path}/cache .*File too large.*--data.ca"):
            build_store(data, "train", tokenizer, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_cache_that_may_only_be_read_is_read(tmp_path, tokenizer, monkeypatch):
    data = write_files(tmp_path / "data", 1)
    built = build_store(data, "train", tokenizer, tmp_path / "cache")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(store, "hold_lock", None)
    assert build_store(data, "train", tokenizer, tmp_path / "cache").folder == built.folder


def test_the_folder_of_stores(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(store.cache_folder(DataConfig())) == "/x/gemma2_jax/data"
    monkeypatch.setenv("SAVE_DIR", "/save")
    assert str(store.cache_folder(DataConfig())) == "/save/data-cache"
    assert str(store.cache_folder(DataConfig(cache="here"))) == "here"
