"""A file of prompts answered into a file of texts, which can be stopped at any moment and goes on where it was.

Texts are written in the order of the prompts, each as one whole line, once it and all before it are there. So what the
file of texts has is the beginning of the work, and the same command goes on behind it. The file of prompts is read
twice: to find the longest and what cannot be answered, before a weight is loaded; and as the prompts are begun, of
which only a window is in memory.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.command_line import write_whole
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.inference.completion import Completion
from gemma2_jax.inference.engine import Engine
from gemma2_jax.inference.loaded import default_dtype
from gemma2_jax.inference.prompts import Encoder, Line, copy_keys, list_doubtful_keys, read_lines
from gemma2_jax.inference.source import Source

_WINDOW = 4  # prompts in memory for each slot: those after a long one are finished before it
_MOST_NAMED = 3  # settings in a message
_MOST_DOUBTS = 10  # keys of lines that are told


class Answers:
    """The file of texts. Beside it lies NAME.settings.json, so that no text is added that other settings gave."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Opens the file, or makes it, and locks it.

        Raises ValueError where another process writes to it, or what it has came of other settings.
        """
        self.path = path
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{path} is not a file; name another (--out)")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}; make it, or name another file (--out)")
        self._settings_path = path.with_name(f"{path.name}.settings.json")
        self._end = 0  # of the last whole line
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._lock()
            if os.fstat(self._file).st_size:
                self._check_settings(settings)
            else:
                self._write_settings(settings)
            stack.pop_all()

    def close(self) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process writes to {self.path}; wait until it has ended, or name another file (--out)"
            ) from error
        except OSError as error:  # such as NFS without its lock service
            print(
                f"warning: {self.path} cannot be locked ({error.strerror}); see to it that no other command writes "
                "to it",
                file=sys.stderr,
            )

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        write_whole(self._settings_path, json.dumps(settings, indent=2) + "\n")

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            saved = dict(json.loads(self._settings_path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.path} has something in it, and {self._settings_path.name} beside it does not say with which "
                "settings it was made; name another file (--out)"
            ) from error
        asked = json.loads(json.dumps(settings))
        names = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name)]
        if names:
            more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
            changes = [f"{n} {json.dumps(saved.get(n))}, not {json.dumps(asked.get(n))}" for n in names[:_MOST_NAMED]]
            raise ValueError(
                f"{self.path} was begun with {', '.join(changes + more)}; give the same settings, or name another "
                "file (--out)"
            )

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that are there. A last one that was not written to its end is cut off.

        Raises ValueError for a line that is no answer.
        """
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(text)
                except ValueError:
                    answer = None
                if not isinstance(answer, dict):
                    raise ValueError(f"{self.path}:{number} is no answer; mend the file, or name another (--out)")
                self._end += len(text)
                yield answer
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)

    def add(self, answer: Mapping[str, Any]) -> None:
        """Adds a line, at once. Raises OSError, after which the file ends with a whole line, as on a full disk."""
        line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            error.filename = str(self.path)
            raise
        self._end += len(line)


@dataclass(kw_only=True)
class Job:
    """One text that is asked for; or a line of the prompts that cannot be answered."""

    line: Line
    sample: int | None  # of several texts of one prompt, which; None where one is asked for
    completion: Completion | None = None
    error: str = ""

    @property
    def has_ended(self) -> bool:
        return self.completion is None or self.completion.reason is not None

    @property
    def tokens(self) -> int:
        """How many tokens the text has, with the one that ends it."""
        return len(self.completion.pieces) if self.completion else 0

    def to_json(self) -> dict[str, Any]:
        """The line of answers."""
        place: dict[str, Any] = {"line": self.line.number}
        if self.completion is None:
            return {**place, **copy_keys(self.line.record), "error": self.error}
        if self.sample is not None:
            place["sample"] = self.sample
        text = {"text": self.completion.text, "reason": self.completion.reason, "tokens": self.tokens}
        return {**place, **copy_keys(self.line.record), **text}


@dataclass
class Survey:
    """What there is to do, and what of it is done."""

    texts: int = 0  # all of them, with the lines that cannot be answered
    done: int = 0  # of these, in the file
    done_lines: int = 0  # lines of the prompts all of whose texts are there
    done_samples: int = 0  # of the line after those, texts that are there
    longest: int = 0  # tokens of a prompt and its text together, of what is not done
    errors: int = 0  # lines that cannot be answered
    first_error: str = ""
    doubts: dict[str, str] = field(default_factory=dict)  # sentences on keys that may be meant as settings, by key

    def add_doubts(self, line: Line) -> None:
        """Notes the keys of a line that were in no line before, as many as somebody reads."""
        for key, doubt in list_doubtful_keys(line):
            if len(self.doubts) < _MOST_DOUBTS:
                self.doubts.setdefault(key, doubt)

    def add_error(self, error: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or error

    def describe_errors(self) -> str:
        lines = "1 line" if self.errors == 1 else f"{self.errors:,} lines"
        return f"{lines} of the prompts cannot be answered; the first is {self.first_error}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A file of prompts, and how each line of it is answered."""

    path: str
    encoder: Encoder

    @property
    def samples(self) -> int:
        """Texts of each prompt."""
        return self.encoder.settings.samples

    def survey(self, answers: Answers, *, is_stopped: Callable[[], bool] = lambda: False) -> Survey:
        """Reads both files through. Raises ValueError where the texts are of other prompts than these."""
        found, there = Survey(), answers.read()
        for line in read_lines(self.path):
            if is_stopped():
                break
            found.add_doubts(line)
            done = self._take_done(line, there, answers)
            if done and "error" in done[0]:
                found.texts, found.done, found.done_lines = found.texts + 1, found.done + 1, found.done_lines + 1
                found.add_error(done[0]["error"])
                continue
            if len(done) == self.samples:
                found.texts, found.done = found.texts + self.samples, found.done + self.samples
                found.done_lines += 1
                continue
            found.done, found.done_samples = found.done + len(done), found.done_samples + len(done)
            try:
                request = self.encoder.make_request(line)
            except ValueError as error:
                found.texts += 1
                found.add_error(str(error))
                continue
            found.texts += self.samples
            found.longest = max(found.longest, len(request.prompt) + request.max_new_tokens)
        else:
            if next(there, None) is not None:
                raise ValueError(
                    f"{answers.path} has more texts than {self.path} has prompts; name another file (--out)"
                )
        return found

    def _take_done(self, line: Line, there: Iterator[dict[str, Any]], answers: Answers) -> list[dict[str, Any]]:
        """The answers to a line that are there: one that says why there is none, or up to `samples`."""
        done: list[dict[str, Any]] = []
        while len(done) < self.samples and not (done and "error" in done[0]):
            answer = next(there, None)
            if answer is None:
                break
            sample = answer.get("sample", 0)
            same = json.dumps(copy_keys(answer)) == json.dumps(copy_keys(line.record))
            if not same or answer.get("line") != line.number or sample != len(done):
                raise ValueError(
                    f"{answers.path} has the answer to another prompt where that to {line.where} was to come; give the "
                    "prompts that it was begun with, or name another file (--out)"
                )
            done.append(answer)
        return done

    def list_jobs(self, survey: Survey) -> Iterator[Job]:
        """What is not done, in order, read as it is taken."""
        skipped = survey.done_samples
        for line in itertools.islice(read_lines(self.path), survey.done_lines, None):
            try:
                request = self.encoder.make_request(line)
            except ValueError as error:
                yield Job(line=line, sample=None, error=str(error))
                continue
            # Lines with one seed draw apart from each other, as they would not where only their prompts differ.
            first = 0 if line.record.get("seed") is not None else line.number * self.samples
            for sample in range(skipped, self.samples):
                copy = replace(request, sample=first + sample, tokens=[], scores=[], prompt_scores=[])
                completion = Completion(copy, self.encoder.tokenizer, self.encoder.settings.stop)
                yield Job(line=line, sample=sample if self.samples > 1 else None, completion=completion)
            skipped = 0


def describe_settings(batch: Batch, source: Source) -> dict[str, Any]:
    """What a text depends on besides its line, as JSON."""
    encoder = batch.encoder
    settings = asdict(encoder.settings)
    sampling = settings.pop("sampling")
    return {
        "weights": _digest_weights(encoder.checkpoint),
        "dtype": source.dtype or default_dtype(),
        "int8": source.int8,
        "chat": encoder.chat,
        **settings,
        **sampling,
    }


def _digest_weights(checkpoint: Checkpoint) -> str:
    """A hash of the smallest array of each source: another step of a run has others, a copy elsewhere the same."""
    digest = hashlib.blake2b(digest_size=8)
    for source in checkpoint.sources:
        path, shape = min(source.shapes.items(), key=lambda item: (math.prod(item[1].shape), item[0]))
        digest.update(source.read(path, tuple(slice(0, size) for size in shape.shape), np.dtype("float32")).tobytes())
    return digest.hexdigest()


def run_jobs(engine: Engine, jobs: Iterator[Job], *, is_stopped: Callable[[], bool]) -> Iterator[Job]:
    """The jobs when they have ended, in their order; some are begun beyond those that the engine has slots for."""
    begun: deque[Job] = deque()
    completions: dict[int, Completion] = {}  # by the identity of their requests
    while not is_stopped():
        begun.extend(new := list(itertools.islice(jobs, _WINDOW * engine.slots - len(begun))))
        if not begun:
            return
        for job in new:
            if job.completion:
                engine.submit(job.completion.request)
                completions[id(job.completion.request)] = job.completion
        while begun and begun[0].has_ended:
            job = begun.popleft()
            if job.completion:
                del completions[id(job.completion.request)]
            yield job
        for request in engine.advance() if begun else ():
            if completion := completions.get(id(request)):
                completion.take()
