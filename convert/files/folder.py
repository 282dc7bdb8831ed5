"""Folders and files that appear whole or not at all, and the small files that travel with weights.

This module does not know what the files of a checkpoint mean.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

# What transformers and servers read as one tokenizer. Each of its main files is one without the other.
TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_TOKENIZER += ("additional_chat_templates/*.jinja",)
_GENERATION = "generation_config.json"


def expand_path(path: str | Path) -> Path:
    """A path with the home of a user in place of ~. Raises ValueError for ~NAME where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be found: there is no user of that name; begin it with ./ or /") from error


@contextmanager
def explain_write_failure(folder: Path, remedy: str) -> Iterator[None]:
    """Turns the operating system's refusal to make or fill a folder into a sentence that ends with the remedy."""
    try:
        yield
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if os.path.isfile(path)), None)
        reason = f"{file} is a file" if file else f"{error.filename}: {error.strerror}"
        raise OSError(f"{folder} cannot be written to ({reason}); {remedy}") from error


@contextmanager
def atomic_folder(path: Path, size: int) -> Iterator[Path]:
    """As `atomic_path`, of a folder that is there when the block begins."""
    with atomic_path(path, size) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def atomic_path(path: Path, size: int) -> Iterator[Path]:
    """A path to write about `size` bytes to, which becomes `path` when the block ends without an error.

    Of a link it is what the link leads to that is written.

    Raises ValueError where `path` holds something already, the disk has no room or another process is writing to the
    same path, and OSError where nothing can be written there.
    """
    check_place(path)
    path = Path(os.path.realpath(path))
    with explain_write_failure(path, "write somewhere else"):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise ValueError(
                f"{path} needs {decimal(size)}, and {path.parent} has {decimal(free)} free; write to another disk"
            )
        # A sibling, so that the rename stays within one disk. A killed process leaves it behind.
        folder = path.parent / f".{path.name}.partial"
        lock = _claim_folder(folder, path)
    try:
        partial = folder / path.name
        yield partial
        _put_in_place(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_place(path: Path) -> None:
    """Raises ValueError unless a folder or a file can take this place, where nothing may be but an empty folder.

    Of a link it is the place that the link leads to. Raises OSError where nobody can look there.
    """
    path = Path(os.path.realpath(path))
    with explain_write_failure(path, "write somewhere else"):
        _refuse_occupied(path)


def _refuse_occupied(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{path} is a link that leads back to itself; delete it, or write somewhere else")
    if not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise ValueError(f"{path} exists already; delete it, or write somewhere else")
    if path.is_mount() or path.samefile("."):
        what = "where another disk is mounted" if path.is_mount() else "the current folder"
        raise ValueError(f"{path} is {what}, which no other folder can replace; write to {path / 'NAME'}")


def _put_in_place(partial: Path, path: Path) -> None:
    """Renames what was written. Raises OSError where something has taken its place meanwhile."""
    try:
        if path.is_file():  # a file would replace it
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        partial.rename(path)
    except OSError as error:
        raise OSError(
            f"{path} was written, and could not be put in its place ({error.strerror}): something else was made or "
            "deleted there meanwhile; see to it, and give the same command again"
        ) from error


def _claim_folder(folder: Path, path: Path) -> int:
    """Makes an empty folder and gives a lock on it, which ends with the process; deletes what a killed one left there.

    Raises ValueError where another process has it to write `path`.
    """
    busy = ValueError(f"another process is writing {path}; wait for it, or write somewhere else")
    if folder.is_symlink() or folder.is_file():
        raise ValueError(f"{folder}, where {path} would be written first, is no folder; delete it")
    if folder.exists():
        left = _lock_folder(folder, busy)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            reason = f"which a process that was killed has left, cannot be deleted ({error.strerror})"
            raise ValueError(f"{folder}, {reason}; delete it, or write somewhere else") from error
        finally:
            os.close(left)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise busy from error
    return _lock_folder(folder, busy)


def _lock_folder(folder: Path, busy: ValueError) -> int:
    """The descriptor of the folder, locked; `busy` is raised where another process has locked or replaced it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise busy from None
    try:
        _lock(descriptor)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    raise busy


def _lock(descriptor: int) -> None:
    """Locks a file or a folder. Raises BlockingIOError where another process has; some NFS has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def tokenizer_folder(folder: Path) -> Path | None:
    """This folder if it holds a tokenizer. Raises ValueError where something else has the name of one of its files."""
    files = [_is_file(folder / name) for name in (TOKENIZER_JSON, TOKENIZER_MODEL, "tokenizer_config.json")]
    return folder if any(files[:2]) else None


def _is_file(path: Path) -> bool:
    """Whether there is a file. Raises ValueError where there is something else, which is not passed over in silence."""
    if path.is_file() or not os.path.lexists(path):
        return path.is_file()
    what = "a link to nothing" if not path.exists() else "a folder" if path.is_dir() else "no file"
    raise ValueError(f"{path} is {what}; copy the file there, or delete that")


def has_model_only(folder: Path) -> bool:
    """Whether a folder's tokenizer is SentencePiece's model, without the file that is made of it."""
    return (folder / TOKENIZER_MODEL).is_file() and not (folder / TOKENIZER_JSON).is_file()


def generation_file(folder: Path) -> Path | None:
    """The defaults of generation that this folder holds."""
    return folder / _GENERATION if _is_file(folder / _GENERATION) else None


def copy_companions(tokenizer: Path | None, generation: Path | None, target: Path) -> None:
    """Copies the tokenizer of a folder, with its chat templates, and defaults of generation, byte for byte.

    All files of the tokenizer are from the one folder: those of two tokenizers would contradict each other.
    """
    if tokenizer:
        for file in (file for pattern in _TOKENIZER for file in tokenizer.glob(pattern) if file.is_file()):
            copy = target / file.relative_to(tokenizer)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    if generation:
        shutil.copyfile(generation, target / _GENERATION)
