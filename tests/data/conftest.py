"""What the tests of the data package share: the tiny model's tokenizer, and files of documents."""

import json
from pathlib import Path

import pytest

from gemma2_jax.data.batches import load_tokenizer

TINY = Path(__file__).parents[2] / "assets" / "tiny-gemma2"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes records to a JSONL file, strings as they are, and returns its path."""

    def write(*records, name="data.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write
