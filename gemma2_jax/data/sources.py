"""Where documents come from: the built-in python_docs, or JSONL and Parquet files, read one by one.

A document comes out as an `Example`, whatever it was stored as; a malformed one is an error that names its file and
line. What is held out of a source is decided here, by a hash of the document, so that it does not depend on order.
Tokens come later, in `encoding`.
"""

import glob
import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma2_jax.config import DataConfig
from gemma2_jax.data import python_docs

Split = Literal["train", "eval"]
PYTHON_DOCS = "python-docs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One document: `prompt` and then `completion`, which is learnt; or the messages of a conversation."""

    where: str  # file:line, for errors
    prompt: str = ""  # empty for plain text
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()  # each with "role" and "content"; if any, they are the document

    def held_out(self, share: float, name: str = "") -> bool:
        """Whether this document is among the `share` held out, decided by its name or else by what it says."""
        key = name or json.dumps([self.prompt, self.completion, self.messages])
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest) < share * 2**64


def open_source(data: DataConfig, split: Split) -> str:
    """The source that the split is read from."""
    return data.eval if split == "eval" and data.eval else data.train


def read_examples(data: DataConfig, split: Split) -> Iterator[Example]:
    """The documents of one split, read lazily and in a fixed order.

    Raises ValueError naming file and line (JSONL) or file and row (Parquet), both counted from 1, for a document
    that is not as `data` says; and for a source with no files.
    """
    named = (
        _python_docs(data)
        if open_source(data, split) == PYTHON_DOCS
        else _stored_examples(data, open_source(data, split))
    )
    for name, example in named:
        if data.eval or example.held_out(data.eval_fraction, name) == (split == "eval"):
            yield example


def find_files(pattern: str) -> list[Path]:
    """The JSONL and Parquet files of a file name, directory or glob, sorted; ValueError when there are none."""
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


def _python_docs(data: DataConfig) -> Iterator[tuple[str, Example]]:
    if data.kind == "text":
        for name, text in python_docs.python_documents().items():
            yield name, Example(where=f"{PYTHON_DOCS}: {name}", completion=text)
    else:
        for name, record in python_docs.python_instructions().items():
            yield name, Example(where=f"{PYTHON_DOCS}: {name}", messages=tuple(record["messages"]))


def _stored_examples(data: DataConfig, pattern: str) -> Iterator[tuple[str, Example]]:
    for path in find_files(pattern):
        where = ""
        for where, record in _jsonl(path) if path.suffix == ".jsonl" else _parquet(path):
            yield "", _example(data, where, record)
        if not where:
            raise ValueError(f"{path} is empty; remove it, or write one document per line or row")


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                raise ValueError(f"{where}: the line is blank; remove it")
            try:
                record = json.loads(line)
            except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
                raise ValueError(f"{where}: not JSON ({error}); each line holds one JSON object") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: holds a {type(record).__name__}; each line holds one JSON object")
            yield where, record


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
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


def _example(data: DataConfig, where: str, record: dict) -> Example:
    if data.kind == "text":
        return Example(where=where, completion=_fill_template(record, data.text_key, "text_key", where))
    if data.prompt_template:
        return Example(
            where=where,
            prompt=_template_example(data.prompt_template, record, where),
            completion=_fill_template(record, data.completion_key, "completion_key", where),
        )
    if record.get("messages") is not None:
        return Example(where=where, messages=_messages(record["messages"], where))
    if data.prompt_key not in record:
        raise ValueError(
            f"{where}: has neither 'messages' nor {data.prompt_key!r} (data.prompt_key); it has {_columns(record)}"
        )
    return Example(
        where=where,
        prompt=_text(record, data.prompt_key, "prompt_key", where),
        completion=_fill_template(record, data.completion_key, "completion_key", where),
    )


def _text(record: dict, key: str, setting: str, where: str) -> str:
    if key not in record:
        raise ValueError(f"{where}: has no {key!r} (data.{setting}); it has {_columns(record)}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} is of type {type(record[key]).__name__}; it must be a string")
    return record[key]


def _fill_template(record: dict, key: str, setting: str, where: str) -> str:
    text = _text(record, key, setting, where)
    if not text.strip():
        raise ValueError(f"{where}: {key!r} is empty, which leaves nothing to learn; remove the document")
    return text


def _template_example(template: str, record: dict, where: str) -> str:
    try:
        keys = [key for _, key, _, _ in string.Formatter().parse(template) if key is not None]
    except ValueError as error:
        raise ValueError(f"data.prompt_template {template!r}: {error}; write a brace itself twice") from error
    return template.format_map({key: _text(record, key, "prompt_template", where) for key in keys})


def _messages(messages: object, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list):
        raise ValueError(f"{where}: 'messages' is of type {type(messages).__name__}; it must be a list")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: message {number} must have a 'role' and a 'content', both strings")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{where}: message {number} is an empty answer; remove the document")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no message has the role 'assistant', which leaves nothing to learn")
    return tuple(messages)


def _columns(record: dict) -> str:
    return ", ".join(map(repr, record)) or "no columns"
