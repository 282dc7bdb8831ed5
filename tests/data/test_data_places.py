"""Documents from every place: formats, compressions, folders, splits, URLs, pieces; and what damaged files are told."""

import csv
import gzip
import io
import json
import os
import pickle
import re
import struct
import sys
import types
from pathlib import Path

import fsspec
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFile
from pyarrow import ipc, parquet

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources
from gemma2_jax.data.reading import hub, places
from gemma2_jax.data.records import SHAPES, BadRecord, make_example
from gemma2_jax.data.report import Report

RECORDS = [{"prompt": f"Q{number} é,\n", "completion": f'A"{number}"'} for number in range(5)]
DOCUMENTS = [(record["prompt"], record["completion"]) for record in RECORDS]
TABLE = pyarrow.Table.from_pylist(RECORDS)


def write_lines(records=RECORDS):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_csv(separator=",", bom=""):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([["prompt", "completion"], *DOCUMENTS])
    return (bom + text.getvalue()).encode()


def write_arrow(new, rows=2):
    sink = pyarrow.BufferOutputStream()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=rows)
    return sink.getvalue().to_pybytes()


def zero_length(stream, message):
    """An Arrow stream with 0 in place of the length of one of its messages."""
    start = [found.start() for found in re.finditer(rb"\xff{4}(?=[^\xff]\x00*)", stream)][message]
    return stream[: start + 4] + bytes(4) + stream[start + 8 :]


def write_parquet(table=TABLE, rows=2):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


def compress(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


LINES, ARRAY = write_lines(), json.dumps(RECORDS).encode()
LINE = LINES.splitlines()[0]
FILES = {  # that all hold DOCUMENTS
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.json": ARRAY,
    "indented.json": json.dumps(RECORDS, indent=2).encode(),
    "lines.json": LINES,
    "array.jsonl": b"\n " + ARRAY,
    "values.jsonl": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "A.JSONL": LINES,
    "a.csv": write_csv(),
    "bom.csv": write_csv(bom="\ufeff"),
    "semicolon.csv": write_csv(";"),
    "blank.csv": write_csv() + b"\r\n\r\n",
    "a.tsv": write_csv("\t"),
    "a.parquet": write_parquet(),
    "A.PARQUET": write_parquet(),
    "FILE.Arrow": write_arrow(ipc.new_file),
    "stream.arrow": write_arrow(ipc.new_stream),
    "file.arrow": write_arrow(ipc.new_file),
    "a.jsonl.gz": gzip.compress(LINES),
    "two.jsonl.gz": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    "a.json.zst": compress(ARRAY),
    "two.jsonl.zst": compress(LINES[:100]) + compress(LINES[100:]),
    "a.csv.zst": compress(write_csv()),
    "a.tsv.gz": gzip.compress(write_csv("\t")),
}


def read(source, split="train", **choices):
    data = DataConfig(**{"train": str(source), "eval_fraction": 0.0} | choices)
    return [(e.prompt, e.completion) for e in sources.read_examples(data, split)]


@pytest.mark.parametrize("name", FILES)
def test_every_format_holds_the_same(tmp_path, name, monkeypatch):
    """Whatever is read at one time, and however the file is cut."""
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == DOCUMENTS
    whole = [located for piece in cut(tmp_path / name, 1 << 20) for located in places.read_piece(piece)]
    for module in ("files", "formats"):
        monkeypatch.setattr(f"gemma2_jax.data.reading.{module}.BUFFER_BYTES", 7)
    for size in (1, 60, 200):
        pieces = pickle.loads(pickle.dumps(cut(tmp_path / name, size)))
        assert [located for piece in pieces for located in places.read_piece(piece)] == whole
        is_cut = name in ("a.jsonl", "a.ndjson", "lines.json", "bom.jsonl", "crlf.jsonl", "A.JSONL")
        if size == 1:
            assert len(pieces) == (5 if is_cut else 3 if name.lower().endswith((".arrow", ".parquet")) else 1)
            assert len(set(pieces)) == len(pieces)


def cut(source, piece_bytes):
    chosen = places.choose_training(DataConfig(train=str(source)))[0].places
    return places.list_pieces(chosen, piece_bytes)


def test_commas_in_the_names_of_columns_separate_nothing(tmp_path):
    (tmp_path / "a.csv").write_text('"a, b, c, d";prompt;"comple""tion, or\nnot"\n1;2;3\n')
    ((_, record, _),) = places.read_piece(cut(tmp_path / "a.csv", 1 << 20)[0])
    assert record == {"a, b, c, d": "1", "prompt": "2", 'comple"tion, or\nnot': "3"}


def test_blank_lines_are_told_of_wherever_a_file_is_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n\n  \n{"a": 2}   \n\n{"a": 3}\n\n\n')
    for size in range(1, 40):
        located = [located for piece in cut(path, size) for located in places.read_piece(piece)]
        assert [where for where, _, _ in located] == [f"{path}:{number}" for number in (1, 2, 5, 6, 7)]
        assert [type(record) for _, record, _ in located] == [dict, BadRecord, dict, BadRecord, dict]


def test_values_of_an_array_may_be_cut_anywhere(tmp_path, monkeypatch):
    values = [1234567, -0.125e10, True, None, 12, float("-inf"), "\\\n\u00e9\U0001f600", [1, {"a": []}], {}]
    (tmp_path / "a.json").write_text(json.dumps(values))
    for size in range(1, 20):
        monkeypatch.setattr("gemma2_jax.data.reading.formats.BUFFER_BYTES", size)
        assert [record for _, record, _ in places.read_piece(cut(tmp_path / "a.json", 1)[0])] == values


def test_small_files_share_a_piece(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("abcd")
    pieces = cut(tmp_path, 12)
    assert [len(piece.parts) for piece in pieces] == [3, 3, 3]
    assert [piece.size for piece in pieces] == [12, 12, 12]
    assert read(tmp_path, kind="text") == [("", "abcd")] * 9


# Bytes of a file under a name, and what reading it says.
DAMAGE = {
    "a.jsonl.gz": (
        gzip.compress(LINES)[:-9],
        r"a.jsonl.gz is damaged or cut short \(Compressed file ended .*; copy",
    ),
    "b.jsonl.gz": (LINES, r"b.jsonl.gz is named as if compressed by gzip, and is not compressed; take .gz off"),
    "a.jsonl.zst": (compress(LINES)[:-9], r"a.jsonl.zst is damaged or cut short \(Truncated compressed stream\)"),
    "b.jsonl.zst": (LINES, r"b.jsonl.zst is named as if compressed by Zstandard, and is not compressed; take .zst off"),
    "gz.jsonl": (gzip.compress(LINES), r"gz.jsonl is compressed by gzip; name it so that it ends with .gz"),
    "excel.csv": (b"PK\x03\x04", r"excel.csv is a ZIP archive or an Excel sheet; give what it was made from"),
    "utf16.csv": (
        write_csv().decode().encode("utf-16"),
        r"utf16.csv is UTF-16LE, .*utf16.csv \| iconv -f UTF-16LE ",
    ),
    "utf32.jsonl": (LINES.decode().encode("utf-32-be"), r"utf32.jsonl is UTF-32BE, "),
    "cut.json": (ARRAY[:-9], r"cut.json:1: not JSON \(the file ends within a value\), and nothing after it can be"),
    "open.json": (ARRAY[:-1], r"open.json:1: not JSON \(the file ends before a comma, or the end of the array,\)"),
    "comma.json": (
        b"[%b\n%b]" % (LINE, LINE),
        r"comma.json:2: not JSON \(a comma, or .*, was to come, and '\{'",
    ),
    "trail.json": (b"[%b,\n]" % LINE, r"trail.json:2: not JSON \(a comma comes before the end of the array\)"),
    "more.json": (b"[%b] {}" % LINE, r"more.json:1: not JSON \(more follows the end of the array\)"),
    "bad.json": (b'[%b,\n{"a" 2}' % LINE + b" " * 99, r"bad.json:2: not JSON \(Expecting ':' delimiter\)"),
    "byte.json": (b'[{"prompt": "\xff", "completion": "b"}]', r"byte.json:1: has bytes that are not UTF-8; convert"),
    "deep.json": (b"[" * 99999, r"deep.json:1: not JSON \(maximum recursion depth"),
    "digits.json": (b'[%b,\n{"a": %b}]' % (LINE, b"9" * 5000), r"digits.json:2: not JSON \(Exceeds the limit \(4300"),
    "mixed.jsonl": (
        LINES + '{"prompt": "a"}'.encode("utf-16-le"),
        r"mixed.jsonl:\d+: not JSON \(Expecting property name",
    ),
    "one.json": (
        b'{"version": 1, "data": %b}' % ARRAY,
        r"one.json is one object, of which 'data'",
    ),
    "empty.json": (b"[]", r"empty.json is empty; remove it"),
    "empty.csv": (b"prompt,completion\n", r"empty.csv is empty; remove it"),
    "long.csv": (b"prompt,completion\na,b,c\n", r"long.csv:2: has 3 columns, and the first line names 2; quote what"),
    "short.csv": (b'prompt,completion\n"a\na",b\na\n', r"short.csv:4: has 1 column, and the first line names 2"),
    "quote.csv": (
        b'prompt,completion\n"a"a,b\n',
        r"quote.csv:2: not CSV \(.*\); a quote within quotes is written",
    ),
    "open.csv": (b'prompt,completion\na,"b\n', r"open.csv:2: a quote in this row is not closed before the end"),
    "header.csv": (
        b'prompt,"comp"letion\n"a",b\n',
        r"header.csv:1: the line that names the columns is not CSV \(.*\); a quote within quotes is written twice",
    ),
    "long;.csv": (b'a;"b, c, d"\n1;2;3\n', r"long;.csv:2: has 3 columns, .* names 2; quote what has semicolons in it"),
    "twice.csv": (b"prompt,prompt\na,b\n", r"twice.csv has two columns 'prompt'; its first line must name each"),
    "latin.csv": (
        "prompt,completion\né,b\n".encode("latin-1"),
        r"latin.csv:2: has bytes that are not UTF-8; .*WIND",
    ),
    "blank.csv": (b"prompt,completion\na,b\n\na,b\n", r"blank.csv:3: the line is blank; remove it"),
    "latin.txt": (b"\xe9", r"latin.txt: has bytes that are not UTF-8"),
    "empty.txt": (b"", r"empty.txt: 'text' is empty"),
    "a.parquet": (write_parquet()[:-9], r"a.parquet: not Parquet, or cut short \(.*\); copy it again"),
    "page.parquet": (b"PAR1" + bytes(60) + write_parquet()[64:], r"page.parquet: damaged \(.*\); copy it again"),
    "a.arrow": (write_arrow(ipc.new_file)[:-9], r"a.arrow: not Arrow, or cut short \(.*\); copy it again"),
    "stream.arrow": (write_arrow(ipc.new_stream)[:-80], r"stream.arrow: .*; copy it again"),
    "cut.arrow": (
        write_arrow(ipc.new_stream)[:-8],
        r"cut.arrow: an Arrow stream without its end mark, so that it is cut",
    ),
    "zeros.arrow": (
        # The length of the third message, which is then an end mark.
        zero_length(write_arrow(ipc.new_stream), message=2),
        r"zeros.arrow: damaged, as it goes on behind its end mark; copy it again",
    ),
    "offsets.arrow": (
        # Where the texts of the first two rows end: reading so far beyond them ended the process.
        write_arrow(ipc.new_stream).replace(struct.pack("<3i", 0, 7, 14), struct.pack("<3i", 0, 1 << 30, 14)),
        r"offsets.arrow: not Arrow, or cut short \(.*\); copy it again",
    ),
    "lines.arrow": (LINES, r"lines.arrow: .*; copy it again"),
    "a.jsonl.xz": (LINES, r"a.jsonl.xz is none of the formats that are read \(.jsonl, .*.gz or .zst\); convert"),
    "a.parquet.gz": (
        gzip.compress(write_parquet()),
        r"a.parquet.gz is compressed by gzip, and Parquet is read only where .*; unpack it: gzip -dk .*.parquet.gz",
    ),
    "twice.jsonl.gz": (
        gzip.compress(gzip.compress(LINES)),
        r"twice.jsonl.gz is compressed twice: .* is compressed by gzip again; .*: gzip -dc .* > unpacked.jsonl.gz",
    ),
    "a.jsonl.gz.gz": (b"", r"a.jsonl.gz.gz is compressed twice; unpack it once, of gzip: gzip -dk .*a.jsonl.gz.gz$"),
    "gzip.jsonl.zst": (
        gzip.compress(LINES),
        r"named as if compressed by Zstandard, and is compressed by gzip; name it so that it ends with .gz",
    ),
    "lfs.json.gz": (b"version https://git-lfs.github.com/spec/v1\n", r"lfs.json.gz is a pointer of Git LFS, not the"),
    "it's one.json.gz": (
        gzip.compress(json.dumps({"my data": RECORDS}).encode()),
        r"""write them as lines: gzip -dc '.*it'"'"'s one.json.gz' \| jq -c '.\["my data"\]\[\]' > documents.jsonl$""",
    ),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", r"lfs.jsonl is a pointer of Git LFS, not the file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(tmp_path, name):
    content, sentence = DAMAGE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / name, kind="text" if name.endswith(".txt") else "instructions")


def test_a_bad_row_is_left_out_and_the_others_are_read(tmp_path):
    report = Report()
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\na,b\na,b,c\n"a"a,b\nc,d\n')
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": ["a", "b", "c"], "completion": texts})
    (tmp_path / "b.parquet").write_bytes(write_parquet(table, rows=3))
    data = DataConfig(train=str(tmp_path), eval_fraction=0.0, on_bad="skip")
    read = [(e.prompt, e.completion) for e in sources.read_examples(data, "train", report)]
    assert read == [("a", "b"), ("c", "d"), ("a", "a"), ("c", "c")]
    assert {reason: finding.count for reason, finding in report.dropped.items()} == {
        "columns": 1, "not CSV": 1, "not UTF-8": 1,
    }  # fmt: skip


def test_texts_that_are_not_utf8_hide_no_damage(tmp_path):
    """In the same rows, lists of messages included: reading on ended the process."""
    messages = [[{"role": b"\xff", "content": b"an answer"}, {"role": b"user", "content": b"a question"}]]
    entry = pyarrow.struct([("role", pyarrow.binary()), ("content", pyarrow.binary())])
    array = pyarrow.array(messages, pyarrow.list_(entry))
    texts = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    table = pyarrow.table({"messages": array.view(texts)})
    sink = pyarrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    (tmp_path / "a.arrow").write_bytes(content)
    data, report = DataConfig(train=str(tmp_path), eval_fraction=0.0, on_bad="skip"), Report()
    assert not list(sources.read_examples(data, "train", report))
    assert list(report.dropped) == ["not UTF-8"]
    offsets = struct.pack("<3i", 0, 9, 19)
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, struct.pack("<3i", 0, 1 << 30, 19)))
    with pytest.raises(ValueError, match=r"a.arrow: not Arrow, or cut short"):
        list(sources.read_examples(data, "train", Report()))


def test_no_record_is_longer_than_memory_is_for(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma2_jax.data.reading.formats.MAX_BYTES", 1 << 20)
    monkeypatch.setattr("gemma2_jax.data.reading.formats.BUFFER_BYTES", 1 << 16)
    long = {"prompt": "Q", "completion": "A" * (1 << 21)}
    (tmp_path / "a.jsonl").write_bytes(write_lines([RECORDS[0], long, RECORDS[1]]))
    report = Report()
    data = DataConfig(train=str(tmp_path / "a.jsonl"), eval_fraction=0.0, on_bad="skip")
    assert [e.where.rpartition(":")[2] for e in sources.read_examples(data, "train", report)] == ["1", "3"]
    assert report.dropped["too long"].first.startswith(f"{tmp_path}/a.jsonl:2: the line is longer than ")
    for name, content in [("a.json", json.dumps([long])), ("a.csv", f"prompt,completion\na,{'b' * (1 << 21)}\n")]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=r"is longer than .*jq -c|a.csv has a line that is longer than"):
            read(tmp_path / name)
    (tmp_path / "a.txt").write_text("a" * (1 << 21))
    with pytest.raises(ValueError, match=r"a.txt is longer than"):
        read(tmp_path / "a.txt", kind="text")


def fill(folder, *names):
    """Files that each hold one document, which says its name."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"text": name}
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([record]), path)
        elif name.endswith(".arrow"):
            with ipc.new_stream(str(path), pyarrow.schema({"text": pyarrow.string()})) as writer:
                writer.write_table(pyarrow.Table.from_pylist([record]))
        else:
            path.write_text(name if name.endswith(".txt") else json.dumps(record))


def choose(source, **choices):
    data = DataConfig(**{"train": str(source), "kind": "text"} | choices)
    names = [[e.completion for e in sources.read_examples(data, split)] for split in ("train", "eval")]
    return *names, [note for split in ("train", "eval") for note in sources.choose_places(data, split).notes]


# Files of a folder; choices; what is trained on, and held out by its split.
LAYOUTS = {
    "shards": (["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"], {}, [1, 0], None),
    "snapshot": (
        ["README.md", ".cache/x.json", "data/train-0-of-1.parquet", "data/test-0-of-1.parquet", "dataset_infos.json"],
        {}, [2], None,
    ),
    "folders": (["train/a.jsonl", "validation/x.json", "test/b.jsonl"], {}, [0], [1]),
    "dev": (["a.jsonl", "b_dev.jsonl", "LICENSE.txt"], {}, [0], [1]),
    "held out": (["mine/x.jsonl", "mine/held-out/y.jsonl"], {}, [0], [1]),
    "words within words": (["latest.jsonl", "devices.jsonl", "contest.jsonl"], {}, [2, 1, 0], None),
    "train comes first": (["test/eval_train.jsonl", "eval.jsonl"], {}, [0], [1]),
    "test2": (["a.jsonl", "test2.jsonl", "VAL.jsonl"], {}, [0], [2]),
    "another": (["train.jsonl", "test.jsonl", "val.jsonl"], {"split": "test"}, [1], [2]),
    "its synonym": (["train.jsonl", "val.jsonl"], {"split": "validation", "eval_fraction": 0.0}, [1], []),
    "no held-out data": (["train.jsonl", "val.jsonl"], {"eval_fraction": 0.0}, [0], []),
    "names of its own": (
        ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"],
        {"split": "train_sft"}, [0], None,
    ),
    "folder of its own": (["train_sft/a.jsonl", "train_gen/a.jsonl"], {"split": "train_gen"}, [1], None),
    "texts alone": (["a.txt", "b/c.txt", "README.txt"], {}, [0, 1], None),
    "texts beside data": (["a.txt", "b.jsonl"], {}, [1], None),
    "other formats": (["a.jsonl", "b.pdf"], {}, [0], None),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_are_searched_for_their_splits(tmp_path, layout):
    names, choices, trained, held_out = LAYOUTS[layout]
    fill(tmp_path / "testing", *names)  # whose own name is no split of it
    # Where there is no split, a share of the training data is held out, which is one document at least.
    train, evaluated, _ = choose(tmp_path / "testing", **choices)
    if held_out is None:
        assert len(evaluated) == 1
        assert sorted(train + evaluated) == sorted(names[number] for number in trained)
    else:
        assert (train, evaluated) == ([names[n] for n in trained], [names[n] for n in held_out])


def test_what_is_not_trained_on_is_said(tmp_path):
    fill(tmp_path, "a.jsonl", "test/1.jsonl", "test/2.jsonl", "val.jsonl", "b.pdf", "c.txt")
    assert choose(tmp_path)[2] == [
        f"{tmp_path}: 2 files are passed over, such as {tmp_path}/b.pdf",
        f"{tmp_path}: its split test (2 files, such as {tmp_path}/test/1.jsonl) is left out; --data.split test trains "
        "on it",
        f"the split validation of {tmp_path} is held out ({tmp_path}/val.jsonl)",
    ]
    # A file that is named is taken, as is the split that a glob names.
    assert choose(tmp_path / "test/1.jsonl", eval_fraction=0.0) == (["test/1.jsonl"], [], [])
    assert choose(f"{tmp_path}/test/*.jsonl", eval_fraction=0.0) == (["test/1.jsonl", "test/2.jsonl"], [], [])
    assert choose(f"{tmp_path}/*a*.jsonl")[:2] == (["a.jsonl"], ["val.jsonl"])
    assert choose(f"{tmp_path}/**/val*.jsonl", eval_fraction=0.0) == (["val.jsonl"], [], [])
    # A source of held-out data has it in its split for that, or is all of it.
    assert choose(tmp_path / "a.jsonl", eval=str(tmp_path))[:2] == (["a.jsonl"], ["val.jsonl"])
    assert choose(tmp_path / "a.jsonl", eval=f"{tmp_path}/test")[:2] == (["a.jsonl"], ["test/1.jsonl", "test/2.jsonl"])


def test_splits_that_are_not_there_are_errors(tmp_path):
    fill(tmp_path, "all/test.jsonl", "all/val.jsonl", "pdf/a.pdf")
    fill(tmp_path / "other/sft", "train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"no split 'train'; it has test_sft, train_sft: --data.split train_sft"):
        choose(tmp_path / "other/sft")
    with pytest.raises(
        ValueError, match=r"has no split 'train'; it has test, validation: give one of them as --data.split"
    ):
        choose(tmp_path / "all")
    with pytest.raises(ValueError, match=r"pdf/a.pdf is none of the formats that are read"):
        choose(tmp_path / "pdf")
    with pytest.raises(
        ValueError, match=r"data.subset 'main' is of a data set of the Hub, and .* is none; leave it out"
    ):
        choose(tmp_path / "all", subset="main")
    with pytest.raises(ValueError, match=r"data.split is 'train\[:10%\]'; it must be the name of a split"):
        DataConfig(split="train[:10%]")


def test_save_to_disk(tmp_path):
    """A data set of `datasets`: its own files, and not those that were there before nor its caches."""
    fill(
        tmp_path, *(f"all/train_sft/{name}.arrow" for name in ("data-00000-of-00001", "data-00000-of-00002", "cache-1"))
    )
    fill(tmp_path, "all/test_sft/data-00000-of-00001.arrow")
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train_sft", "test_sft"]}')
    state = tmp_path / "all/train_sft/state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train_sft"}))
    expected = ["all/train_sft/data-00000-of-00001.arrow"]
    assert choose(tmp_path / "all", split="train_sft", eval_fraction=0.0)[0] == expected
    assert choose(tmp_path / "all/train_sft", eval_fraction=0.0)[0] == expected
    with pytest.raises(ValueError, match=r"has no split 'train'; it has test_sft, train_sft: --data.split train_sft"):
        choose(tmp_path / "all")
    (tmp_path / expected[0]).unlink()
    with pytest.raises(ValueError, match=r"train_sft lacks data-00000-of-00001.arrow, which its state.json names"):
        choose(tmp_path / "all/train_sft")


def test_urls(tmp_path):
    """Any file system that fsspec knows: a file, a folder with splits, a glob."""
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/places/{name}", content)
        assert read(f"memory://places/{name}") == DOCUMENTS
    for name in ("train/a.jsonl", "train/b.jsonl", "test/c.jsonl", "dataset_infos.json"):
        system.pipe(f"/split/{name}", json.dumps({"text": name}).encode())
    assert choose("memory://split", eval_fraction=0.0)[0] == ["train/a.jsonl", "train/b.jsonl"]
    assert choose("memory://split/*/[bc].jsonl", eval_fraction=0.0)[0] == ["train/b.jsonl"]
    (piece,) = cut("memory://places/a.jsonl", 1)
    assert piece.parts[0].path == "memory:///places/a.jsonl"
    assert len(cut("memory://places/a.parquet", 1)) == 3
    with pytest.raises(ValueError, match=r"no data at 'memory://nothing'"):
        read("memory://nothing")


def test_urls_that_cannot_be_read_are_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs://a/b.jsonl needs a library that is not installed: pip install gcsfs"):
        read("gs://a/b.jsonl")
    with pytest.raises(ValueError, match=r"nosuch://a.jsonl: fsspec knows no nosuch://, but s3://"):
        read("nosuch://a.jsonl")
    fsspec.filesystem("memory").pipe("/lost/a.jsonl", LINES)

    def lose(*_):
        raise RuntimeError("the connection\nwas lost")

    monkeypatch.setattr(MemoryFile, "readinto", lose)
    with pytest.raises(ValueError, match=r"memory:///lost/a.jsonl could not be read: the connection$"):
        read("memory://lost/a.jsonl")


def test_a_change_of_a_place_is_seen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)

    def marks(source):
        return [places.fingerprint(place) for place in places.choose_training(DataConfig(train=str(source)))[0].places]

    before = marks(path)
    assert marks(tmp_path) == before == [(str(path), len(LINES), str(path.stat().st_mtime_ns))]
    os.utime(path, ns=(1, 1))
    assert marks(path) != before


class Refusal(FileNotFoundError):
    """What `datasets` raises."""


@pytest.fixture
def load_dataset(tmp_path, monkeypatch):
    """A stand-in for the library `datasets`, with one data set of two shards and two splits in its cache."""
    hub.find_splits.cache_clear()
    folder = "cache/org___tiny/default/0.0.0/abc"
    names = [f"{folder}/tiny-{name}.arrow" for name in ("train-00000-of-00002", "train-00001-of-00002", "validation")]
    fill(tmp_path, *names)
    library = types.ModuleType("datasets")

    def stand_in(name, subset):
        if isinstance(library.answer, Exception):
            raise library.answer
        files = [{"filename": str(tmp_path / name)} for name in names]
        return {
            "train": types.SimpleNamespace(cache_files=files[:2]),
            "val": types.SimpleNamespace(cache_files=files[2:]),
        }

    library.answer, library.load_dataset = None, stand_in
    monkeypatch.setitem(sys.modules, "datasets", library)
    yield library
    hub.find_splits.cache_clear()


def test_data_sets_of_the_hub(load_dataset):
    train, held_out, notes = choose("org/tiny")
    assert [name.rpartition("/")[2] for name in train] == [f"tiny-train-0000{n}-of-00002.arrow" for n in (0, 1)]
    assert [name.rpartition("/")[2] for name in held_out] == ["tiny-validation.arrow"]
    assert notes == ["the split validation of org/tiny is held out (org/tiny val)"]
    (place, _) = places.choose_training(DataConfig(train="org/tiny"))[0].places
    # The same on every machine, whenever it was downloaded.
    assert places.fingerprint(place) == (
        "org/tiny train tiny-train-00000-of-00002.arrow",
        place.size,
        "default/0.0.0/abc/tiny-train-00000-of-00002.arrow",
    )
    with pytest.raises(ValueError, match=r"org/tiny has no split 'gen'; it has train, validation"):
        choose("org/tiny", split="gen")


def test_folders_with_splits_of_their_own_are_told(tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    choice, _ = places.choose_training(DataConfig(train=str(tmp_path)))
    assert len(choice.places) == 2
    assert choice.notes == (
        f"{tmp_path}: its folders main, socratic have splits of their own and are read together; {tmp_path}/main is "
        "one alone",
    )
    with pytest.raises(ValueError, match=rf"data.subset 'main' .* is none; its folder is a source: {tmp_path}/main"):
        places.choose_training(DataConfig(train=str(tmp_path), subset="main"))
    (tmp_path / "socratic" / "train.jsonl").rename(tmp_path / "socratic" / "more.jsonl")
    assert not places.choose_training(DataConfig(train=str(tmp_path)))[0].notes


@pytest.mark.parametrize(
    ("subset", "error", "sentence"),
    [
        (
            "",
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n"),
            r"org/tiny has subsets, of which one must be chosen: --data.subset with one of main, socratic",
        ),
        (
            "man",
            ValueError("BuilderConfig 'man' not found. Available: ['main', 'socratic']"),
            r"org/tiny has no subset 'man': --data.subset with one of main, socratic",
        ),
        (
            "",
            Refusal("Dataset 'org/tiny' is a gated dataset on the Hub. You must be authenticated to access it."),
            r"org/tiny is gated: accept its terms at http.*/datasets/org/tiny, and run `hf auth login`",
        ),
        (
            "",
            RuntimeError("Dataset scripts are no longer supported, but found tiny.py"),
            r"is read by a script of its own, .* 'hf://datasets/org/tiny@refs/convert/parquet/\*\*/train/\*.parquet'",
        ),
        ("", Refusal("No (supported) data files found in org/tiny"), r"has no files that the library datasets reads"),
        ("", Refusal("Dataset 'org/tiny' doesn't exist on the Hub"), r"has no data set of that name for this account"),
        ("", ConnectionError("Couldn't reach 'org/tiny'"), r"HF_HUB_OFFLINE is set; unset it to download"),
        ("", RuntimeError("disk full"), r"the data set org/tiny could not be downloaded: disk full"),
    ],
)
def test_the_hub_refuses(load_dataset, subset, error, sentence):
    load_dataset.answer = error
    with pytest.raises(ValueError, match=sentence):
        choose("org/tiny", subset=subset)


def test_the_documentation_has_a_record_of_each_shape():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    rows = re.findall(r"^\| ([\w ]+) \| `(\{.*\})` \|$", page, re.MULTILINE)
    shapes = [make_example(json.loads(record), "", DataConfig()).shape for _, record in rows]
    assert shapes == [name for name, _ in rows] == [*dict.fromkeys(s.name for s in SHAPES if s.name != "preference")]


def test_without_datasets_the_extra_is_named(monkeypatch):
    hub.find_splits.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no file or folder 'org/tiny'; .*: pip install 'gemma2-jax\[datasets\]'"):
        choose("org/tiny")


def test_dates_that_python_does_not_have_do_no_harm(tmp_path):
    """A column beside the texts; its values are absent."""
    days = pyarrow.array([4_000_000, 1], pyarrow.int32()).cast(pyarrow.date32())  # of the year 12921, and of 1970
    parquet.write_table(pyarrow.table({"text": ["if", "or"], "day": days}), tmp_path / "a.parquet")
    data = DataConfig(kind="text", train=str(tmp_path / "a.parquet"), eval="python-docs")
    assert [example.completion for example in sources.read_examples(data, "train")] == ["if", "or"]
