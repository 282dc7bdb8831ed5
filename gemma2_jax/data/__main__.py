"""python -m gemma2_jax.data: what a data set is, and text written as Megatron's .bin and .idx.

    inspect SOURCE         say what a data set is, with samples
    build SOURCE PREFIX    tokenize its text into PREFIX.bin and PREFIX.idx

This is the command line only: it parses its arguments before it imports slow libraries, and prints what was found and
written.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gemma2_jax import command_line, config_text
from gemma2_jax.cluster import platforms
from gemma2_jax.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemma2_jax.data.inspection import Inspection, Piece

_LEARNED = "\033[32m", "\033[0m"  # green in a terminal
_MARKS = "[[", "]]"  # elsewhere
_LABEL_WIDTH = 16
_Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help="data to read")]
_Data = Annotated[DataConfig, tyro.conf.FlagConversionOff]


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a data set is: documents, lengths, learned tokens, what is left out.

    SOURCE is what data.train takes, or the folder of a run, or tokenized data.
    """

    source: _Source
    documents: int = 1000  # read at most, the first ones of a source that is not tokenized; 0: all
    samples: int = 3  # documents shown
    data: _Data = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        command_line.check_paths(self, "source")
        if self.documents < 0 or self.samples < 0:
            raise ValueError(f"documents is {self.documents} and samples {self.samples}; neither may be negative")
        _check_fields(
            self.data, ("train", "eval", "eval_fraction", "packing", "order", "split_shares", "stream", "seed")
        )


@dataclass(frozen=True, kw_only=True)
class Build:
    """Tokenize text into Megatron's PREFIX.bin and PREFIX.idx.

    Of each document they have <bos>, the text and <eos>.

    SOURCE is what --data.train takes.

    Where it was interrupted, the same command goes on.
    """

    source: _Source
    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX", help="what both files are called")]
    bos: Annotated[bool, tyro.conf.FlagConversionOff] = True  # False: no <bos>, as Megatron-LM's own tool has it
    workers: int | None = None  # processes; None: one for each CPU
    data: _Data = field(default_factory=lambda: DataConfig(kind="text"))

    def __post_init__(self) -> None:
        command_line.check_paths(self, "source", "prefix")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")
        others = ("train", "eval", "eval_fraction", "packing", "order", "split_shares", "stream", "seed", "cache")
        _check_fields(self.data, others)
        if not self.data.tokenizer:
            raise ValueError("--data.tokenizer must be given: a folder, or a Hub id such as google/gemma-2-2b")


def _check_fields(data: DataConfig, others: tuple[str, ...]) -> None:
    """Raises ValueError for a field that has no meaning here."""
    default = DataConfig()
    for name in others:
        if getattr(data, name) != getattr(default, name):
            raise ValueError(f"data.{name} is a choice of a run, and this command reads all of SOURCE; leave it out")


def main(program: str = "python -m gemma2_jax.data") -> None:
    """Parses the command line and runs the command; exits with a sentence if that cannot be done."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return command_line.print_commands(program, _SUMMARIES)
    if name not in _COMMANDS:
        near = command_line.suggest(name, _COMMANDS) or "."
        command_line.exit_usage(f"there is no command {name}{near} There are {', '.join(_COMMANDS)}", program)
    kind, run = _COMMANDS[name]
    arguments = command_line.capitalize_booleans(arguments, kind)
    command = command_line.parse(kind, arguments, f"{program} {name}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    platforms.prepare_process(cpu=True, cache=False)
    with command_line.exit_with_sentence("; the same command goes on" if name == "build" else ""):
        run(command)


def _load_tokenizer(place: str | Path) -> "PreTrainedTokenizerFast":
    from gemma2_jax.convert.formats.companions import load_tokenizer
    from gemma2_jax.convert.opening import locate_folder
    from gemma2_jax.data import encoding

    encoding.hide_torch()
    return load_tokenizer(locate_folder(place, weights=False))


def _build(command: Build) -> None:
    from gemma2_jax.data.megatron.building import build_indexed

    data = replace(command.data, train=command.source)
    tokenizer = _load_tokenizer(data.tokenizer)
    prefix = re.sub(r"\.(bin|idx)$", "", command.prefix)  # as either file is called
    indexed = build_indexed(data, prefix, tokenizer, bos=command.bos, workers=command.workers)
    print(
        f"wrote {prefix}.bin and {prefix}.idx: {len(indexed.lengths):,} documents, "
        f"{len(indexed.tokens):,} tokens as {indexed.tokens.dtype}\n"
        f"Train:  python -m gemma2_jax.train --config RECIPE --data.kind text --data.train {shlex.quote(prefix)}"
    )


def _inspect(command: Inspect) -> None:
    from gemma2_jax.data import batches, inspection
    from gemma2_jax.data.store import open_store

    folder = Path(command.source)
    run = config_text.from_file(folder / "config.txt") if (folder / "config.txt").is_file() else None
    data = run.data if run else replace(command.data, train=command.source)
    tokenizer = str(folder / "tokenizer") if run else data.tokenizer
    loaded = _load_tokenizer(tokenizer) if tokenizer else None
    if (folder / "offsets").is_file():
        _print_inspection(inspection.inspect_store(open_store(folder), loaded, samples=command.samples))
    else:
        row_lengths = (run.train.sequence_length,) if run else inspection.ROW_LENGTHS
        for number, source in enumerate(_split_sources(data)):
            print("\n" * bool(number), end="")
            found = _inspect_source(command, replace(data, train=source), loaded, run is not None, row_lengths)
            _print_inspection(found)
            if not found.documents:
                raise ValueError(f"no document of {source} that was read can be trained on")
        if repeated := batches.describe_repeated(data):
            print(f"\nnote: {repeated}")
    if not tokenizer:
        print("\nWith --data.tokenizer FOLDER, a folder or a Hub id, tokens are counted and shown as text.")


def _split_sources(data: DataConfig) -> list[str]:
    """The sources of a,b or of 0.7*a,0.3*b, without their weights."""
    from gemma2_jax.data.mixtures import list_sources

    if data.order == "megatron":
        return [part.strip().rpartition("*")[2] for part in data.train.split(",")]
    return [source.data.train for source in list_sources(data, "train")]


def _inspect_source(
    command: Inspect,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast | None",
    is_run: bool,
    row_lengths: Sequence[int],
) -> "Inspection":
    """The inspection of one source; of a run, what it has tokenized of it beforehand."""
    from gemma2_jax.data import inspection
    from gemma2_jax.data.megatron.indexed import find_prefix, open_indexed
    from gemma2_jax.data.store import build_store, cache_folder

    if prefix := find_prefix(data.train):
        return inspection.inspect_indexed(open_indexed(prefix), tokenizer, samples=command.samples)
    if is_run and tokenizer and not data.stream:
        store = build_store(data, "train", tokenizer, cache_folder(data), show=True)
        return inspection.inspect_store(store, tokenizer, samples=command.samples, row_lengths=row_lengths)
    return inspection.inspect_source(
        data, tokenizer, documents=command.documents, samples=command.samples, row_lengths=row_lengths
    )


def _print_inspection(found: "Inspection") -> None:
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 0
    for label, text in found.facts:
        line = f"{label:{_LABEL_WIDTH}}{_escape(text)}"
        indent = " " * _LABEL_WIDTH
        print(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) if width else line)
    marks = _LEARNED if terminal and not os.environ.get("NO_COLOR") else _MARKS
    for number, pieces in enumerate(found.samples, start=1):
        print(f"\nsample {number} of {len(found.samples)}; {_MARKED[marks]} is learned")
        print("".join(_mark_pieces(pieces, marks)))


_MARKED = {_LEARNED: "what is green", _MARKS: "what is between [[ and ]]"}


def _mark_pieces(pieces: "list[Piece]", marks: tuple[str, str]) -> Iterator[str]:
    for text, is_learned in pieces:
        yield f"{marks[0]}{_escape(text)}{marks[1]}" if is_learned else _escape(text)


def _escape(text: str) -> str:
    """A text that does nothing to a terminal but fill it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


_COMMANDS: dict[str, tuple[type, Callable]] = {"inspect": (Inspect, _inspect), "build": (Build, _build)}
_SUMMARIES = (
    "  inspect SOURCE         say what a data set is, with samples",
    "  build SOURCE PREFIX    tokenize it into Megatron's PREFIX.bin and PREFIX.idx",
)


if __name__ == "__main__":
    main()
