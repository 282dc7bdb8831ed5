"""`python -m gemma2_jax.data`: text written as .bin and .idx, and what is printed of data sets."""

import errno
import itertools
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax import config_text, recipes
from gemma2_jax.config import DataConfig
from gemma2_jax.data import __main__ as command, store, tokenizing
from gemma2_jax.data.cache import hold_lock
from gemma2_jax.data.megatron import building
from gemma2_jax.data.megatron.indexed import IndexedWriter, open_indexed
from gemma2_jax.data.store import build_store

TINY = str(Path(__file__).parents[2] / "assets" / "tiny-gemma2")
TEXTS = ["One text.", "Another, with a \x1b of its own.", "json.dumps"]
CONVERSATION = [{"role": "user", "content": "Name a color."}, {"role": "assistant", "content": "Green."}]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command and returns its standard output."""

    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["data", *words])
        command.main()
        return capsys.readouterr().out

    return run_command


@pytest.fixture
def corpus(jsonl):
    return jsonl(*({"text": text} for text in TEXTS))


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_written_as_it_is_trained_on(run, corpus, tmp_path, tokenizer, bos):
    prefix = f"{tmp_path}/out"
    said = run("build", corpus, prefix, "--data.tokenizer", TINY, *([] if bos else ["--bos", "false"]))
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    documents = [[2] * bos + tokens + [1] for tokens in encoded]
    written = open_indexed(prefix)
    assert (written.tokens.tolist(), written.tokens.dtype) == ([*itertools.chain(*documents)], np.uint16)
    assert written.lengths.tolist() == list(map(len, documents))
    assert said.startswith(
        f"wrote {prefix}.bin and {prefix}.idx: 3 documents, {sum(map(len, documents))} tokens as uint16"
    )
    assert said.endswith(f"--data.kind text --data.train {prefix}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.bin", "out.idx"}


def test_the_name_of_a_file_is_a_prefix_too(run, corpus, tmp_path):
    run("build", corpus, f"{tmp_path}/out.bin", "--data.tokenizer", TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.bin", "out.idx"}


def test_a_refused_build_leaves_nothing(run, jsonl, tmp_path):
    with pytest.raises(SystemExit, match=r"data.jsonl:2: .* --data.on_bad skip leaves such documents out"):
        run("build", jsonl({"text": "a"}, {"text": ""}), f"{tmp_path}/out", "--data.tokenizer", TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_a_build_goes_on_that_was_killed_between_its_two_files(run, corpus, tmp_path, monkeypatch):
    words = "build", corpus, f"{tmp_path}/out", "--data.tokenizer", TINY
    rename = Path.rename

    def rename_tokens(path, target):
        if path.name == "idx":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_tokens)
        with pytest.raises(SystemExit, match="130"):
            run(*words)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.bin", "out.partial"}
    run(*words)
    assert len(open_indexed(f"{tmp_path}/out").lengths) == len(TEXTS)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.bin", "out.idx"}


def test_a_foreign_file_is_left_alone(run, corpus, tmp_path):
    (tmp_path / "out.partial").mkdir()
    for path in (tmp_path / "out.bin", tmp_path / "out.partial" / "bin", tmp_path / "out.partial" / "idx"):
        path.write_text("mine")
    with pytest.raises(SystemExit, match=r"out.bin exists already; delete it"):
        run("build", corpus, f"{tmp_path}/out", "--data.tokenizer", TINY)
    assert (tmp_path / "out.bin").read_text() == "mine"


def test_a_build_that_waited_finds_what_another_has_made(run, corpus, tmp_path, caplog):
    partial = tmp_path / "out.partial"

    def make() -> None:
        with hold_lock(partial / "build"):
            entered.set()
            while not caplog.messages:  # until the command waits
                time.sleep(0.01)
            for name in ("out.bin", "out.idx"):
                (tmp_path / name).write_text("another's")
            shutil.rmtree(partial)

    entered = threading.Event()
    maker = threading.Thread(target=make)
    maker.start()
    entered.wait(10)
    with pytest.raises(SystemExit, match=r"out.bin exists already"):
        run("build", corpus, f"{tmp_path}/out", "--data.tokenizer", TINY)
    maker.join(10)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.bin", "out.idx"}
    assert (tmp_path / "out.bin").read_text() == "another's"


def test_a_full_disk_is_told_without_advice_on_a_cache(run, corpus, tmp_path, monkeypatch):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((store, "_write_store"), (IndexedWriter, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, write)
            with pytest.raises(SystemExit) as ended:
                run("build", corpus, f"{tmp_path}/out", "--data.tokenizer", TINY)
        assert str(ended.value.code) == (
            f"error: {tmp_path}/out.bin and .idx could not be written ([Errno 28] No space left on device); once that "
            f"is mended the same command goes on from what is kept in {tmp_path}/out.partial, or write elsewhere"
        )


def test_a_file_of_several_sources_is_noted(run, corpus):
    other = f"{Path(corpus).parent}/./data.jsonl"
    said = run("inspect", f"{corpus},{other}")
    assert f"note: several sources ({corpus}, {other}) have {corpus}; it is trained on in each" in said


def test_an_interrupted_build_goes_on(run, corpus, tmp_path, capsys, monkeypatch):
    words = "build", corpus, f"{tmp_path}/out", "--data.tokenizer", TINY

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IndexedWriter, "write", interrupt)
        with pytest.raises(SystemExit, match="130"):
            run(*words)
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on\n")
    assert not Path(f"{tmp_path}/out.idx").exists()
    monkeypatch.delattr(tokenizing, "tokenize_pieces")  # all is tokenized
    run(*words)
    assert len(open_indexed(f"{tmp_path}/out").lengths) == 3


def test_many_documents_are_written_in_parts(run, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_CHUNK", 40)  # tokens; some documents are longer
    source = jsonl(*({"text": "word " * (number % 50 + 1)} for number in range(60)))
    run("build", source, f"{tmp_path}/out", "--data.tokenizer", TINY, "--workers", "1", "--bos", "False")
    written = open_indexed(f"{tmp_path}/out")
    assert len(written.lengths) == 60
    assert (written.tokens[np.cumsum(written.lengths) - 1] == 1).all() and (written.tokens != 2).all()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["build", "{corpus}", "{folder}/out"], "--data.tokenizer must be given: a folder, or a Hub id"),
        (["build", "{corpus}", "{folder}/out", "--data.seed", "1"], "data.seed is a choice of a run"),
        (["build", "{corpus}", "{folder}/out", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["inspect", "{corpus}", "--samples", "-1"], "documents is 1000 and samples -1; neither may be negative"),
        (["inspect", ""], "source is empty"),
        (["inspect", "{corpus}", "--data.stream", "True"], "data.stream is a choice of a run"),
        (["bulid"], "there is no command bulid; did you mean build? There are inspect, build"),
    ],
)
def test_what_is_asked_wrongly_is_told(run, corpus, tmp_path, capsys, words, reason):
    with pytest.raises(SystemExit, match="2"):
        run(*(word.format(corpus=corpus, folder=tmp_path) for word in words))
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["build", "{folder}/old", "{folder}/out"], "old is tokenized already; train on it with --data.train"),
        (["build", "{corpus}", "{folder}/old"], "old.bin exists already; delete it, or give another prefix"),
        (["build", "{corpus}", "{folder}"], "is a folder; give the beginning of two files' names"),
        (
            ["build", "{corpus}", "{folder}/out", "--data.kind", "instructions"],
            "cannot say which tokens answer a prompt",
        ),
        (["build", "{folder}/none.jsonl", "{folder}/out"], "no data at"),
    ],
)
def test_what_cannot_be_built_is_told(run, corpus, tmp_path, words, reason):
    with IndexedWriter(f"{tmp_path}/old", np.dtype("<u2"), tmp_path / "partial") as writer:
        writer.write(np.array([5]), np.array([1]))
    words = [word.format(corpus=corpus, folder=tmp_path) for word in words]
    with pytest.raises(SystemExit, match=reason):
        run(*words, "--data.tokenizer", TINY)


def test_a_source_is_inspected(run, jsonl):
    source = jsonl({"messages": CONVERSATION}, {"messages": CONVERSATION[:1]}, {"prompt": "1+1=", "completion": "2"})
    lines = run("inspect", source, "--data.tokenizer", TINY).splitlines()
    assert [" ".join(line.split()) for line in lines[:6]] == [
        f"source {source}",
        f"places 1, of {Path(source).stat().st_size} bytes: {source}",
        "documents 2",
        "shapes 1 messages, 1 prompt and completion",
        "bad documents 1, at the first of which training stops; with --data.on_bad skip they are left out",
        f"note 1 document left out (no answer); the first is {source}:2: no message has the role 'assistant', which "
        "leaves nothing to learn: its roles are 'user'; name the one to learn from 'assistant'",
    ]
    assert "are learned" in lines[6] and "shortest" in lines[7]
    assert "longer than     2,048 tokens: 0 (0.0%), 4,096 tokens: 0" in lines[8]
    assert lines[9:] == [
        "",
        "sample 1 of 2; what is between [[ and ]] is learned",
        "<bos><start_of_turn>user",
        "Name a color.<end_of_turn>",
        "<start_of_turn>model",
        "[[Green.<end_of_turn>]]",
        "[[<eos>]]",
        "",
        "sample 2 of 2; what is between [[ and ]] is learned",
        "<bos>1+1=[[2<eos>]]",
    ]


def test_a_source_is_inspected_without_a_tokenizer(run, corpus):
    said = run("inspect", corpus, "--documents", "2")
    assert "read as plain text, which training does with --data.kind text" in said
    assert "documents       2, the first ones; --documents 0 reads all\nshapes          2 text\n" in said
    assert "\n[[One text.]]\n" in said and r"[[Another, with a \x1b of its own.]]" in said
    assert f"characters      {sum(map(len, TEXTS[:2]))}, of which" in said
    assert said.endswith("With --data.tokenizer FOLDER, a folder or a Hub id, tokens are counted and shown as text.\n")


def test_documents_that_training_leaves_out_are_no_bad_news(run, jsonl):
    source = jsonl({"messages": CONVERSATION}, {"messages": []})
    said = run("inspect", source, "--data.on_bad", "skip")
    assert "1 document left out (no answer)" in said and "training stops" not in said


def test_documents_longer_than_a_row_are_counted(run, jsonl):
    source = jsonl(*({"prompt": "Q", "completion": "word " * count} for count in (5, 2500, 5000, 9000)))
    said = run("inspect", source, "--data.tokenizer", TINY, "--samples", "0")
    assert "longer than     2,048 tokens: 3 (75.0%), 4,096 tokens: 2 (50.0%), 8,192 tokens: 1 (25.0%); of a" in said


def test_no_more_bad_documents_are_read_than_asked(run, jsonl, capsys):
    source = jsonl(*[{"messages": []}] * 9)
    with pytest.raises(SystemExit, match=f"error: no document of {source} that was read can be trained on"):
        run("inspect", source, "--documents", "4")
    said = capsys.readouterr().out
    assert "documents       0, the first ones; --documents 0 reads all\n" in said
    assert "4 documents left out (no answer)" in said


def test_long_runs_lose_their_middle(run, jsonl):
    said = run("inspect", jsonl({"text": "x" * 500}), "--data.kind", "text")
    assert f"[[{'x' * 240} [... 20 characters ...] {'x' * 240}]]" in said


def test_tokenized_data_is_inspected(run, corpus, tmp_path, tokenizer):
    """A folder of the cache, and the run that trains on it, whose options are taken."""
    data = DataConfig(kind="text", train=corpus, eval_fraction=0, cache=f"{tmp_path}/cache")
    store = build_store(data, "train", tokenizer, tmp_path / "cache")
    of_store = run("inspect", str(store.folder), "--data.tokenizer", TINY)
    assert "documents       3\nshapes          3 text\n" in of_store and "<bos>[[One text.<eos>]]" in of_store
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = replace(recipes.load_recipe("tiny_pretrain"), data=data)
    (workdir / "config.txt").write_text(config_text.to_text(config))
    (workdir / "tokenizer").symlink_to(TINY)
    assert run("inspect", str(workdir)) == of_store
    stream = replace(config, data=replace(data, stream=True, cache=f"{tmp_path}/none"))
    (workdir / "config.txt").write_text(config_text.to_text(stream))
    assert "documents       3\n" in run("inspect", str(workdir))
    assert not (tmp_path / "none").exists(), "a stream is tokenized to be inspected"


def test_indexed_data_is_inspected(run, tmp_path):
    with IndexedWriter(f"{tmp_path}/a", np.dtype("<u2"), tmp_path / "partial") as writer:
        writer.write(np.array([2, 500, 1, 2, 1]), np.array([3, 0, 2]))
    said = run("inspect", f"{tmp_path}/a.idx", "--data.tokenizer", TINY, "--samples", "1")
    assert "a.bin and .idx: 10 bytes of uint16" in said
    assert "documents       3, of which 1 are empty" in said
    assert "100% of documents begin with token 2 (<bos>), 100% of documents end with token 1 (<eos>)" in said
    assert "tokens          5, of which 3 (60%) are learned" in said


def test_each_of_several_sources_is_inspected(run, corpus, tmp_path):
    with IndexedWriter(f"{tmp_path}/a", np.dtype("<u2"), tmp_path / "partial") as writer:
        writer.write(np.array([2, 1]), np.array([2]))
    said = run("inspect", f"0.7*{tmp_path}/a,0.3*{corpus}", "--samples", "0")
    assert [line.split()[1] for line in said.splitlines() if line.startswith("source")] == [f"{tmp_path}/a.bin", corpus]
