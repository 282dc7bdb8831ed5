"""Checksums of all files of a folder, in a file beside them, by which one flipped bit is found years later.

checksums.json holds the size and the SHA-256 of each file, and the SHA-256 of that list. SHA-256 is what sha256sum,
Hugging Face's Hub and object stores compute too, and hashlib has it at over 1 GB/s a thread, which is more than one
file is read at; files are hashed by several threads. This module does not know what the files mean.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "checksums.json"
PARTIAL = f"{CHECKSUMS}.partial"  # which a process leaves that is killed while it writes them
_THREADS = 4  # that hash files, each of which keeps about one core busy

Sums = dict[str, tuple[int, str]]  # size in bytes and SHA-256 in hexadecimal digits, by path within the folder


def list_files(folder: Path) -> list[str]:
    """The paths within the folder of all files but the checksums, in order."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if not name.startswith(CHECKSUMS))


def hash_files(folder: Path, names: Iterable[str], progress: Callable[[float], None] = lambda count: None) -> Sums:
    """The sizes and checksums of these files; `progress` is called with the bytes of each that is done.

    Raises OSError where one cannot be read.
    """

    def hash_file(name: str) -> tuple[int, str]:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            progress(size := file.tell())
            return size, digest.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(hash_file, names), strict=True))


def write_checksums(folder: Path, sums: Sums) -> None:
    """Writes the checksums into the folder, whole or not at all. Raises OSError where they cannot be written."""
    partial = folder / PARTIAL
    partial.write_text(json.dumps({"sha256": _hash_list(sums), "files": dict(sorted(sums.items()))}, indent=1))
    partial.replace(folder / CHECKSUMS)


def read_checksums(folder: Path) -> Sums | None:
    """The checksums in the folder, or None where it has none. Raises ValueError where they are damaged."""
    try:
        text = (folder / CHECKSUMS).read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{CHECKSUMS} is not as it was written") from error
    try:
        kept = json.loads(text)
        sums = {name: (int(size), str(digest)) for name, (size, digest) in kept["files"].items()}
        if _hash_list(sums) == kept["sha256"]:
            return sums
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # none of these says more than that it is not as it was written
    raise ValueError(f"{CHECKSUMS} is not as it was written")


def find_damage(folder: Path, sums: Sums, progress: Callable[[float], None] = lambda count: None) -> str:
    """What is wrong with the first file that is not as it was when these checksums were made; empty if none is.

    Raises OSError where a file cannot be read, and that does not show that it is damaged.
    """
    for name, (size, _) in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes, and {size:,} were written"
    try:
        hashed = hash_files(folder, sums, progress)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    return next((f"{name} is not as it was written" for name in sums if hashed[name] != sums[name]), "")


def _hash_list(sums: Sums) -> str:
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()
