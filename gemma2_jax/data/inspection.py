"""What a data set is, in facts and samples: of any source, of .bin and .idx files, and of tokenized data.

Everything here is gathered for people to read; nothing trains on it. `__main__` prints it.
"""

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from rich.filesize import decimal

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources
from gemma2_jax.data.encoding import encode_examples
from gemma2_jax.data.megatron.indexed import Indexed
from gemma2_jax.data.records import Example
from gemma2_jax.data.report import Report
from gemma2_jax.data.store import Store
from gemma2_jax.data.tokenizing import batch_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BORDERS = 100_000  # documents whose first and last tokens are looked at
_BLOCK = 1 << 24  # tokens that are counted at one time
ROW_LENGTHS = (2048, 4096, 8192)  # values of train.sequence_length that documents are compared with
_SHOWN_PLACES = 3
_SHOWN_TOKENS = 64  # at the beginning of a document of a batch
_SHOWN_RUNS, _SHOWN_CHARACTERS = 6, 100  # of an example in a line
_SHOWN_END = 60  # tokens at each end of a long run, or so many times 4 characters

Piece = tuple[str, bool]  # a part of a document's text, and whether it is learned
Fact = tuple[str, str]  # what a line is about, and the line


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is to be printed."""

    facts: list[Fact]
    samples: list[list[Piece]]
    documents: int  # that can be trained on, of those read


@dataclass(kw_only=True)
class _Tally:
    """Lengths of documents, and some of the documents, chosen at random but alike each time."""

    kept: int
    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    documents: list[list] = field(default_factory=list)  # pieces: tokens or a text, and whether they are learned
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, pieces: list) -> None:
        self.lengths.append(sum(len(content) for content, _ in pieces))
        self.learned += sum(len(content) for content, is_learned in pieces if is_learned)
        place = len(self.documents) if len(self.documents) < self.kept else self._random.randrange(len(self.lengths))
        if place < self.kept:
            self.documents[place : place + 1] = [pieces]


class _Enough(Exception):
    """As many documents were read as were asked for."""


@dataclass
class _BoundedReport(Report):
    """A report of so many documents at most."""

    most: int = 0  # 0: all

    @property
    def is_full(self) -> bool:
        """Whether so many documents were left out."""
        return 0 < self.most <= sum(finding.count for finding in self.dropped.values())

    def drop(self, reason: str, sentence: str) -> None:
        super().drop(reason, sentence)
        if self.is_full:
            raise _Enough


def inspect_source(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast | None",
    *,
    documents: int,
    samples: int,
    row_lengths: Sequence[int] = ROW_LENGTHS,
) -> Inspection:
    """Reads the first so many documents of `data.train`; all where `documents` is 0. Bad ones are counted.

    Records that have a text, and no columns of instructions, are read as plain text. Without a tokenizer, characters
    are counted, and not tokens. Raises ValueError if the source has no files.
    """
    stops = data.on_bad == "stop"
    data = replace(data, eval="", eval_fraction=0.0, on_bad="skip")
    report, tally, is_cut = _read_documents(data, tokenizer, documents, samples)
    note = []
    if not report.documents and "unknown columns" in report.dropped and data.kind == "instructions":
        text = replace(data, kind="text")
        if (found := _read_documents(text, tokenizer, documents, samples))[0].documents:
            (report, tally, is_cut), note = (
                found,
                [("note", "read as plain text, which training does with --data.kind text")],
            )
            data = text
    count = f"{report.documents:,}" + (", the first ones; --documents 0 reads all" if is_cut else "")
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in report.shapes.most_common())
    facts = [*_describe_places(data), *note, ("documents", count), *([("shapes", shapes)] if shapes else [])]
    if report.dropped and stops:
        left_out = sum(finding.count for finding in report.dropped.values())
        facts.append(
            (
                "bad documents",
                f"{left_out:,}, at the first of which training stops; with --data.on_bad skip they are left out",
            )
        )
    facts += [("note", sentence) for sentence in report.describe()]
    if tally.lengths:
        unit = "tokens" if tokenizer else "characters"
        lengths = np.array(tally.lengths)
        facts += _describe_lengths(lengths, tally.learned, unit)
        if tokenizer and data.kind == "instructions":
            facts += _describe_longer(lengths, row_lengths)
    shown = [_show_pieces(pieces, tokenizer) for pieces in tally.documents]
    return Inspection(facts=facts, samples=shown, documents=report.documents)


def _read_documents(
    data: DataConfig, tokenizer: "PreTrainedTokenizerFast | None", documents: int, samples: int
) -> tuple[Report, _Tally, bool]:
    """What became of the first documents, and whether there are more."""
    report, tally = _BoundedReport(most=documents), _Tally(kept=samples)
    examples = _read_enough(sources.read_examples(data, "train", report))
    for batch in batch_examples(itertools.islice(examples, documents or None)):
        if tokenizer:
            for tokens, learned in _read_enough(encode_examples(batch, tokenizer, data, report)):
                tally.add(_split_runs(tokens, learned))
        else:
            for example in batch:
                report.shapes[example.shape] += 1
                tally.add(_split_text(example))
    return report, tally, report.is_full or (documents > 0 and next(examples, None) is not None)


def _read_enough[T](documents: Iterator[T]) -> Iterator[T]:
    """Documents until a report of them is full."""
    with contextlib.suppress(_Enough):
        yield from documents


def inspect_store(
    store: Store,
    tokenizer: "PreTrainedTokenizerFast | None",
    *,
    samples: int,
    row_lengths: Sequence[int] = ROW_LENGTHS,
) -> Inspection:
    """All documents of tokenized data."""
    learned = sum(
        int(np.count_nonzero(store.learned[start : start + _BLOCK])) for start in range(0, len(store.learned), _BLOCK)
    )
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in store.report.shapes.most_common())
    facts = [("tokenized data", str(store.folder)), ("documents", f"{len(store.offsets) - 1:,}"), ("shapes", shapes)]
    facts += [("note", sentence) for sentence in store.report.describe()]
    lengths = np.diff(store.offsets)
    facts += _describe_lengths(lengths, learned, "tokens")
    if [*store.report.shapes] != ["text"]:
        facts += _describe_longer(lengths, row_lengths)
    chosen = []
    for number in _choose_documents(len(store.offsets) - 1, samples):
        begin, end = store.offsets[number : number + 2].tolist()
        pieces = _split_runs(store.tokens[begin:end].tolist(), store.learned[begin:end].tolist())
        chosen.append(_show_pieces(pieces, tokenizer))
    return Inspection(facts=facts, samples=chosen, documents=len(lengths))


def inspect_indexed(indexed: Indexed, tokenizer: "PreTrainedTokenizerFast | None", *, samples: int) -> Inspection:
    """All documents of .bin and .idx files, whose tokens are all learned but the first of each."""
    offsets = indexed.document_offsets()
    count, total = len(offsets) - 1, len(indexed.documents) - 1
    empty = f", of which {total - count:,} are empty" if total > count else ""
    sequences = f" in {len(indexed.lengths):,} sequences" if len(indexed.lengths) != total else ""
    files = f"{indexed.prefix}.bin and .idx: {decimal(indexed.tokens.nbytes)} of {indexed.tokens.dtype}"
    facts = [("source", files), ("documents", f"{total:,}{empty}{sequences}")]
    if count:
        facts += _describe_lengths(np.diff(offsets), int(offsets[-1]) - count, "tokens")
        borders = offsets[: _BORDERS + 1]
        first, last = indexed.tokens[borders[:-1]], indexed.tokens[borders[1:] - 1]
        verbs = {"begin": first, "end": last}
        facts.append(("borders", ", ".join(_describe_commonest(*pair, tokenizer) for pair in verbs.items())))
    chosen = []
    for number in _choose_documents(count, samples):
        tokens = indexed.tokens[offsets[number] : offsets[number + 1]].tolist()
        chosen.append(_show_pieces(_split_runs(tokens, [False, *[True] * (len(tokens) - 1)]), tokenizer))
    return Inspection(facts=facts, samples=chosen, documents=count)


def list_documents(
    shares: Iterable[dict[str, np.ndarray]], tokenizer: "PreTrainedTokenizerFast", names: Sequence[str]
) -> list[dict]:
    """The documents of a batch, given in shares, [B, T] each: row, number of tokens, how the text begins, and source.

    Without packing a document goes on to the end of its row. `names` are those of several sources.
    """
    documents, first_row = [], 0
    for share in shares:
        for row, (tokens, segments) in enumerate(zip(share["tokens"], share["segments"], strict=True)):
            source = {"source": names[int(share["sources"][row])]} if "sources" in share else {}
            for segment in range(1, int(segments.max(initial=0)) + 1):
                document = tokens[segments == segment]
                text = tokenizer.decode(document[:_SHOWN_TOKENS].tolist())
                documents.append({"row": first_row + row, **source, "tokens": len(document), "text": text})
        first_row += len(share["tokens"])
    return documents


def describe_example(
    store: Store, tokenizer: "PreTrainedTokenizerFast", number: int = 0, most: int = sys.maxsize
) -> str:
    """A document's first `most` tokens in a line, what is learned between [[ and ]], without its middle parts."""
    begin, end = store.offsets[number : number + 2].tolist()
    part = slice(begin, min(end, begin + most))
    runs = _split_runs(store.tokens[part].tolist(), store.learned[part].tolist())
    texts = [(_shorten(str(tokenizer.decode(tokens))), is_learned) for tokens, is_learned in runs[:_SHOWN_RUNS]]
    line = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in texts)
    cut = f" (cut to {most:,} of its {end - begin:,} tokens)" if end - begin > most else ""
    return line.replace("\n", "\\n") + (" ..." if len(runs) > _SHOWN_RUNS else "") + cut


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 40]} ... {text[-40:]}"


def _describe_places(data: DataConfig) -> Iterator[Fact]:
    yield "source", data.train
    choice = sources.choose_places(data, "train")
    if choice.places:
        names = ", ".join(place.label for place in choice.places[:_SHOWN_PLACES])
        rest = len(choice.places) - _SHOWN_PLACES
        more = f" and {rest:,} more" if rest > 0 else ""
        size = sum(place.size for place in choice.places)
        yield "places", f"{len(choice.places):,}, of {decimal(size)}: {names}{more}"
    for note in choice.notes:
        yield "note", note


def _describe_lengths(lengths: np.ndarray, learned: int, unit: str) -> Iterator[Fact]:
    total = int(lengths.sum())
    yield unit, f"{total:,}, of which {learned:,} ({learned / max(total, 1):.0%}) are learned"
    marks = {"shortest": 0, "10%": 10, "median": 50, "90%": 90, "99%": 99, "longest": 100}
    values = np.percentile(lengths, [*marks.values()], method="nearest").astype(int).tolist()
    yield "a document", ", ".join(f"{name} {value:,}" for name, value in zip(marks, values, strict=True)) + f" {unit}"


def _describe_longer(lengths: np.ndarray, row_lengths: Sequence[int]) -> Iterator[Fact]:
    """How many documents are longer than a row; plain texts are cut at its end and go on in the next."""
    counts = [(length, int(np.count_nonzero(lengths > length))) for length in row_lengths]
    shares = (f"{length:,} tokens: {count:,} ({count / len(lengths):.1%})" for length, count in counts)
    yield (
        "longer than",
        f"{', '.join(shares)}; of a document that is longer than train.sequence_length, the end is lost",
    )


def _describe_commonest(verb: str, tokens: np.ndarray, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    values, counts = np.unique(tokens, return_counts=True)
    token = int(values[counts.argmax()])
    text = f" ({tokenizer.convert_ids_to_tokens(token)})" if tokenizer else ""
    return f"{counts.max() / len(tokens):.0%} of documents {verb} with token {token}{text}"


def _choose_documents(count: int, samples: int) -> list[int]:
    return sorted(random.Random(0).sample(range(count), min(samples, count)))


def _split_runs(tokens: list[int], learned: Iterable[int]) -> list[tuple[list[int], bool]]:
    """Tokens in runs that are learned, or not."""
    runs = itertools.groupby(zip(tokens, learned, strict=True), key=lambda pair: bool(pair[1]))
    return [([token for token, _ in run], is_learned) for is_learned, run in runs]


def _split_text(example: Example) -> list[Piece]:
    """A document as it was read, without a chat template."""
    if example.turns:
        return [
            (f"{turn.role}: {turn.content}\n", turn.role == "assistant" and turn.is_learned) for turn in example.turns
        ]
    return [(text, is_learned) for text, is_learned in ((example.prompt, False), (example.completion, True)) if text]


def _show_pieces(pieces: list, tokenizer: "PreTrainedTokenizerFast | None") -> list[Piece]:
    """Pieces as text, long ones without their middle. Tokens are numbers where there is no tokenizer."""

    def show(content: list[int] | str) -> str:
        if isinstance(content, str):
            return content
        return str(tokenizer.decode(content)) if tokenizer else " ".join(map(str, content))

    shown = []
    for content, is_learned in pieces:
        end = _SHOWN_END * (4 if isinstance(content, str) else 1)
        left = len(content) - 2 * end
        if left <= 0:
            shown.append((show(content), is_learned))
            continue
        unit = "characters" if isinstance(content, str) else "tokens"
        middle = f" [... {left:,} {unit} ...] "
        shown.append((show(content[:end]) + middle + show(content[-end:]), is_learned))
    return shown
