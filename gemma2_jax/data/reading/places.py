"""Where the documents of a source lie: which files are trained on or held out, and how they are cut into pieces.

A source is a file, a folder, a glob, a URL of such, or a data set of the Hub. `files` and `hub` list what there is;
`formats` and `columnar` read it. Pieces are independent, so that several processes can read a source.
"""

import difflib
import glob
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from urllib.parse import urlsplit

from gemma2_jax.config import DataConfig
from gemma2_jax.data.reading import columnar, files, formats, hub, splits
from gemma2_jax.data.reading.files import File
from gemma2_jax.data.wording import describe_count

Record = tuple[str, object, str]  # where it is, the record or the BadRecord that it is, and its name
_TABLE_ENDINGS = {".parquet": "Parquet", ".arrow": "Arrow"}
_ENDINGS = (*formats.TEXT_ENDINGS, *_TABLE_ENDINGS)
_SPLIT_ORDER = (splits.HELD_OUT, "test", "train", "")  # of what is held out from a source of held-out data
_LISTED = 5  # names of files that a message lists, at most
_COUNTED_BYTES = 1 << 22  # of a file, in which lines are counted at one time


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A file of documents."""

    path: str  # a path, or a URL
    size: int  # bytes
    mark: str  # changes when the content does
    label: str  # what messages call it

    @property
    def ending(self) -> str:
        """What its name ends with, which says its format, without that of a compression."""
        return split_ending(self.path)[0]

    @property
    def compression(self) -> str:
        """What its name ends with where it is compressed: .gz or .zst."""
        return split_ending(self.path)[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part(Place):
    """A run of the documents of a file."""

    start: int = 0  # the byte, row group or record batch that it begins with
    stop: int | None = None  # that which it ends before; None: the file's end
    number: int = 1  # of its first line or row

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its file."""
        return self.start == 0 and self.stop is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one process reads at a time: a part of a large file, or several small files."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is taken of a source."""

    places: tuple[Place, ...]
    notes: tuple[str, ...]  # sentences on what of the source is not taken


def split_ending(path: str) -> tuple[str, str]:
    """What a name ends with: its format's ending, and its compression's or ""."""
    name = os.path.basename(urlsplit(path).path if files.is_url(path) else path).lower()
    rest, ending = os.path.splitext(name)
    return (os.path.splitext(rest)[1], ending) if ending in formats.COMPRESSIONS else (ending, "")


def choose_training(data: DataConfig) -> tuple[Choice, Choice]:
    """What is trained on of `data.train`, and what is held out by its splits. Raises ValueError if there is nothing."""
    source, asked = data.train, splits.name_split(data.split)
    found, notes = _search(source, data)
    unnamed = found.get("", []) if asked == "train" else []
    chosen = sorted([*found.get(asked, []), *unnamed], key=lambda place: place.path)
    others = {name: found[name] for name in sorted(found) if name not in (asked, "")}
    if not chosen:
        near = [name for name in others if name.startswith(asked)] or [*others]
        remedy = f"--data.split {shlex.quote(near[0])}" if len(near) == 1 else "give one of them as --data.split"
        has = f"it has {', '.join(others)}: {remedy}" if others else "no name there tells one"
        raise ValueError(f"{source} has no split {data.split!r}; {has}")
    held_out = others.pop(splits.HELD_OUT, []) if not data.eval and data.eval_fraction else []
    notes += tuple(
        f"{source}: its split {name} ({_name_places(places)}) is left out; "
        f"--data.split {shlex.quote(name)} trains on it"
        for name, places in others.items()
    )
    described = f"the split {splits.HELD_OUT} of {source} is held out ({_name_places(held_out)})" if held_out else ""
    return (
        Choice(places=tuple(chosen), notes=notes),
        Choice(places=tuple(held_out), notes=(described,) if described else ()),
    )


def choose_held_out(data: DataConfig) -> Choice:
    """What is held out of `data.eval`: its validation split, else that for tests, else all of it."""
    found, notes = _search(data.eval, data)
    name = next((name for name in _SPLIT_ORDER if name in found), next(iter(found)))
    if others := [split for split in found if split != name]:
        left = ", ".join(split or "files of no split" for split in others)
        notes += (f"{data.eval}: its split {name} ({_name_places(found[name])}) is held out, and {left} is left out",)
    return Choice(places=tuple(found[name]), notes=notes)


def _name_places(places: Sequence[Place]) -> str:
    return places[0].label if len(places) == 1 else f"{len(places):,} files, such as {places[0].label}"


def _search(source: str, data: DataConfig) -> tuple[dict[str, list[Place]], tuple[str, ...]]:
    """The places of a source by their split, "" where no name tells it; and what is to be said of others."""
    if is_hub_data_set(source):
        return _search_hub(source, data), ()
    if data.subset:
        folder = os.path.join(source, data.subset)
        remedy = f"its folder is a source: {folder}" if os.path.isdir(folder) else "leave it out"
        raise ValueError(f"data.subset {data.subset!r} is of a data set of the Hub, and {source} is none; {remedy}")
    listing = files.list_files(source)
    found = listing.files
    is_glob = files.has_wildcard(source)
    is_folder = not is_glob and not (found and found[0].below == "")
    taken = [file for file in found if split_ending(file.path)[0] in _ENDINGS]
    passed = [file for file in found if split_ending(file.path)[0] not in _ENDINGS]
    known = f"{', '.join(_ENDINGS)}, and text also with {' or '.join(formats.COMPRESSIONS)}"
    hint = "; the URL of a folder ends with /" if files.is_url(source) else ""
    indexed = sorted(_name_indexed(file.path) for file in passed if file.path.endswith(".idx"))
    if indexed and not taken:
        raise ValueError(
            f"{source} holds .bin and .idx files, which are given by what both names have in common: --data.train "
            f"{shlex.quote(indexed[0])}; it has {', '.join(map(os.path.basename, indexed[:_LISTED]))}"
        )
    if passed and not (is_folder and taken):
        if split_ending(passed[0].path)[0] in formats.COMPRESSIONS:
            name, command = formats.COMPRESSIONS[split_ending(passed[0].path)[1]]
            path = shlex.quote(passed[0].path)
            raise ValueError(f"{passed[0].path} is compressed twice; unpack it once, of {name}: {command} {path}")
        raise ValueError(f"{passed[0].path} is none of the formats that are read ({known}); convert or rename it{hint}")
    if not taken:
        raise ValueError(_explain_absence(source, is_glob, known, listing.dead))
    _check_packing(taken)
    if is_folder:
        taken, more = _pass_over(source, taken)
        passed += more
    # Who names a split in a glob has chosen.
    asked = splits.name_split(data.split)
    is_chosen = not is_folder and (not is_glob or splits.has_split(files.wildcard_part(source)))
    by_split: dict[str, list[Place]] = {}
    is_dictionary = os.path.exists(os.path.join(source, "dataset_dict.json"))  # of datasets: a folder is a split
    for file in taken:
        split = asked if is_chosen else splits.find_split(file.below, data.split)
        if is_dictionary:
            split = splits.name_split(file.below.partition("/")[0])
        by_split.setdefault(split, []).append(_make_place(file))
    notes = (f"{source}: {_count_files(passed)} passed over, such as {passed[0].path}",) if passed else ()
    if listing.dead:
        count = describe_count(len(listing.dead), "link")
        notes += (f"{source}: {count} to nowhere passed over, such as {listing.dead[0]}",)
    for split, places in by_split.items():
        by_split[split], said = _read_once(source, places)
        notes += said
    if subsets := _find_subsets(taken) if is_folder and not is_dictionary else []:
        notes += (
            f"{source}: its folders {', '.join(subsets)} have splits of their own and are read together; "
            f"{os.path.join(source, subsets[0])} is one alone",
        )
    return by_split, notes


def _find_subsets(found: Sequence[File]) -> list[str]:
    """The folders of a folder, of which each has files whose names tell a split; none where it is one folder alone."""
    folders = {
        folder
        for folder, slash, rest in (file.below.partition("/") for file in found)
        if slash and splits.has_split(rest)
    }
    folders -= {folder for folder in folders if splits.has_split(folder)}
    return sorted(folders) if len(folders) > 1 else []


def _name_indexed(path: str) -> str:
    """What the names of Megatron's two files have in common, given that of the index."""
    return path.removesuffix(".idx")


def _check_packing(found: Sequence[File]) -> None:
    """Raises ValueError for a file that is compressed, and whose format is read only where it is not."""
    for file in found:
        ending, compression = split_ending(file.path)
        if compression and ending in _TABLE_ENDINGS:
            name, command = formats.COMPRESSIONS[compression]
            raise ValueError(
                f"{file.path} is compressed by {name}, and {_TABLE_ENDINGS[ending]} is read only where it is not; "
                f"unpack it: {command} {shlex.quote(file.path)}"
            )


def _read_once(source: str, found: list[Place]) -> tuple[list[Place], tuple[str, ...]]:
    """The places less those that are another by a link, and a sentence on these."""
    kept: dict[str, Place] = {}
    repeated: list[tuple[Place, Place]] = []
    for place in sorted(found, key=lambda place: (os.path.islink(place.path), place.path)):
        if (same := kept.setdefault(identify(place), place)) is not place:
            repeated.append((place, same))
    if not repeated:
        return found, ()
    link, same = repeated[0]
    more = f" ({describe_count(len(repeated), 'such name')})" if len(repeated) > 1 else ""
    note = f"{source}: {link.path} is {same.path} by another name{more}, and is read once"
    left_out = {place.path for place, _ in repeated}
    return [place for place in found if place.path not in left_out], (note,)


def identify(place: Place) -> str:
    """What is the same for all names of a file: its path without links. A URL is itself."""
    if files.is_url(place.path):
        return place.path
    return os.path.realpath(place.path) if os.path.islink(place.path) else os.path.join(*files.locate(place.path))


def _explain_absence(source: str, is_glob: bool, known: str, dead: Sequence[str]) -> str:
    """Why nothing is found under a name, and what could be given."""
    if dead:
        target = os.readlink(dead[0])
        return f"no data at {source!r}: {dead[0]} is a link to {target}, which leads nowhere; mend it, or copy the file"
    if is_glob:
        weight = re.match(r"[\d.]+(?=\*)", source)
        hint = f"; if {weight[0]} is a weight, leave it out, as there is no other source" if weight else ""
        return (
            f"no data at {source!r}: no file has a name like that; put the glob in quotes, and check its folder{hint}"
        )
    if os.path.isdir(os.path.expanduser(source)):
        return f"no data at {source!r}: the folder has no file of a format that is read ({known})"
    folder = os.path.dirname(source)
    beside = sorted(_name_indexed(path) for path in glob.glob(os.path.join(glob.escape(folder), "*.idx")))
    near = difflib.get_close_matches(source, beside, n=1)
    hint = f"; did you mean the .bin and .idx files {near[0]}? Give" if near else "; give"
    return (
        f"no data at {source!r}: there is no such file or folder{hint} 'python-docs', a file ({known}), what the names "
        "of a .bin and an .idx file have in common, a folder or a glob of files, a URL, or a data set of the Hub, such "
        "as tatsu-lab/alpaca"
    )


def is_hub_data_set(source: str) -> bool:
    """Whether a source is a data set of the Hub, which is downloaded as a whole."""
    return hub.is_hub_name(source) and split_ending(source)[0] not in _ENDINGS and not os.path.lexists(source)


def _search_hub(name: str, data: DataConfig) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for split, cached in hub.find_splits(name, data.subset).items():
        labels = [f"{name} {split}" if len(cached) == 1 else f"{name} {split} {file.below}" for file in cached]
        places = [_make_place(file, label) for file, label in zip(cached, labels, strict=True)]
        found.setdefault(splits.name_split(split), []).extend(places)
    return found


def _make_place(file: File, label: str = "") -> Place:
    return Place(path=file.path, size=file.size, mark=file.mark, label=label or file.path)


def _pass_over(source: str, found: Sequence[File]) -> tuple[list[File], list[File]]:
    """Of a folder's files, those that are documents; and those that are not, such as notes beside them."""
    taken = [*found]
    if any(split_ending(file.path)[0] != ".txt" for file in found):
        taken = [file for file in found if split_ending(file.path)[0] != ".txt"]
    listed = {}  # of folders that datasets has written: which of their files belong to the data set
    if not files.is_url(source):
        for folder in {os.path.dirname(file.path) for file in taken if split_ending(file.path)[0] == ".arrow"}:
            listed |= _read_state(folder)
    taken = [file for file in taken if file.path not in listed or listed[file.path]]
    paths = {file.path for file in taken}
    return taken, [file for file in found if file.path not in paths]


def _read_state(folder: str) -> dict[str, bool]:
    """Of the Arrow files in a folder of save_to_disk, whether they belong to the data set, as its state.json says.

    A data set that was saved there before leaves files of its own. Raises ValueError where one is missing.
    """
    state = Path(folder, "state.json")
    if not state.exists():
        return {}
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state} is damaged ({error!r}); save the data set again") from error
    present = {path.name: str(path) for path in Path(folder).glob("*.arrow")}
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"{folder} lacks {missing[0]}, which its state.json names; copy or save the data set again")
    return {path: name in names for name, path in present.items()}


def _count_files(found: Sequence[File]) -> str:
    return f"{len(found):,} file{' is' if len(found) == 1 else 's are'}"


def fingerprint(place: Place) -> tuple[str, int, str]:
    """What is another when the content of a place is another: its name, its size and its mark."""
    if files.is_url(place.path) or place.label != place.path:
        return place.label, place.size, place.mark
    return os.path.join(*files.locate(place.path)), place.size, place.mark


def list_pieces(places: Sequence[Place], piece_bytes: int) -> list[Piece]:
    """The documents of these places in pieces of about so many bytes, in a fixed order.

    Local files of lines are cut at the ends of lines, Parquet at row groups, Arrow at record batches; other files are
    not cut. Small files share a piece. Raises ValueError where a file that is to be cut is damaged.
    """
    pieces: list[Piece] = []
    parts: list[Part] = []
    size = 0
    for place in places:
        for part in _cut(place, piece_bytes):
            if parts and size + part.size > piece_bytes:
                pieces.append(Piece(parts=tuple(parts)))
                parts, size = [], 0
            parts.append(part)
            size += part.size
    return [*pieces, Piece(parts=tuple(parts))] if parts else pieces


def _cut(place: Place, piece_bytes: int) -> Iterator[Part]:
    whole = Part(path=place.path, size=place.size, mark=place.mark, label=place.label)
    if place.size <= piece_bytes or place.compression:
        yield whole
    elif place.ending in _TABLE_ENDINGS:
        yield from _cut_groups(whole, piece_bytes)
    elif place.ending in formats.LINE_ENDINGS and not files.is_url(place.path):
        yield from _cut_lines(whole, piece_bytes)
    else:
        yield whole


def _cut_groups(whole: Part, piece_bytes: int) -> Iterator[Part]:
    groups = columnar.list_groups(whole)
    start, number, rows, size = 0, 1, 0, 0
    for stop, group in enumerate(groups, start=1):
        rows, size = rows + group.rows, size + group.size
        if size >= piece_bytes or stop == len(groups):
            yield replace(whole, start=start, stop=stop, number=number, size=size)
            start, number, rows, size = stop, number + rows, 0, 0
    if not groups:
        yield whole


def _cut_lines(whole: Part, piece_bytes: int) -> Iterator[Part]:
    with open(whole.path, "rb") as file:
        if formats.find_layout(file, whole) != "lines":
            yield whole
            return
        start, number = 0, 1
        while start + piece_bytes < whole.size and (stop := _find_line_end(file, start + piece_bytes)) < whole.size:
            yield replace(whole, start=start, stop=stop, number=number, size=stop - start)
            start, number = stop, number + _count_lines(file, start, stop)
        yield replace(whole, start=start, number=number, size=whole.size - start)


def _find_line_end(file: BufferedReader, position: int) -> int:
    """Where the first line ends that ends after a position and is not blank; blank ones are told of with the next."""
    file.seek(position)
    has_text = False
    while chunk := file.readline(files.BUFFER_BYTES):
        has_text = has_text or not chunk.isspace()
        if has_text and chunk.endswith(b"\n"):
            break
    return file.tell()


def _count_lines(file: BufferedReader, start: int, stop: int) -> int:
    file.seek(start)
    sizes = [min(_COUNTED_BYTES, stop - position) for position in range(start, stop, _COUNTED_BYTES)]
    return sum(file.read(size).count(b"\n") for size in sizes)


def read_piece(piece: Piece) -> Iterator[Record]:
    """The records of a piece, read lazily: where each is, the record or a BadRecord, and its name.

    Raises ValueError for a file that is empty, damaged, or not what its name says, and OSError where it cannot be read.
    """
    for part in piece.parts:
        where = ""
        for where, record in _read_part(part):
            yield where, record, ""
        if not where and part.is_whole:
            raise ValueError(f"{part.label} is empty; remove it, or write one document per line or row")


def _read_part(part: Part) -> formats.Located:
    read = columnar.read_rows if part.ending in _TABLE_ENDINGS else formats.read_text_file
    if not files.is_url(part.path):
        yield from read(part)
        return
    with files.explain_failure(part.path):
        yield from read(part)
