"""Files of documents, on this machine or behind a URL: which there are under a name, and their bytes.

A URL is one that fsspec knows: gs://, s3://, https://, hf://. `formats` and `columnar` read what is in a file, `places`
decides which files are taken.
"""

import contextlib
import errno
import fnmatch
import functools
import glob
import io
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What there is under a name."""

    files: tuple[File, ...]  # in the order of their paths
    dead: tuple[str, ...] = ()  # links to nowhere


def is_url(path: str) -> bool:
    """Whether a name is a URL, and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def list_files(source: str) -> Listing:
    """The files that a path, folder, glob or URL of such stands for; maybe none.

    Folders are searched to the bottom, through links too, less what is hidden or a README. Raises ValueError where a
    URL cannot be read.
    """
    if is_url(source):
        with explain_failure(source):
            return Listing(files=_list_remote(source))
    root = str(Path(source).expanduser())
    if os.path.isdir(root):
        return _describe_files(_walk(root), root)
    if (file := _stat(root, "")) is not None:
        return Listing(files=(file,))
    if os.path.islink(root):
        return Listing(files=(), dead=(root,))
    matches = (_walk(path) if os.path.isdir(path) else [path] for path in _match_glob(root))
    return _describe_files(itertools.chain.from_iterable(matches), _fixed_part(root))


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


def has_match(pattern: str) -> bool:
    """Whether a glob of this machine has the name of any file or folder."""
    return glob.has_magic(pattern) and any(_match_glob(str(Path(pattern).expanduser())))


def _match_glob(pattern: str) -> Iterator[str]:
    """The paths that a glob names, less hidden ones. Python's own goes around through links to folders above them."""
    base = _fixed_part(pattern)
    return _match_parts(base, tuple(pattern.removeprefix(base).strip("/").split("/")), set())


def _match_parts(folder: str, parts: tuple[str, ...], seen: set[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    """The paths below a folder that match the parts of a glob. `seen` has each folder and what was matched there."""
    if not parts:
        yield folder
        return
    state = os.path.realpath(folder), parts
    if state in seen or not os.path.isdir(state[0]):
        return
    seen.add(state)
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        if os.path.lexists(path := os.path.join(folder, part)):
            yield from _match_parts(path, rest, seen)
        return
    is_deep = part == "**" and bool(rest)  # else it is as *, as folders are searched to the bottom
    if is_deep:
        yield from _match_parts(folder, rest, seen)
    with contextlib.suppress(PermissionError):
        names = sorted(name for name in os.listdir(state[0]) if not _ASIDE.fullmatch(name))
        for path in (os.path.join(folder, name) for name in fnmatch.filter(names, part)):
            yield from _match_parts(path, parts if is_deep else rest, seen)


def _walk(folder: str) -> Iterator[str]:
    """The paths of what is below a folder and no folder, through links too, each folder once.

    Raises OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _ASIDE.fullmatch(name))
        yield from (os.path.join(parent, name) for name in names)


def _describe_files(paths: Iterable[str], base: str) -> Listing:
    """The files of these paths, less those that are no documents; `base` is the folder that was asked for.

    Where links to folders give a file several paths, it has the shortest alone.
    """
    shortest: dict[tuple[str, str], str] = {}
    for path in sorted({*paths}, key=lambda path: (len(path), path)):
        shortest.setdefault(locate(path), path)
    found, dead = [], []
    for path in sorted(shortest.values()):
        if _is_aside(below := _below(path, base)):
            continue
        if (file := _stat(path, below)) is not None:
            found.append(file)
        elif os.path.islink(path):
            dead.append(path)
    return Listing(files=tuple(found), dead=tuple(dead))


def locate(path: str) -> tuple[str, str]:
    """The folder that a file is in, without links, and the file's name there, which may be a link."""
    folder, name = os.path.split(path)
    return _resolve(os.path.abspath(folder)), name


_resolve = functools.lru_cache(1024)(os.path.realpath)  # of the folder of thousands of files


def _below(path: str, base: str) -> str:
    return path.removeprefix(base).lstrip("/")


def _stat(path: str, below: str) -> File | None:
    """A file as it is now; None for what is none, such as a link to nowhere, or to itself."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
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
