"""Files of documents, on this machine or behind a URL: which there are under a name, and their bytes.

A URL is one that fsspec knows: gs://, s3://, https://, hf://. `formats` and `columnar` read what is in a file, `places`
decides which files are taken.
"""

import contextlib
import functools
import glob
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUFFER_BYTES = 1 << 20
_ASIDE = re.compile(  # files that are no documents, whatever they end with
    r"[._].*|__MACOSX|(README|LICEN[CS]E|CITATION|CHANGELOG)(\..*)?|.*\.md"
    r"|(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow|cards?\.json",
    re.IGNORECASE,
)
# Packages that fsspec needs for the URLs of a protocol.
_LIBRARIES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "http": "aiohttp requests", "https": "aiohttp requests",
}  # fmt: skip
# What file systems call the mark of a file's content, the surest first.
_MARKS = (
    "ETag",
    "etag",
    "sha256",
    "blob_id",
    "md5Hash",
    "generation",
    "Last-Modified",
    "LastModified",
    "mtime",
    "created",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file, as it is now."""

    path: str  # a path, or a URL
    below: str  # its path below the folder that was asked for, with slashes; "" where it was asked for itself
    size: int  # bytes; 0 where a server does not say
    mark: str  # changes when its content does


def is_url(path: str) -> bool:
    """Whether a name is a URL, and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def list_files(source: str) -> list[File]:
    """The files that a path, folder, glob or URL of such stands for, in the order of their paths; maybe none.

    Folders are searched to the bottom, less what is hidden or a README. Raises ValueError where a URL cannot be read.
    """
    if is_url(source):
        with explain_failure(source):
            return list(_list_remote(source))
    root = str(Path(source).expanduser())
    if os.path.isdir(root):
        return sorted(_search(root, root), key=lambda file: file.path)
    if (file := _stat(root, "")) is not None:
        return [file]
    found = {}
    base = _fixed_part(root)
    for path in glob.glob(root, recursive=True):
        for file in _search(path, base) if os.path.isdir(path) else [_stat(path, _below(path, base))]:
            if file is not None and not _is_aside(file.below):
                found[file.path] = file
    return [found[path] for path in sorted(found)]


def has_wildcard(source: str) -> bool:
    """Whether a source is a glob, and not the name of a file or folder."""
    if not is_url(source):
        return not Path(source).expanduser().exists() and glob.has_magic(source)
    return "*" in source or "[" in source or ("?" in source and not source.startswith("http"))


def wildcard_part(pattern: str) -> str:
    """What of a glob comes after its fixed folder."""
    return pattern.removeprefix(_fixed_part(pattern))


def _fixed_part(pattern: str) -> str:
    """The folder below which a glob's files are: what comes before its first wildcard."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] or ("/" if pattern.startswith("/") else "")


def _is_aside(below: str) -> bool:
    return any(_ASIDE.fullmatch(part) for part in below.split("/"))


def _search(folder: str, base: str) -> Iterator[File]:
    """The files below a folder, through links too, each folder once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _ASIDE.fullmatch(name))
        for path in (os.path.join(parent, name) for name in names if not _ASIDE.fullmatch(name)):
            if (file := _stat(path, _below(path, base))) is not None:
                yield file


def _below(path: str, base: str) -> str:
    return path.removeprefix(base).lstrip("/")


def _stat(path: str, below: str) -> File | None:
    """A file as it is now; None for what is none, such as a link to nowhere."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return File(path=path, below=below, size=status.st_size, mark=str(status.st_mtime_ns))


@functools.cache  # which saves requests, and a run must not see a folder change
def _list_remote(source: str) -> tuple[File, ...]:
    import fsspec

    protocol = source.partition("://")[0]
    if protocol not in fsspec.available_protocols():
        raise ValueError(f"{source}: fsspec knows no {protocol}://, but s3://, gs://, https://, hf:// and others")
    system, root = fsspec.core.url_to_fs(source)
    base, found = root, {}
    if has_wildcard(source):
        base = _fixed_part(root)
        matches = system.glob(root, detail=True)
        for path, info in matches.items():
            found |= system.find(path, detail=True) if info["type"] == "directory" else {path: info}
    else:
        try:
            info = system.info(root)
        except FileNotFoundError:
            if source.startswith("http"):
                raise
            info = {"type": "directory"}  # object stores have no folders, only files whose names begin alike
        if info["type"] == "directory" or root.endswith("/"):
            found = system.find(root, detail=True)
        else:
            return (_describe_remote(system.unstrip_protocol(root), "", info),)
    paths = sorted(path for path, info in found.items() if info["type"] == "file")
    if not all(path.startswith(base) for path in paths):  # hf:// writes the slashes of a revision otherwise
        base = os.path.commonpath([os.path.dirname(path) for path in paths])
    below = {path: _below(path, base) for path in paths}
    return tuple(
        _describe_remote(
            system.unstrip_protocol(path), name, found[path] if found[path].get("size") else system.info(path)
        )
        for path, name in below.items()
        if not _is_aside(name)
    )


def _describe_remote(url: str, below: str, info: dict) -> File:
    marks = [str(info[name]) for name in _MARKS if info.get(name)]
    return File(path=url, below=below.partition("?")[0], size=info.get("size") or 0, mark=next(iter(marks), ""))


def open_file(path: str) -> io.BufferedReader:
    """A file's bytes, read in parts. Raises OSError, or ValueError where a URL cannot be read."""
    if not is_url(path):
        return io.BufferedReader(io.FileIO(path), BUFFER_BYTES)
    import fsspec

    with explain_failure(path):
        system, name = fsspec.core.url_to_fs(path)
        return io.BufferedReader(system.open(name, "rb"), BUFFER_BYTES)


@contextlib.contextmanager
def explain_failure(path: str) -> Iterator[None]:
    """Raises ValueError for what file systems behind URLs raise, in a sentence that names the URL."""
    try:
        yield
    except ValueError:  # which is said already
        raise
    except ImportError as error:
        needed = _LIBRARIES.get(path.partition("://")[0])
        remedy = f"pip install {needed}" if needed else first_line(error)
        raise ValueError(f"{path} needs a library that is not installed: {remedy}") from error
    except FileNotFoundError as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"{path} was not found ({reason}); check its spelling, and that this machine reaches it"
        ) from error
    except PermissionError as error:
        raise ValueError(
            f"{path} may not be read ({first_line(error)}); give this machine credentials that may, as the command "
            "line tools aws and gcloud take them"
        ) from error
    except Exception as error:  # the libraries of clouds raise classes of their own
        raise ValueError(f"{path} could not be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error itself where it has none."""
    return next(line.strip() for line in [*str(error).splitlines(), repr(error)] if line.strip())
