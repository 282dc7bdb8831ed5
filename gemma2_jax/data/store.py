"""The tokens of a source, made once and kept in a cache that runs and hosts share; memory-mapped from then on.

A store holds whole documents, whatever the length of a row: `packing` cuts them. It is found by a digest of everything
that its tokens depend on. `tokenizing` makes the tokens of pieces of the source, in several processes; they are put
together here in the order of the source. A build that was killed goes on after the last piece that was put in. Memory
does not grow with the number of documents.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources, tokenizing
from gemma2_jax.data.cache import hold_lock
from gemma2_jax.data.reading.files import is_url
from gemma2_jax.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_FORMAT = 5  # to be raised when the code writes other tokens or other files for the same documents
_SMALL_SOURCE_BYTES = 4 << 20  # up to which this process is done before others would have started
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ALIKE = 1000  # documents that are compared, where all of a source are held out
_STORE_FILES = ("tokens", "learned", "offsets")


class Sliced(Protocol):
    """What has slices that are arrays, such as an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Store:
    """Tokenized documents, memory-mapped, one after another."""

    tokens: Sliced  # int32 [tokens]
    learned: Sliced  # bool [tokens]: whether the token counts in the loss, when predicted
    offsets: np.ndarray  # int64 [documents + 1]: where each document begins, and where the last ends
    report: Report = field(default_factory=Report)  # what became of the documents
    folder: Path | None = None  # where its files are, and plans of its rows; None: in memory alone


def cache_folder(data: DataConfig) -> Path:
    """Where stores are kept: `data.cache`, else data-cache in SAVE_DIR, else in the user's cache."""
    if data.cache:
        return Path(data.cache)
    if save_dir := os.environ.get("SAVE_DIR"):
        return Path(save_dir) / "data-cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma2_jax" / "data"


def build_store(
    data: DataConfig,
    split: sources.Split,
    tokenizer: "PreTrainedTokenizerFast",
    cache: Path,
    *,
    show: bool = False,
    workers: int | None = None,
) -> Store:
    """The store of one split: the one in `cache` if nothing that it depends on has changed, else a new one.

    Processes that share `cache` wait for the first. A store gets its name when it is whole. `show` prints the progress.
    `workers` is how many processes tokenize; None: one for each CPU, where the source is large enough. Raises
    ValueError if the split has no documents, or a malformed one that is not to be skipped, and OSError if the cache
    cannot be written to.
    """
    folder = cache / f"{split}-{_fingerprint(data, split, tokenizer)}"
    if folder.exists() and not os.access(cache, os.W_OK):
        return open_store(folder)  # whole, as it has its name; there is no place for a lock
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder) as lock:
            store = _reopen_store(folder) if folder.exists() else None
            if store is None:
                partial = lock.name_partial(folder)
                job = tokenizing.Job(
                    data=data,
                    split=split,
                    digest_bound=sources.find_digest_bound(data),
                    pieces=tuple(sources.list_pieces(data, split, sources.PIECE_BYTES)),
                    tokenizer=tokenizer,
                    folder=partial,
                    lock=lock.descriptor,
                )
                try:
                    _write_store(job, show=show, workers=workers or _count_workers(job))
                except (ValueError, OSError) as error:
                    _check_unchanged(job, folder)
                    if isinstance(error, ValueError) and not _has_url(job):
                        shutil.rmtree(partial, ignore_errors=True)  # what remedies it is another source, or options
                    raise
                _check_unchanged(job, folder)
                (partial / "journal").unlink(missing_ok=True)
                _move_folder(partial, folder)
                store = _reopen_store(folder)
    except OSError as error:
        if error.errno not in DISK_ERRORS and not Path(str(error.filename)).is_relative_to(cache):
            raise  # of the source
        raise OSError(
            f"tokenized data could not be written to {cache} ({error}); make room there, or name a folder on another "
            "disk with --data.cache"
        ) from error
    assert store is not None
    return store


def _check_unchanged(job: tokenizing.Job, folder: Path) -> None:
    """Raises ValueError, and removes what was made, if the source is no longer what the store is named after."""
    if folder.name != f"{job.split}-{_fingerprint(job.data, job.split, job.tokenizer)}":
        shutil.rmtree(job.folder)
        raise ValueError(
            f"{sources.open_source(job.data, job.split)} changed while it was tokenized; the same command begins "
            "again, once nothing writes to it"
        )


def _has_url(job: tokenizing.Job) -> bool:
    """Whether any of the source is read over a network, whose failures pass."""
    return any(is_url(part.path) for piece in job.pieces for part in piece.parts)


def _move_folder(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(source)  # another process has finished before


def open_store(folder: Path) -> Store:
    """The store in a folder. Raises ValueError where its files are not whole."""
    reason = "its files are of unlike lengths"
    try:
        store = Store(
            tokens=np.memmap(folder / "tokens", np.int32, "r"),
            learned=np.memmap(folder / "learned", np.bool_, "r"),
            offsets=np.memmap(folder / "offsets", np.int64, "r"),
            report=Report.from_json(json.loads((folder / "report.json").read_text())),
            folder=folder,
        )
        if len(store.tokens) == len(store.learned) == store.offsets[-1] and len(store.offsets) > 1:
            return store
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
    raise ValueError(f"the tokenized data in {folder} is damaged ({reason})")


def _reopen_store(folder: Path) -> Store | None:
    """The store in a folder; None, after a warning, where its files are not whole, and then the folder is removed."""
    try:
        return open_store(folder)
    except ValueError as error:
        logger.warning("%s; it is removed and made again", error)
    shutil.rmtree(folder)
    return None


def _write_store(job: tokenizing.Job, *, show: bool, workers: int) -> None:
    """Tokenizes what a killed build has not, and puts the pieces together in their order; the report comes last."""
    if (job.folder / "report.json").exists():
        return  # the build was killed just before the store got its name
    job.folder.mkdir(exist_ok=True)
    journal = _Journal(job.folder)
    console = Console(stderr=True, quiet=not show)
    _announce(console, job, journal)
    total = sum(piece.size for piece in job.pieces)
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[documents]:,} documents"))
    times = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total or None, documents=journal.report.documents)

        def advance(documents: int) -> None:
            progress.update(task, documents=progress.tasks[0].fields["documents"] + documents)

        progress.advance(task, sum(piece.size for piece in job.pieces[: journal.done]))
        numbers = range(journal.done, len(job.pieces))
        work = tokenizing.tokenize_pieces(job, numbers, workers, advance)
        with contextlib.closing(work):  # which ends its processes
            for number, finished in work:
                finished.result()
                journal.append(number)
                progress.advance(task, job.pieces[number].size)
    if not journal.tokens:
        raise ValueError(explain_emptiness(job.data, job.split, journal.report))
    for leftover in job.folder.glob("piece-*"):  # of a piece that was put in just before a kill
        leftover.unlink()
    complete = job.folder / "report.tmp"
    complete.write_text(json.dumps(journal.report.to_json()))
    complete.rename(job.folder / "report.json")


def _announce(console: Console, job: tokenizing.Job, journal: "_Journal") -> None:
    purpose = "training" if job.split == "train" else "held-out"
    message = f"tokenizing {purpose} data from {sources.open_source(job.data, job.split)}"
    if journal.done:
        message += f", after the {journal.report.documents:,} documents that an earlier run has done"
    is_said = job.split == "eval" and sources.is_share_held_out(job.data)  # of the training data, which came before
    for sentence in (message, *(() if is_said else sources.choose_places(job.data, job.split).notes)):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def explain_emptiness(data: DataConfig, split: sources.Split, report: Report) -> str:
    """Why nothing is left to train on, or to hold out, of documents with this report."""
    if report.dropped:
        return f"no document of {sources.open_source(data, split)} can be trained on: {'; '.join(report.describe())}"
    documents = list(itertools.islice(sources.read_examples(replace(data, eval_fraction=0.0), "train"), _ALIKE))
    # The share is of digests, which documents that are alike have in common.
    are_alike = len(documents) > 1 and len({example.digest for example in documents}) == 1
    reason = "its documents are all alike, and those are held out together" if are_alike else "at least one is held out"
    return (
        f"data.eval_fraction {data.eval_fraction} leaves no document of {data.train} to train on, as {reason}; give 0 "
        "to hold out none, or other data as --data.eval"
    )


def _count_workers(job: tokenizing.Job) -> int:
    """A process for each CPU that this one may use, where there is enough for them to do."""
    if sum(piece.size for piece in job.pieces) <= _SMALL_SOURCE_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), len(job.pieces))


class _Journal:
    """What has been put into a store that is being built; a file of its own says so after a kill.

    A line of it is the state after one more piece. Bytes that files have beyond it belong to no piece that is whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "journal"
        self.done, self.tokens, self.documents = 0, 0, 0
        self.report = Report()
        for line in self._read_lines():
            self.done, self.tokens, self.documents = line["pieces"], line["tokens"], line["documents"]
            self.report = Report.from_json(line["report"])
        sizes = (self.tokens * 4, self.tokens, (self.documents + 1) * 8)
        for name, size in zip(_STORE_FILES, sizes, strict=True):
            with (folder / name).open("ab") as file:
                file.truncate(size)  # of a new file of offsets, this makes the first of them, 0

    def _read_lines(self) -> Iterator[dict]:
        if not self._path.exists():
            return
        whole, end, _ = self._path.read_bytes().rpartition(b"\n")
        os.truncate(self._path, len(whole + end))  # without the line that a kill has cut
        if whole:
            yield json.loads(whole.rpartition(b"\n")[2])

    def append(self, number: int) -> None:
        """Puts a piece at the end of the store, and removes its own files."""
        paths = {
            name: tokenizing.piece_file(self._folder, number, name) for name in (*tokenizing.PIECE_FILES, "report")
        }
        lengths = np.fromfile(paths["lengths"], np.int64)
        for name in ("tokens", "learned"):
            with paths[name].open("rb") as piece, (self._folder / name).open("ab") as whole:
                shutil.copyfileobj(piece, whole, 1 << 20)
        with (self._folder / "offsets").open("ab") as offsets:
            offsets.write((self.tokens + np.cumsum(lengths)).data)
        self.done, self.documents = number + 1, self.documents + len(lengths)
        self.tokens += int(lengths.sum())
        self.report.add(Report.from_json(json.loads(paths["report"].read_text())))
        state = {"pieces": self.done, "tokens": self.tokens, "documents": self.documents}
        with self._path.open("a") as file:
            print(json.dumps(state | {"report": self.report.to_json()}), file=file)
        for path in paths.values():
            path.unlink()


def _fingerprint(data: DataConfig, split: sources.Split, tokenizer: "PreTrainedTokenizerFast") -> str:
    """A digest of everything that the tokens of a split depend on."""
    choices = [data.kind, data.columns, data.prompt_template, data.repeated_roles, data.on_bad]
    share = None if data.eval else data.eval_fraction
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    contents = sources.fingerprint(data, split)
    everything = json.dumps([_FORMAT, split, choices, share, contents, ids, tokenizer.backend_tokenizer.to_str()])
    return hashlib.blake2b(everything.encode(), digest_size=16).hexdigest()
