"""Where documents come from: the built-in python_docs, or JSONL and Parquet files, read one by one.

However a document is stored, it is read as an `Example`; a malformed one is an error that names its file and line. This
module also decides which documents of a source are held out, by a hash of each, so that their order does not matter.
Tokens are made in `encoding`.
"""

import glob
import hashlib
import json
import math
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
    """One document: a prompt and its completion, of which the completion is learned; or a conversation's messages."""

    where: str  # file:line, for errors
    prompt: str = ""  # empty for plain text
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()  # each with "role" and "content"; if any, they are the document
    name: str = ""  # of the document, where its source has names

    @property
    def digest(self) -> int:
        """A hash of the document's name, or of its text if it has no name: evenly distributed below 2**64."""
        key = self.name or json.dumps([self.prompt, self.completion, self.messages])
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def open_source(data: DataConfig, split: Split) -> str:
    """The source that the split is read from."""
    return data.eval if split == "eval" and data.eval else data.train


def read_examples(data: DataConfig, split: Split) -> Iterator[Example]:
    """The documents of one split, read lazily and in a fixed order.

    If a share of the training data is held out, it is the documents with the lowest digests, at least one. Raises
    ValueError if the source has no files, or for a document that lacks what `data` asks for, naming its file and line
    (JSONL) or row (Parquet), counted from 1.
    """
    examples = _read_source(data, open_source(data, split))
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
    for example in _read_source(data, data.train):
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


def _read_source(data: DataConfig, source: str) -> Iterator[Example]:
    """All documents of a source."""
    return _read_python_docs(data) if source == PYTHON_DOCS else _read_files(data, source)


def _read_python_docs(data: DataConfig) -> Iterator[Example]:
    if data.kind == "text":
        for name, text in python_docs.python_documents().items():
            yield Example(where=f"{PYTHON_DOCS}: {name}", name=name, completion=text)
    else:
        for name, record in python_docs.python_instructions().items():
            yield Example(where=f"{PYTHON_DOCS}: {name}", name=name, messages=tuple(record["messages"]))


def _read_files(data: DataConfig, pattern: str) -> Iterator[Example]:
    for path in find_files(pattern):
        where = ""
        for where, record in _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path):
            yield _make_example(data, where, record)
        if not where:
            raise ValueError(f"{path} is empty; remove it, or write one document per line or row")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
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


def _make_example(data: DataConfig, where: str, record: dict) -> Example:
    if data.kind == "text":
        if data.text_key not in record and (record.keys() & {"messages", data.prompt_key}):
            raise ValueError(
                f"{where}: has no {data.text_key!r} (data.text_key); it has {_list_columns(record)}; to train on "
                "prompts and their answers, give --data.kind instructions"
            )
        return Example(where=where, completion=_read_nonempty_text(record, data.text_key, "text_key", where))
    if data.prompt_template:
        return Example(
            where=where,
            prompt=_fill_template(data.prompt_template, record, where),
            completion=_read_nonempty_text(record, data.completion_key, "completion_key", where),
        )
    if record.get("messages") is not None:
        return Example(where=where, messages=_check_messages(record["messages"], where))
    if data.prompt_key not in record:
        has_text = isinstance(record.get(data.text_key), str)
        raise ValueError(
            f"{where}: has neither 'messages' nor {data.prompt_key!r} (data.prompt_key); it has {_list_columns(record)}"
            + (f"; to train on its {data.text_key!r} as plain text, give --data.kind text" if has_text else "")
        )
    return Example(
        where=where,
        prompt=_read_text(record, data.prompt_key, "prompt_key", where),
        completion=_read_nonempty_text(record, data.completion_key, "completion_key", where),
    )


def _read_text(record: dict, key: str, setting: str, where: str) -> str:
    if key not in record:
        raise ValueError(f"{where}: has no {key!r} (data.{setting}); it has {_list_columns(record)}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} is of type {type(record[key]).__name__}; it must be a string")
    return record[key]


def _read_nonempty_text(record: dict, key: str, setting: str, where: str) -> str:
    text = _read_text(record, key, setting, where)
    if not text.strip():
        raise ValueError(f"{where}: {key!r} is empty, which leaves nothing to learn; remove the document")
    return text


def _fill_template(template: str, record: dict, where: str) -> str:
    try:
        keys = [key for _, key, _, _ in string.Formatter().parse(template) if key is not None]
    except ValueError as error:
        raise ValueError(f"data.prompt_template {template!r}: {error}; write a brace itself twice") from error
    return template.format_map({key: _read_text(record, key, "prompt_template", where) for key in keys})


def _check_messages(messages: object, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list):
        raise ValueError(f"{where}: 'messages' is of type {type(messages).__name__}; it must be a list")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: message {number} must have a 'role' and a 'content', both strings")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{where}: message {number} is an empty answer; remove the document")
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(repr(role) for role in dict.fromkeys(message["role"] for message in messages))
        remedy = f"its roles are {roles}; name the one to learn from 'assistant'" if roles else "it has no messages"
        raise ValueError(f"{where}: no message has the role 'assistant', which leaves nothing to learn: {remedy}")
    return tuple(messages)


def _list_columns(record: dict) -> str:
    return ", ".join(map(repr, record)) or "no columns"
