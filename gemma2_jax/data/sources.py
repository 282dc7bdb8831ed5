"""Where documents come from: the built-in python_docs, or JSONL and Parquet files, read one by one.

What is read is a record, of which `records` makes a document; one of which it makes none is an error that names its
file and line, or is left out and counted. This module also decides which documents of a source are held out, by a hash
of each, so that their order does not matter. Tokens are made in `encoding`.
"""

import glob
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gemma2_jax.config import DataConfig
from gemma2_jax.data import python_docs
from gemma2_jax.data.records import BadRecord, Example, make_example
from gemma2_jax.data.report import Report

Split = Literal["train", "eval"]
PYTHON_DOCS = "python-docs"


def open_source(data: DataConfig, split: Split) -> str:
    """The source that the split is read from."""
    return data.eval if split == "eval" and data.eval else data.train


def read_examples(data: DataConfig, split: Split, report: Report | None = None) -> Iterator[Example]:
    """The documents of one split, read lazily and in a fixed order.

    If a share of the training data is held out, it is the documents with the lowest digests, at least one. Raises
    ValueError if the source has no files. A record that makes no document is an error that names its file and line
    (JSONL) or row (Parquet), counted from 1, or is counted in `report`, as `data.on_bad` says.
    """
    examples = _read_source(data, open_source(data, split), report or Report())
    if data.eval:
        yield from examples
        return
    bound = _digest_bound(data)
    for example in examples:
        if (example.digest < bound) == (split == "eval"):
            yield example


def _digest_bound(data: DataConfig) -> float:
    """The digest below which documents of the training data are held out. Finding it reads a few documents."""
    if not data.eval_fraction:
        return 0
    bound, lowest = data.eval_fraction * 2**64, math.inf
    for example in _read_source(data, data.train, Report()):
        if example.digest < bound:
            return bound
        lowest = min(lowest, example.digest)
    return lowest + 1


def find_files(pattern: str) -> list[Path]:
    """The JSONL and Parquet files that a file name, directory or glob stands for, sorted; ValueError if none."""
    if Path(pattern).is_dir():
        paths = [path for ending in ("jsonl", "parquet") for path in glob.glob(f"{glob.escape(pattern)}/*.{ending}")]
    else:
        paths = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    if not paths:
        raise ValueError(
            f"no data at {pattern!r}: give {PYTHON_DOCS!r}, a .jsonl or .parquet file, a directory of such, or a glob"
        )
    for path in paths:
        if Path(path).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{path} is neither .jsonl nor .parquet; convert or rename it")
    return [Path(path) for path in sorted(paths)]


def reject(error: BadRecord, data: DataConfig, report: Report) -> None:
    """Counts a record that makes no document. Raises ValueError instead where `data.on_bad` is to stop."""
    if data.on_bad == "stop":
        raise ValueError(f"{error}; --data.on_bad skip leaves such documents out, and counts them") from error
    report.drop(error.reason, str(error))


def _read_source(data: DataConfig, source: str, report: Report) -> Iterator[Example]:
    """All documents of a source."""
    for where, record, name in _read_python_docs(data) if source == PYTHON_DOCS else _read_files(source):
        try:
            if isinstance(record, BadRecord):
                raise record
            example = make_example(record, where, data, name)
        except BadRecord as error:
            reject(error, data, report)
        else:
            yield example


Records = Iterator[tuple[str, object, str]]  # where a record is, the record or what is wrong with it, and its name


def _read_python_docs(data: DataConfig) -> Records:
    if data.kind == "text":
        for name, text in python_docs.python_documents().items():
            yield f"{PYTHON_DOCS}: {name}", {"text": text}, name
    else:
        for name, record in python_docs.python_instructions().items():
            yield f"{PYTHON_DOCS}: {name}", record, name


def _read_files(pattern: str) -> Records:
    for path in find_files(pattern):
        where = ""
        for where, record in _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path):
            yield where, record, ""
        if not where:
            raise ValueError(f"{path} is empty; remove it, or write one document per line or row")


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    blank = 0  # the first of the blank lines above, which are nothing at the end of a file
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                yield f"{path}:{blank}", BadRecord(f"{path}:{blank}", "blank line", "the line is blank; remove it")
                blank = 0
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:  # malformed JSON, or bytes that are not UTF-8
                yield where, BadRecord(where, "not JSON", f"not JSON ({error}); each line holds one JSON object")


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install 'gemma2-jax[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error})") from error
    with file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record
