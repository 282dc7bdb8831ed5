"""Copies of a run's checkpoints in a bucket, on the Hub or in another folder, made in the background by process 0.

A step is copied when it has its checksums, the newest first, and these go last, so that a step elsewhere is whole if it
has them. On the Hub a step is one commit. Nothing is deleted there, and no failure ends training. What results is the
folder of a run, with its config and its tokenizer: other commands open a copy of it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import jax
from rich.filesize import decimal

from gemma2_jax.cluster import hosts
from gemma2_jax.command_line import notify
from gemma2_jax.config import Config
from gemma2_jax.convert import steps
from gemma2_jax.convert.files.checksums import CHECKSUMS, list_files

_LOOK_SECONDS = 5  # between looks for a step that is not copied yet
_RETRY_SECONDS = (10, 60, 300)  # between attempts while the run goes on; the last of them for all that follow
_LAST_RETRY_SECONDS = (1, 5, 20)  # between the attempts after its end
_SAY_SECONDS = 10  # between lines that say how far a copy is, when the run waits for it
_THREADS = 4  # that copy the files of a step


class Uploads:
    """The copies of one run. Use as a context manager around all that writes checkpoints: it waits for the last copy.

    It does not where the block ends with an error, or the run was told to stop, or in a process other than 0; the same
    command copies what is missing. For Orbax it is a policy as well, which keeps the step that is being copied.
    """

    def __init__(self, config: Config):
        """Raises ValueError where the URL is none that can be written to, or lacks a package or a login."""
        self._output, self._url = config.output, config.train.upload
        self._target = open_target(self._url) if self._url and jax.process_index() == 0 else None
        self._copied: set[int] = set()
        self._current: int | None = None  # the step that is being copied
        self._bytes = [0, 0]  # of that step, copied and in all
        self._reason = ""  # why the last attempt failed; empty: it did not
        self._ending = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._serve, name="uploads", daemon=True)

    def __enter__(self) -> "Uploads":
        if self._target is not None:
            self._thread.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: Any) -> None:
        self._ending.set()
        if self._target is not None:
            if failed is None and not self._is_stopped:
                self._wait_for_copies()
            if missing := self._list_missing():
                names = f"step{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                reason = f" ({self._reason})" if self._reason else ""
                notify(f"warning: {names} could not be copied to {self._url}{reason}; the same command tries again")
            elif failed is None:
                notify(f"all steps that are kept here are copied to {self._url}")
        if failed is None and self._url:
            hosts.wait_for_processes("uploads")

    def end_early(self) -> None:
        """Has the end of the run wait for no copy, as the run was told to stop, and may be killed soon."""
        self._is_stopped = True

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of these steps: Orbax's name of a policy."""
        return [checkpoint.step == self._current for checkpoint in checkpoints]

    def _wait_for_copies(self) -> None:
        while self._thread.is_alive():
            self._thread.join(_SAY_SECONDS)
            if self._thread.is_alive() and (step := self._current) is not None:
                copied, size = map(decimal, self._bytes)
                notify(f"copying step {step} to {self._url}: {copied} of {size}; Ctrl-C ends the run without it")

    def _serve(self) -> None:
        """Copies steps until the run has ended and none is missing, or the last attempts have failed."""
        failures, last_waits = 0, iter(_LAST_RETRY_SECONDS)
        while True:
            is_last = self._ending.is_set()
            step = next(iter(self._list_missing()), None)
            if step is not None and self._attempt(step):
                failures = 0
            elif not is_last:
                failures += step is not None
                waits = (_LOOK_SECONDS, *_RETRY_SECONDS)
                self._ending.wait(waits[min(failures, len(waits) - 1)])
            elif step is None or (seconds := next(last_waits, None)) is None:
                return
            else:
                time.sleep(seconds)

    def _list_missing(self) -> list[int]:
        """The steps here that have their checksums and have not been copied, the newest first."""
        folder = self._output / "checkpoints"
        here = [step for step in steps.list_steps(folder) if steps.has_checksums(folder / str(step))]
        return [step for step in reversed(here) if step not in self._copied]

    def _attempt(self, step: int) -> bool:
        """Copies a step unless it is there. Why that fails is said, if the attempt before it did not fail too."""
        assert self._target is not None
        folder = self._output / "checkpoints" / str(step)
        self._current = step
        try:
            if self._target.read(f"checkpoints/{step}/{CHECKSUMS}") != (folder / CHECKSUMS).read_bytes():
                files = self._list_files(folder)
                self._bytes = [0, sum(file.stat().st_size for file in files)]
                self._target.put({file.relative_to(self._output).as_posix(): file for file in files}, self._count_bytes)
        except Exception as error:  # each service has its own
            if not steps.has_checksums(folder):
                return True  # the step was deleted meanwhile, as newer ones are kept
            reason = (str(error) or repr(error)).splitlines()[0]
            if not self._reason:
                rest = "this is tried again, and training goes on"
                notify(f"step {step} could not be copied to {self._url} ({reason}); {rest}")
            self._reason = reason
            return False
        finally:
            self._current = None
        self._copied.add(step)
        if self._reason:
            notify(f"step {step} is copied to {self._url}")
        self._reason = ""
        return True

    def _list_files(self, step: Path) -> list[Path]:
        """The files that make a run of a step, and its own, the checksums last."""
        companions = [self._output / "config.txt", *sorted((self._output / "tokenizer").rglob("*"))]
        own = [step / name for name in list_files(step)]
        return [*(path for path in companions if path.is_file()), *own, step / CHECKSUMS]

    def _count_bytes(self, count: int) -> None:
        self._bytes[0] += count


class Target(Protocol):
    """What copies are written to; paths are those within the run."""

    def read(self, path: str) -> bytes | None:
        """A file's contents, or None where there is none."""
        ...

    def put(self, files: Mapping[str, Path], progress: Callable[[int], None]) -> None:
        """Copies these files, by path, and the last of them when the others are there."""
        ...


def open_target(url: str) -> Target:
    """What a URL names: on the Hub hf://ORG/NAME, else what fsspec knows; not a folder that must be there already.

    Raises ValueError where it cannot be written to.
    """
    if url.startswith("hf://"):
        return _open_hub(url)
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"train.upload is {url}, which needs a package more: {error}") from error
    except ValueError as error:
        raise ValueError(f"train.upload is {url!r}, which is no URL to write to ({error})") from error
    return _Bucket(system=system, root=root.rstrip("/"))


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """A folder of a file system of fsspec's."""

    system: Any
    root: str

    def read(self, path: str) -> bytes | None:
        self.system.invalidate_cache()  # of listings, which may be older than what is there
        with contextlib.suppress(FileNotFoundError):
            return self.system.cat_file(f"{self.root}/{path}")
        return None

    def put(self, files: Mapping[str, Path], progress: Callable[[int], None]) -> None:
        def copy(pair: tuple[str, Path]) -> None:
            path, file = f"{self.root}/{pair[0]}", pair[1]
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(file), path)
            progress(file.stat().st_size)

        *pairs, last = files.items()
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(copy, pairs))
        copy(last)


@dataclass(frozen=True, kw_only=True)
class _Hub:
    """A folder of a model's repository on Hugging Face's Hub."""

    repository: str
    root: str  # empty, or ends in a slash

    def read(self, path: str) -> bytes | None:
        from huggingface_hub import HfFileSystem

        system: Any = HfFileSystem(use_listings_cache=False)
        with contextlib.suppress(FileNotFoundError):
            return system.read_bytes(f"{self.repository}/{self.root}{path}")
        return None

    def put(self, files: Mapping[str, Path], progress: Callable[[int], None]) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        api.create_repo(self.repository, private=True, exist_ok=True)
        added = [CommitOperationAdd(self.root + path, str(file)) for path, file in files.items()]
        api.create_commit(self.repository, added, commit_message=f"Add {Path([*files][-1]).parent}")


def _open_hub(url: str) -> _Hub:
    from huggingface_hub import get_token

    owner, _, rest = url.removeprefix("hf://").strip("/").partition("/")
    name, _, root = rest.partition("/")
    if not owner or not name or owner in ("datasets", "spaces", "buckets"):
        raise ValueError(
            f"train.upload is {url}; a model's repository on the Hub is hf://ORG/NAME, a folder in it hf://ORG/NAME/FOLDER"
        )
    if get_token() is None:
        raise ValueError(f"train.upload is {url}, and nobody is logged in to the Hub: hf auth login, or set HF_TOKEN")
    return _Hub(repository=f"{owner}/{name}", root=f"{root}/" if root else "")
