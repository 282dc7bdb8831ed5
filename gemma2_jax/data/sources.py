"""What is trained on and what is held out: documents of the built-in python_docs, or of the `places` that a source has.

What is read is a record, of which `records` makes a document; one of which it makes none is an error that names its
file and line, or is left out and counted. Held out is a source of its own, or the validation split of the training
data, or else a share of its documents, by a hash of each, so that their order does not matter. Tokens are made in
`encoding`.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gemma2_jax.config import DataConfig
from gemma2_jax.data import python_docs
from gemma2_jax.data.reading import places
from gemma2_jax.data.reading.places import Piece
from gemma2_jax.data.records import BadRecord, Example, make_example
from gemma2_jax.data.report import Report

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
PYTHON_DOCS = "python-docs"
PIECE_BYTES = 8 << 20  # of a source, that is read at one time


def open_source(data: DataConfig, split: Split) -> str:
    """The source that the split is read from."""
    return data.eval if split == "eval" and data.eval else data.train


def choose_places(data: DataConfig, split: Split) -> places.Choice:
    """The places that a split is read from, with sentences on what else its source has; none of PYTHON_DOCS."""
    if open_source(data, split) == PYTHON_DOCS:
        return places.Choice(places=(), notes=())
    if split == "eval" and data.eval:
        return places.choose_held_out(data)
    training, held_out = places.choose_training(data)
    return held_out if split == "eval" and held_out.places else training


def list_pieces(data: DataConfig, split: Split, piece_bytes: int) -> list[Piece]:
    """The documents that a split is read from, in pieces of about so many bytes, in a fixed order.

    Raises ValueError if there are none.
    """
    return places.list_pieces(choose_places(data, split).places, piece_bytes) or [Piece(parts=())]


def open_whole(data: DataConfig, split: Split) -> Piece:
    """All documents that a split is read from as one piece, which is found without reading any."""
    (piece,) = list_pieces(data, split, sys.maxsize)
    return piece


def fingerprint(data: DataConfig, split: Split) -> list:
    """What is another when the documents that a split is read from are others; for JSON."""
    if open_source(data, split) == PYTHON_DOCS:
        return [sys.version, Path(python_docs.__file__).read_text(encoding="utf-8")]
    return [places.fingerprint(place) for place in choose_places(data, split).places]


def read_examples(data: DataConfig, split: Split, report: Report | None = None) -> Iterator[Example]:
    """The documents of one split, read lazily and in a fixed order.

    If a share of the training data is held out, it is the documents with the lowest digests, at least one. Raises
    ValueError if the source has no files. A record that makes no document is an error that names its file and line or
    row, counted from 1, or is counted in `report`, as `data.on_bad` says.
    """
    yield from read_piece(data, split, open_whole(data, split), find_digest_bound(data), report or Report())


def read_piece(data: DataConfig, split: Split, piece: Piece, bound: float | None, report: Report) -> Iterator[Example]:
    """The documents of a split in one piece of its source. `bound` is that of `find_digest_bound`."""
    for example in _read_documents(data, piece, report):
        if bound is None or (example.digest < bound) == (split == "eval"):
            yield example


def is_share_held_out(data: DataConfig) -> bool:
    """Whether what is held out is a share of the training data's documents, or none of them; else it is other data."""
    return not data.eval and choose_places(data, "eval") == choose_places(data, "train")


def find_digest_bound(data: DataConfig, documents: int | None = None) -> float | None:
    """The digest below which documents of the training data are held out; None where other data is.

    Finding it reads a few documents. With it, at least one is held out of the first so many; None: of all.
    """
    if not is_share_held_out(data):
        return None
    if not data.eval_fraction:
        return 0
    bound, lowest = data.eval_fraction * 2**64, math.inf
    for example in itertools.islice(_read_documents(data, open_whole(data, "train"), Report()), documents):
        if example.digest < bound:
            return bound
        lowest = min(lowest, example.digest)
    return lowest + 1


def reject(error: BadRecord, data: DataConfig, report: Report) -> None:
    """Counts a record that makes no document. Raises ValueError instead where `data.on_bad` is to stop."""
    if data.on_bad == "stop":
        raise ValueError(f"{error}; --data.on_bad skip leaves such documents out, and counts them") from error
    report.drop(error.reason, str(error))


def _read_documents(data: DataConfig, piece: Piece, report: Report) -> Iterator[Example]:
    """All documents of a piece; one without parts is PYTHON_DOCS."""
    for where, record, name in places.read_piece(piece) if piece.parts else _read_python_docs(data):
        try:
            if isinstance(record, BadRecord):
                raise record
            example = make_example(record, where, data, name)
        except BadRecord as error:
            reject(error, data, report)
        else:
            yield example


def _read_python_docs(data: DataConfig) -> Iterator[places.Record]:
    if data.kind == "text":
        for name, text in python_docs.python_documents().items():
            yield f"{PYTHON_DOCS}: {name}", {"text": text}, name
    else:
        for name, record in python_docs.python_instructions().items():
            yield f"{PYTHON_DOCS}: {name}", record, name
