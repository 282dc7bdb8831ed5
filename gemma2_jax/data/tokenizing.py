"""Pieces of a source made into tokens by worker processes, each piece into files of its own.

A worker is `python -m gemma2_jax.data.tokenizing`: a child of its own, and not one of multiprocessing, which would run
the user's script again in each. It reads a pickled `Job` and then numbers of pieces from its standard input, writes
each piece's files beside the store that `store` assembles, and answers on its standard output with a line of JSON. When
its parent ends, by whatever signal, it ends too, at once. It has the store's lock until then, so that nobody goes on
with a build that one of its workers still writes to.
"""

import contextlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data import encoding, sources
from gemma2_jax.data.encoding import encode_examples
from gemma2_jax.data.reading.places import Piece
from gemma2_jax.data.records import Example
from gemma2_jax.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of one call of the tokenizer, which takes a few hundred bytes of memory for each token.
_DOCUMENTS_PER_CALL, _CHARACTERS_PER_CALL = 256, 2_000_000
PIECE_FILES = ("tokens", "learned", "lengths")  # int32 [tokens], bool [tokens] and int64 [documents] of a piece


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know."""

    data: DataConfig
    split: sources.Split
    digest_bound: float | None  # of `sources.find_digest_bound`
    pieces: tuple[Piece, ...]
    tokenizer: "PreTrainedTokenizerFast"
    folder: Path  # where the files of pieces are written
    lock: int | None = None  # descriptor of the store's lock, which workers inherit


def tokenize_piece(job: Job, number: int, advance: Callable[[int], None]) -> None:
    """Writes the files of one piece, and its report last, which says that they are whole.

    `advance` is told of documents as they are done. Raises ValueError for a bad document, OSError if the disk is full.
    """
    if piece_file(job.folder, number, "report").exists():
        return  # an earlier process, which was killed, has done it
    report = Report()
    examples = sources.read_piece(job.data, job.split, job.pieces[number], job.digest_bound, report)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(piece_file(job.folder, number, name).open("wb")) for name in PIECE_FILES]
        for batch in batch_examples(examples):
            encoded = list(encode_examples(batch, job.tokenizer, job.data, report))
            if encoded:
                tokens, learned = zip(*encoded, strict=True)
                lengths = np.fromiter(map(len, tokens), np.int64)
                all_tokens = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, int(lengths.sum()))
                # tofile's error does not say that the disk is full.
                for file, buffer in zip(files, (all_tokens.data, b"".join(learned), lengths.data), strict=True):
                    file.write(buffer)
            advance(len(batch))
    partial = piece_file(job.folder, number, "report.partial")
    partial.write_text(json.dumps(report.to_json()))
    partial.rename(piece_file(job.folder, number, "report"))


def batch_examples(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The documents in lists that one call of the tokenizer takes."""
    batch, characters = [], 0
    for example in examples:
        batch.append(example)
        characters += len(example.prompt) + len(example.completion) + sum(len(turn.content) for turn in example.turns)
        if len(batch) == _DOCUMENTS_PER_CALL or characters >= _CHARACTERS_PER_CALL:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def piece_file(folder: Path, number: int, name: str) -> Path:
    """One of the files of a piece: those of PIECE_FILES, or its report."""
    return folder / f"piece-{number:07}.{name}"


def tokenize_pieces(
    job: Job, numbers: Sequence[int], workers: int, advance: Callable[[int], None]
) -> Generator[tuple[int, Future]]:
    """Tokenizes pieces, each in one of so many workers, and yields each with a future that waits for it, in order.

    With a single worker, this process does the work itself, when a future is yielded. Raises what `tokenize_piece`
    raises.
    """
    if workers <= 1:
        for number in numbers:
            tokenize_piece(job, number, advance)
            yield number, _finished()
        return
    idle: SimpleQueue[_Worker] = SimpleQueue()
    with ThreadPoolExecutor(workers) as threads, contextlib.ExitStack() as stack:  # which ends the workers first
        for worker in [stack.enter_context(_Worker(job)) for _ in range(workers)]:
            idle.put(worker)

        def run(number: int) -> None:
            worker = idle.get()
            try:
                worker.tokenize(number, advance)
            finally:
                idle.put(worker)

        # Pieces that are far ahead of the one waited for would fill the disk with files to be assembled.
        ahead: list[tuple[int, Future]] = []
        try:
            for number in numbers:
                ahead.append((number, threads.submit(run, number)))
                if len(ahead) > 4 * workers:
                    yield ahead.pop(0)
            yield from ahead
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _finished() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


class _Worker:
    """A process that tokenizes pieces, one at a time."""

    def __init__(self, job: Job) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=() if job.lock is None else (job.lock,),
        )
        self._ask(pickle.dumps(job))

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()

    def tokenize(self, number: int, advance: Callable[[int], None]) -> None:
        self._ask(pickle.dumps(number))
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "documents" in answer:
                advance(answer["documents"])
            elif "os_error" in answer:
                raise OSError(*answer["os_error"])
            elif "error" in answer:
                raise ValueError(answer["error"])
            else:
                return
        status = self._process.wait()
        raise OSError(f"a process that tokenizes ended by itself (status {status}; -9 may be for want of memory)")

    def _ask(self, message: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `tokenize` says how the process ended
            self._process.stdin.write(message)
            self._process.stdin.flush()


def _receive_numbers(numbers: SimpleQueue) -> None:
    """Takes numbers from the parent while pieces are tokenized, and ends this process as soon as there is no parent."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            numbers.put(pickle.load(sys.stdin.buffer))
    os._exit(1)


def main() -> None:
    """Tokenizes the pieces that the parent names, until it has ended."""
    encoding.hide_torch()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that what a library prints is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers)

    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError, KeyboardInterrupt):
        job: Job = pickle.load(sys.stdin.buffer)
        numbers: SimpleQueue[int] = SimpleQueue()
        threading.Thread(target=_receive_numbers, args=(numbers,), daemon=True).start()
        while True:
            number = numbers.get()
            try:
                tokenize_piece(job, number, lambda documents: answer(documents=documents))
            except BrokenPipeError:
                raise
            except OSError as error:
                if error.errno is None:  # a library's own
                    answer(error=str(error))
                else:
                    answer(os_error=[error.errno, error.strerror, error.filename])
            except ValueError as error:
                answer(error=str(error))
            else:
                answer(done=number)


if __name__ == "__main__":
    main()
