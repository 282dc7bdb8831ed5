"""Documents from files: what is read, and what each malformed one is told."""

import re
import sys

import pyarrow
import pytest
from pyarrow import parquet

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources
from gemma2_jax.data.records import Example, Turn
from gemma2_jax.data.report import Report

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
TURNS = (Turn(role="user", content="Hi"), Turn(role="assistant", content="Yo"))


def read(path, **choices):
    # Held out from another file, so that all of this one is training data.
    return list(sources.read_examples(DataConfig(**{"train": str(path), "eval": "python-docs"} | choices), "train"))


def test_text(jsonl):
    path = jsonl({"text": "a"}, {"text": "b\n", "id": 1})
    assert [(e.prompt, e.completion, e.turns) for e in read(path, kind="text")] == [("", "a", ()), ("", "b\n", ())]
    assert [e.where for e in read(path, kind="text")] == [f"{path}:1", f"{path}:2"]


def test_instructions(jsonl):
    (pair,) = read(jsonl({"prompt": "Q ", "completion": "A"}))
    assert (pair.prompt, pair.completion, pair.turns) == ("Q ", "A", ())
    (pair,) = read(jsonl({"q": "Q", "a": "A"}), columns="prompt=q,completion=a")
    assert (pair.prompt, pair.completion) == ("Q", "A")
    (talk,) = read(jsonl({"messages": TALK, "prompt": "unused"}))
    assert (talk.turns, talk.completion) == (TURNS, "")
    (filled,) = read(
        jsonl({"context": "C{}", "question": "Q?", "completion": "A"}),
        prompt_template="{{}} Context: {context} Question: {question} Answer:",
    )
    assert (filled.prompt, filled.completion) == ("{} Context: C{} Question: Q? Answer:", "A")


def test_directories_and_globs_are_read_in_the_order_of_names(jsonl, tmp_path):
    jsonl({"text": "2"}, name="b.jsonl")
    jsonl({"text": "3"}, name="c.jsonl")
    jsonl({"text": "unread"}, name="c.txt")
    parquet.write_table(pyarrow.table({"text": ["1"]}), tmp_path / "a.parquet")
    assert [e.completion for e in read(tmp_path, kind="text")] == ["1", "2", "3"]
    assert [e.completion for e in read(tmp_path / "[bc].jsonl", kind="text")] == ["2", "3"]


def test_parquet_holds_the_same(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": [TALK], "id": [7]}), path)
    assert read(path) == [Example(where=f"{path} row 1", turns=TURNS, shape="messages")]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a.parquet row 2: has no columns, or nulls alone"):
        read(path, kind="text")
    path.write_text("not that")
    with pytest.raises(ValueError, match=r"a.parquet: not Parquet"):
        read(path, kind="text")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow: pip install 'gemma2-jax\[parquet\]'"):
        read(tmp_path)


GOOD = {"prompt": "Q", "completion": "A"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": ', "not JSON .*each line holds one JSON object"),
        ("[1]", "holds a list; a document is a JSON object"),
        ("", "the line is blank; remove it"),
        ("  ", "the line is blank; remove it"),
        ({"question": "Q"}, "its columns 'question' are none of a document's .* --data.columns text=question"),
        (
            {"prompt": 1, "completion": "A"},
            "'prompt' and 'completion' are a number and a text; they must be two texts",
        ),
        ({"prompt": "Q", "completion": ["A"]}, "'prompt' and 'completion' are a text and a list"),
        ({"prompt": "Q", "completion": " \n"}, "'completion' is empty"),
        ({"messages": "Q"}, "'messages' is a text that is not JSON; it must be a list"),
        ({"messages": 1}, "'messages' is a number; it must be a list"),
        (
            {"messages": [*TALK, {"role": "user"}]},
            "message 3 has 'role'; it must have 'role' and 'content', or 'from' and",
        ),
        (
            {"messages": TALK[:1]},
            "no message has the role 'assistant', .*: its roles are 'user'; name the one to learn",
        ),
        ({"messages": []}, "no message has the role 'assistant', .*: it has no messages"),
        ({"text": "a"}, "its columns 'text' are none .*; to train on its 'text' as plain text, give --data.kind text"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "message 2 is an empty answer"),
    ],
)
def test_malformed_lines_are_named(jsonl, bad, message):
    with pytest.raises(ValueError, match=rf"data.jsonl:2: {message}"):
        read(jsonl(GOOD, bad, GOOD))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "A"}\n{"prompt": "Q", "completion": "A"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1: has bytes that are not UTF-8; convert .* iconv"):
        read(tmp_path)
    report = Report()
    data = DataConfig(train=str(tmp_path), eval_fraction=0.0, on_bad="skip")
    assert [example.completion for example in sources.read_examples(data, "train", report)] == ["A"]
    assert {reason: finding.count for reason, finding in report.dropped.items()} == {"not UTF-8": 1}


@pytest.mark.parametrize(
    ("record", "choices", "advice"),
    [
        (
            {"prompt": "Q", "answer": "A"},
            {},
            "--data.columns user=prompt,assistant=answer writes them by the chat template, and --data.columns "
            "prompt=prompt,completion=answer joins them as they are",
        ),
        (
            {"My Question": "Q", "b": "A"},
            {},
            "say which of them hold what: --data.columns user=COLUMN,assistant=COLUMN",
        ),
        ({"the dialog": TALK, "title": "T"}, {}, "give --data.columns 'messages=the dialog'"),
        ({"the body": "T", "n": 1}, {}, "give --data.kind text --data.columns 'text=the body'"),
        ({"foo": 1}, {}, "none of them is a text; write documents of one of these shapes"),
        ({"q": "Q", "a": "A"}, {"columns": "prompt=q"}, "too: --data.columns prompt=q,completion=a"),
        ({"q": "Q", "x": "A", "y": "A"}, {"columns": "prompt=q"}, "too: --data.columns prompt=q,completion=COLUMN"),
        ({"url": "U", "body": "B"}, {"kind": "text"}, "as in --data.columns text=COLUMN"),
    ],
)
def test_columns_are_suggested_where_they_tell(jsonl, record, choices, advice):
    with pytest.raises(ValueError, match=re.escape(advice)):
        read(jsonl(record), **choices)


def test_a_table_that_lacks_its_header_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("What is 1 + 1?,It is 2.\nWhat is 1 + 2?,It is 3.\n")
    with pytest.raises(ValueError, match=r"a.csv:2: .* put a first line before them that names the columns"):
        read(tmp_path)


def test_malformed_text_and_templates_are_named(jsonl):
    with pytest.raises(
        ValueError,
        match=r"data.jsonl:1: has no 'text'; it has 'body'; name .* --data.columns text=body",
    ):
        read(jsonl({"body": "a"}), kind="text")
    with pytest.raises(ValueError, match=r"it has 'prompt', 'completion'; .*, give --data.kind instructions"):
        read(jsonl(GOOD), kind="text")
    with pytest.raises(ValueError, match=r"data.jsonl:1: 'text' is empty"):
        read(jsonl({"text": ""}), kind="text")
    with pytest.raises(ValueError, match=r"data.jsonl:1: has no 'x'; it has 'prompt', "):
        read(jsonl(GOOD), prompt_template="{x}")
    with pytest.raises(ValueError, match=r"data.prompt_template '\{x': .*; write a brace itself twice"):
        read(jsonl(GOOD), prompt_template="{x")


def test_sources_without_documents_are_errors(jsonl, tmp_path):
    with pytest.raises(
        ValueError, match=r"no data at '.*nothing': there is no such file or folder; give 'python-docs', a file"
    ):
        read(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no data at .*: the folder has no file of a format"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no data at .*: no file has a name like that"):
        read(tmp_path / "*.jsonl")
    (tmp_path / "web.idx").touch()
    with pytest.raises(ValueError, match=rf"--data.train {tmp_path}/web; it has web"):
        read(tmp_path)
    with pytest.raises(ValueError, match=rf"did you mean the .bin and .idx files {tmp_path}/web\?"):
        read(tmp_path / "wep")
    (tmp_path / "web.idx").unlink()
    with pytest.raises(ValueError, match=r"data.jsonl is empty"):
        read(jsonl())
    with pytest.raises(ValueError, match=r"data.xml is none of the formats that are read \(.jsonl, .*\); convert"):
        read(jsonl(GOOD, name="data.xml"))


def test_held_out_documents_depend_on_what_they_say_alone(jsonl):
    records = [{"text": str(number)} for number in range(500)]
    data = DataConfig(kind="text", train=jsonl(*records), eval_fraction=0.1)
    held_out = {e.completion for e in sources.read_examples(data, "eval")}
    trained_on = {e.completion for e in sources.read_examples(data, "train")}
    assert len(held_out) + len(trained_on) == 500
    assert not held_out & trained_on
    assert 30 < len(held_out) < 70
    jsonl(*records[250:], *records[:250])
    assert {e.completion for e in sources.read_examples(data, "eval")} == held_out


def test_of_few_documents_one_is_held_out(jsonl):
    """That with the lowest digest, whatever their order, where none is below the share; none where none is asked."""
    records = [{"text": str(number)} for number in range(60)]
    data = DataConfig(kind="text", train=jsonl(*records), eval_fraction=1e-9)
    (held_out,) = sources.read_examples(data, "eval")
    trained_on = list(sources.read_examples(data, "train"))
    assert len(trained_on) == 59 and held_out not in trained_on
    assert held_out.digest < min(example.digest for example in trained_on)
    jsonl(*reversed(records))
    assert [example.completion for example in sources.read_examples(data, "eval")] == [held_out.completion]
    nothing = DataConfig(kind="text", train=data.train, eval_fraction=0.0)
    assert not list(sources.read_examples(nothing, "eval"))
    assert len(list(sources.read_examples(nothing, "train"))) == 60


def test_bad_records_are_left_out_and_counted(jsonl):
    report = Report()
    path = jsonl(GOOD, "", "{", "", GOOD | {"completion": " "}, GOOD, "", "")
    data = DataConfig(train=path, eval="python-docs", on_bad="skip")
    assert [e.where for e in sources.read_examples(data, "train", report)] == [f"{path}:1", f"{path}:6"]
    assert {reason: (found.count, found.first.partition(": ")[0]) for reason, found in report.dropped.items()} == {
        "blank line": (2, f"{path}:2"),
        "not JSON": (1, f"{path}:3"),
        "empty": (1, f"{path}:5"),
    }


def test_blank_lines_at_the_end_are_nothing(jsonl):
    assert len(read(jsonl(GOOD, GOOD, "", ""))) == 2
