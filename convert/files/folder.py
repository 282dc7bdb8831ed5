"""Folders that appear whole or not at all, and the small files that travel with weights.

This module does not know what the files of a checkpoint mean.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Files that transformers, PEFT or a server reads beside the weights and their config.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json")


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
    """A folder to write about `size` bytes into, which becomes `path` when the block ends without an error.

    Raises ValueError where `path` holds something already or the disk has no room, and OSError where it cannot be made.
    """
    # A sibling, so that the rename stays within one disk. A killed run leaves it behind, and the next run deletes it.
    partial = path.parent / f".{path.name}.partial"
    with explain_write_failure(path, "write somewhere else"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists already; delete it, or write somewhere else")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise ValueError(
                f"{path} needs {size / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB free; write to another "
                "disk"
            )
        partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def tokenizer_folder(*folders: Path) -> Path | None:
    """The first of these folders that holds a tokenizer."""
    return next((folder for folder in folders if any(file.is_file() for file in folder.glob("tokenizer*"))), None)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer, the chat template and the generation config that `source` has into `target`."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
