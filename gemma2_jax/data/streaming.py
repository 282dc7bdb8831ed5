"""A source that is trained on while it is read: nothing of it is tokenized, or even counted, before the first step.

Documents stay in the order of the source, and when it ends it begins again. Rows are packed from what has been read so
far. Every process reads all documents and makes all rows of them, so that any number of processes see the same rows,
and keeps the arrays of its own share. A thread reads a few batches ahead of training and then waits; the tokenizer
itself uses all CPUs. Memory does not grow with the source.

A position is the number of rows taken. To go back to it, the source is read again from its start; a digest of the rows
on the way tells whether they are the ones that were trained on.
"""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gemma2_jax.config import DataConfig
from gemma2_jax.data import mixtures, sources
from gemma2_jax.data.encoding import encode_examples
from gemma2_jax.data.megatron.indexed import find_prefix
from gemma2_jax.data.packing import Segment, write_row
from gemma2_jax.data.reading import places
from gemma2_jax.data.report import Report
from gemma2_jax.data.store import Store, explain_emptiness
from gemma2_jax.data.tokenizing import batch_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN_ROWS = 64  # rows that documents are put into at one time, where they are kept whole
BATCHES_AHEAD = 4  # of the one that is trained on
HELD_OUT_DOCUMENTS = 100_000  # at the start of the source, among which those to evaluate on are looked for
_SECONDS_SILENT = 60  # of reading again, where no bar shows how far it is

Document = tuple[np.ndarray, np.ndarray]  # tokens, int32, and whether each is learned, bool
Row = list[Segment]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The documents of `data.train`, and how they become rows."""

    data: DataConfig
    tokenizer: "PreTrainedTokenizerFast"
    length: int  # tokens in a row, T

    @property
    def summary(self) -> str:
        """In a line, what a stream is and is not."""
        return (
            "a stream: documents in their own order, not shuffled, tokenized as they are read; not counted "
            "beforehand, so there are no totals; a run that resumes reads them again from the start"
        )

    @property
    def held_out_origin(self) -> str:
        """How the documents of `read_held_out` were found, to be put before what they are."""
        share = f"a share of {self.data.eval_fraction:.3g} by hash, which is not trained on"
        return f"{share}, of which those at the start of the stream are read: "

    @property
    def cuts_documents(self) -> bool:
        """Whether documents are put end to end, and cut where a row ends; else they are kept whole."""
        return self.data.packing and self.data.kind == "text"

    @cached_property
    def _whole(self) -> places.Piece:
        return sources.open_whole(self.data, "train")

    @cached_property
    def digest_bound(self) -> float | None:
        """That of `sources.find_digest_bound`, found in the start of the source alone."""
        return sources.find_digest_bound(self.data, HELD_OUT_DOCUMENTS)

    @cached_property
    def first_document(self) -> Store:
        """The first document that is trained on. Raises ValueError if there is none."""
        report = Report()
        for number, (tokens, learned) in enumerate(self.read_epoch(report), start=1):
            if not self.cuts_documents and not _keeps_learned((tokens, learned), self.length, number, report):
                continue
            return Store(tokens=tokens, learned=learned, offsets=np.array([0, len(tokens)]))
        raise ValueError(explain_emptiness(self.data, "train", report))

    def read_epoch(self, report: Report) -> Iterator[Document]:
        """Every document once, lazily. Raises ValueError for a bad one that is not to be skipped."""
        examples = sources.read_piece(self.data, "train", self._whole, self.digest_bound, report)
        yield from self._encode(examples, report)

    def read_held_out(self, tokens: int) -> Store:
        """The first documents of the share that is held out, in memory: as many as so many tokens of rows take.

        Raises ValueError if there are none.
        """
        assert self.digest_bound is not None  # None is a source of its own, which is no stream
        bound, report = self.digest_bound, Report()
        examples = sources.read_piece(self.data, "train", self._whole, None, report)
        first = itertools.islice(examples, HELD_OUT_DOCUMENTS)
        documents: list[Document] = []
        for document in self._encode((example for example in first if example.digest < bound), report):
            documents.append(document)
            tokens -= len(document[0]) if self.cuts_documents else min(len(document[0]), self.length)
            if tokens <= 0:
                break
        if not documents:
            raise ValueError(
                f"of the first {HELD_OUT_DOCUMENTS:,} documents of {self.data.train}, none that is held out can be "
                "evaluated on; give other data as --data.eval, or hold out more as --data.eval_fraction"
            )
        parts, learned = zip(*documents, strict=True)
        offsets = np.cumsum([0, *map(len, parts)])
        return Store(tokens=np.concatenate(parts), learned=np.concatenate(learned), offsets=offsets)

    def _encode(self, examples: Iterable, report: Report) -> Iterator[Document]:
        for batch in batch_examples(examples):
            for tokens, learned in encode_examples(batch, self.tokenizer, self.data, report):
                yield np.array(tokens, np.int32), np.array(learned, np.bool_)


def open_stream(data: DataConfig, tokenizer: "PreTrainedTokenizerFast", length: int) -> Stream:
    """The stream of `data.train` for rows of `length` tokens.

    Raises ValueError for a source that cannot be read as one, and where its first documents are bad or missing.
    """
    names = [source.name for source in mixtures.list_sources(data, "train")]
    if len(names) > 1:
        raise ValueError(
            f"data.stream reads one source, and data.train names {len(names)} ({', '.join(names)}); give one, such as "
            "a folder or a glob, or leave out data.stream to mix them"
        )
    if find_prefix(data.train):
        raise ValueError(
            f"data.train {data.train} is .bin and .idx files, which hold tokens already and are read as they are; "
            "leave out data.stream"
        )
    if places.is_hub_data_set(data.train):
        raise ValueError(
            f"data.train {data.train} is a data set of the Hub, which would be downloaded as a whole first; to read "
            f"its files as a stream, name them by URL, such as hf://datasets/{data.train}/**/*.parquet"
        )
    stream = Stream(data=data, tokenizer=tokenizer, length=length)
    _ = stream.first_document  # read now, so that a mistake in it is named before a step is compiled
    return stream


class StreamBatches:
    """An endless iterator of one share of each batch, as arrays [B, T] of `packing.write_row`."""

    def __init__(self, stream: Stream, *, batch_size: int, share: slice, show: bool) -> None:
        """`share` is of the rows of a batch. `show` prints what becomes of the documents, as it is found."""
        self._stream, self._batch_size, self._share = stream, batch_size, share
        self._console = Console(stderr=True, quiet=not show)
        # One thread, so that batches are made one after another. Python waits for it before it ends.
        self._thread = ThreadPoolExecutor(1, "stream")
        self._read_ahead(_Reading(stream))

    def _read_ahead(self, reading: "_Reading") -> None:
        self._reading, self._position = reading, reading.position
        self._ahead = deque(self._thread.submit(self._make_batch, reading) for _ in range(BATCHES_AHEAD))

    def _make_batch(self, reading: "_Reading") -> "_Batch":
        rows = [write_row(row, self._stream.length) for row in reading.take_rows(self._batch_size)[self._share]]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return _Batch(arrays=arrays, position=reading.position, notes=reading.take_notes())

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._ahead.append(self._thread.submit(self._make_batch, self._reading))
        self._position = batch.position
        self._print(*batch.notes)
        return batch.arrays

    def get_state(self) -> dict:
        """The position after the last batch taken, for JSON; the same in every process."""
        return self._position

    def set_state(self, state: dict) -> None:
        """Reads the source again, up to where `get_state` was called. ValueError if its rows are others by now."""
        for future in self._ahead:
            future.cancel()
        reading, rows, source = _Reading(self._stream), state["rows"], self._stream.data.train
        self._print(f"reading {source} again, up to row {rows:,}, the last that the run has taken")
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("rows, left"), TimeRemainingColumn()
        has_bar, said = self._console.is_terminal, time.monotonic()
        with Progress(*columns, console=self._console, transient=True, disable=not has_bar) as progress:
            for row in progress.track(range(0, rows, self._batch_size), description=""):
                reading.take_rows(self._batch_size)
                if not has_bar and time.monotonic() > said + _SECONDS_SILENT:
                    said = time.monotonic()
                    self._print(f"{row:,} of {rows:,} rows are read again")
        tally = reading.tally
        self._print(f"read again: {tally.documents:,} documents, the last of them in epoch {tally.epoch}")
        if reading.position != state:
            raise ValueError(
                f"its first {rows:,} rows are of documents of {source} that are others by now, or that a tokenizer "
                "made other tokens of"
            )
        reading.take_notes()  # which the run was told before
        self._read_ahead(reading)

    def _print(self, *sentences: str) -> None:
        for sentence in sentences:
            self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    arrays: dict[str, np.ndarray]
    position: dict  # after it
    notes: list[str]  # what there is to be said of its documents


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What became of the documents that were read."""

    epoch: int = 1
    documents: int = 0  # that went into rows, of all epochs
    notes: list[str] = field(default_factory=list)  # sentences that nobody has been told yet
    findings: int = 0  # documents left out or cut, when that was last noted

    def note_findings(self, report: Report) -> None:
        """Notes what was left out or cut when it is ten times as much as when it was last noted."""
        count = sum(finding.count for found in (report.dropped, report.changed) for finding in found.values())
        if count >= max(1, 10 * self.findings):
            self.notes.extend(report.describe())
            self.findings = count


class _Reading:
    """One reading of a stream, from its start to wherever it is by now."""

    def __init__(self, stream: Stream) -> None:
        self.tally = _Tally()
        self._row_count, self._digest = 0, hashlib.blake2b(digest_size=16)
        # No reference leads from here back to itself, so that the file is closed as soon as nothing needs it.
        documents, length = _repeat_documents(stream, self.tally), stream.length
        most = OPEN_ROWS if stream.data.packing else 0
        self._rows = cut_rows(documents, length) if stream.cuts_documents else fill_rows(documents, length, most)

    @property
    def position(self) -> dict:
        """How many rows were taken, and a digest of their tokens."""
        return {"rows": self._row_count, "digest": self._digest.hexdigest()}

    def take_rows(self, count: int) -> list[Row]:
        """The next rows."""
        rows = list(itertools.islice(self._rows, count))
        for row in rows:
            for segment in row:
                self._digest.update(segment.tokens.data)
                self._digest.update(segment.learned.data)
        self._row_count += len(rows)
        return rows

    def take_notes(self) -> list[str]:
        """What there is to be said since this was last asked."""
        notes, self.tally.notes = self.tally.notes, []
        return notes


def _repeat_documents(stream: Stream, tally: _Tally) -> Iterator[Document]:
    """The documents of one epoch after the other. Raises ValueError if one has none that can be trained on."""
    source = stream.data.train
    while True:
        report, before = Report(), tally.documents
        for number, document in enumerate(stream.read_epoch(report), start=1):
            if stream.cuts_documents or _keeps_learned(document, stream.length, number, report):
                tally.documents += 1
                yield document
            tally.note_findings(report)
        if tally.documents == before:
            raise ValueError(explain_emptiness(stream.data, "train", report))
        if _is_round(tally.epoch):
            count = f"{tally.documents - before:,} documents are an epoch"
            tally.notes.append(f"{source} has ended: {count}; epoch {tally.epoch + 1} begins")
            tally.notes.extend(report.describe())
        tally.epoch += 1


def _is_round(number: int) -> bool:
    """Whether a number is 1, 10, 100 and so on, as nobody wants a line for each epoch of a few documents."""
    return str(number).rstrip("0") == "1"


def _keeps_learned(document: Document, length: int, number: int, report: Report) -> bool:
    """Whether a document has something to learn in the first `length` tokens; the report counts one that is longer."""
    tokens, learned = document
    if len(tokens) <= length:
        return True
    if learned[1 : length + 1].any():
        report.change(f"cut to {length:,} tokens", f"document {number:,}")
        return True
    reason = f"nothing to learn in its first {length:,} tokens"
    report.drop(reason, f"document {number:,}; a larger train.sequence_length would take it")
    return False


def cut_rows(documents: Iterable[Document], length: int) -> Iterator[Row]:
    """Documents end to end, cut every `length` tokens. The last target of a row is the first token of the next."""
    row, space = [], length
    for tokens, learned in documents:
        start = 0
        while start < len(tokens):
            taken = min(space, len(tokens) - start)
            part = slice(start, start + taken + 1)
            row.append(Segment(tokens=tokens[part], learned=learned[part], length=taken))
            start, space = start + taken, space - taken
            if not space:
                yield row
                row, space = [], length


@dataclass(kw_only=True, eq=False, slots=True)
class _OpenRow:
    space: int  # tokens that it still takes
    row: Row


def fill_rows(documents: Iterable[Document], length: int, most: int) -> Iterator[Row]:
    """Whole documents, or their first `length` tokens, in rows of which at most `most` are open; 0: one in each.

    A document goes to the open row that it fills best. Where there is none, a row is opened, and the oldest of too many
    is closed: closing the fullest would leave 1% less room, but documents in the others might wait without end.
    """
    rows: list[_OpenRow] = []
    for tokens, learned in documents:
        segment = Segment(tokens=tokens[: length + 1], learned=learned[: length + 1], length=min(len(tokens), length))
        fitting = [row for row in rows if row.space >= segment.length]
        chosen = min(fitting, key=attrgetter("space"), default=None)
        if chosen is None:
            chosen = _OpenRow(space=length, row=[])
            rows.append(chosen)
        chosen.row.append(segment)
        chosen.space -= segment.length
        if not chosen.space or len(rows) > most:
            closed = rows[0] if chosen.space else chosen
            rows.remove(closed)
            yield closed.row
