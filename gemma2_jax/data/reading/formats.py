"""Records of text files, read one by one in bounded memory: JSON lines or an array, CSV and TSV, plain text.

Each may be compressed by gzip or Zstandard. People rename files, so which JSON it is is found in its first bytes.
`columnar` reads Parquet and Arrow. A reader yields where a record is, and the record or what is wrong with it.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemma2_jax.data.reading.files import BUFFER_BYTES, open_file
from gemma2_jax.data.records import SHAPES, BadRecord
from gemma2_jax.data.wording import describe_count, is_short, quote, shorten

if TYPE_CHECKING:
    from gemma2_jax.data.reading.places import Part

Located = Iterator[tuple[str, object]]  # where a record is, and the record or a BadRecord
MAX_BYTES = 1 << 28  # of one record
_HEAD_BYTES = 1 << 16
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_QUOTED = re.compile(rb'"(?:[^"]|"")*"')  # a text of a table
_PLAIN_KEY = re.compile("[A-Za-z_][A-Za-z0-9_]*")  # of a JSON object, which jq takes without quotes
_SIZE = f"longer than {MAX_BYTES >> 20} MiB, the most that a document may be"
_ENCODINGS = (  # byte order marks, and how text without them begins
    (rb"\xff\xfe\x00\x00|[^\x00]\x00\x00\x00", "UTF-32LE"),
    (rb"\x00\x00\xfe\xff|\x00\x00\x00[^\x00]", "UTF-32BE"),
    (rb"\xff\xfe|[^\x00]\x00[^\x00]\x00", "UTF-16LE"),
    (rb"\xfe\xff|\x00[^\x00]\x00[^\x00]", "UTF-16BE"),
)
_UNPACKERS = {"": "cat", ".gz": "gzip -dc", ".zst": "zstd -dc"}  # commands
_COMPRESSED = {  # how compressed files begin, by the ending of their names
    ".gz": ("compressed by gzip", re.compile(rb"\x1f\x8b")),
    ".zst": ("compressed by Zstandard", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
}
_FOREIGN = (  # how files of other formats begin
    (b"PAR1\x15", "Parquet", ".parquet"),
    (b"ARROW1\x00", "Arrow", ".arrow"),
    (b"PK\x03\x04", "a ZIP archive or an Excel sheet", ""),
    (b"SQLite format 3", "an SQLite database", ""),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", ""),
)


def read_text_file(part: "Part") -> Located:
    """The records of a part of a text file. Raises ValueError where its file is damaged, or of another encoding."""
    try:
        with open_file(part.path) as file, _decompress(file, part) as stream:
            yield from _READERS[part.ending](_skip_mark(stream, part) if part.start == 0 else stream, part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(_describe_damage(part, error)) from error
    except OSError as error:
        if part.compression and error.errno is None:  # pyarrow's for damaged Zstandard
            raise ValueError(_describe_damage(part, error)) from error
        raise


def _describe_damage(part: "Part", error: Exception) -> str:
    return f"{part.label} is damaged or cut short ({error}); copy it again, or compress its documents again"


def _decompress(file: io.BufferedReader, part: "Part") -> io.BufferedReader:
    _check_compression(file, part)
    if part.compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), BUFFER_BYTES)
    if part.compression == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise ValueError(f"{part.label} needs pyarrow: pip install 'gemma2-jax[parquet]'") from error
        compressed = pyarrow.PythonFile(file, mode="r")
        return io.BufferedReader(pyarrow.CompressedInputStream(compressed, "zstd"), BUFFER_BYTES)
    return file


def _check_compression(file: io.BufferedReader, part: "Part") -> None:
    """Raises ValueError where a file is not compressed as its name says."""
    head = file.peek(_HEAD_BYTES) if part.start == 0 else b""
    found = next((ending for ending, (_, begins) in _COMPRESSED.items() if begins.match(head)), "")
    if not head or found == part.compression:
        return
    _check_format(head, part)
    named = f"named as if {_COMPRESSED[part.compression][0]}, and is " if part.compression else ""
    found_name = _COMPRESSED[found][0] if found else "not compressed"
    remedy = f"name it so that it ends with {found}" if found else f"take {part.compression} off its name"
    raise ValueError(f"{part.label} is {named}{found_name}; {remedy}")


def _check_format(head: bytes, part: "Part") -> None:
    """Raises ValueError for the beginning of a file of another format."""
    for beginning, name, ending in _FOREIGN:
        if head.startswith(beginning):
            remedy = f"name it so that it ends with {ending}" if ending else "give what it was made from"
            raise ValueError(f"{part.label} is {name}; {remedy}")


def _skip_mark(stream: io.BufferedReader, part: "Part") -> io.BufferedReader:
    """The stream after a byte order mark of UTF-8. Raises ValueError for other encodings, and for other formats."""
    head = stream.peek(_HEAD_BYTES)
    for again, (name, begins) in _COMPRESSED.items():
        if begins.match(head):
            path = shlex.quote(part.path)
            raise ValueError(
                f"{part.label} is compressed twice: what it holds is {name} again; unpack it once: "
                f"{_UNPACKERS[part.compression]} {path} > unpacked{part.ending}{again}"
            )
    _check_format(head, part)
    for pattern, encoding in _ENCODINGS:
        if re.match(pattern, head, re.DOTALL):
            raise ValueError(
                f"{part.label} is {encoding}, and documents are read as UTF-8: {_UNPACKERS[part.compression]} "
                f"{shlex.quote(part.path)} | iconv -f {encoding} -t UTF-8 > utf8{part.ending}"
            )
    if head.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
    return stream


def _read_json(stream: io.BufferedReader, part: "Part") -> Located:
    read = {"array": _read_array, "values": _read_values, "lines": _read_lines}[find_layout(stream, part)]
    located = read(stream, part)
    if part.ending != ".json":
        yield from located
        return
    first = list(itertools.islice(located, 2))
    if len(first) == 1 and isinstance(first[0][1], dict):
        _check_single(first[0][1], part)
    yield from itertools.chain(first, located)


def _check_single(value: dict, part: "Part") -> None:
    """Raises ValueError where the only value of a file is an object that holds the documents, and not one itself."""
    if any(value.keys() >= set(shape.columns) for shape in SHAPES):
        return
    for key, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            name = json.dumps(key, ensure_ascii=False) if is_short(key) else '"KEY"'
            query = f".{key}[]" if _PLAIN_KEY.fullmatch(key) and is_short(key) else f".[{name}][]"
            count = describe_count(len(inner), "other")
            raise ValueError(
                f"{part.label} is one object, of which {quote(key)} is a list of {count}; if those are the documents, "
                f"write them as lines: {_write_query(query, part)}"
            )


def _write_query(query: str, part: "Part") -> str:
    """The command that writes what a jq query finds in a file as lines."""
    path = shlex.quote(part.path)
    command = f"{_UNPACKERS[part.compression]} {path} | jq -c" if part.compression else "jq -c"
    return f"{command} {shlex.quote(query)}{'' if part.compression else ' ' + path} > documents.jsonl"


def find_layout(stream: io.BufferedReader, part: "Part") -> str:
    """Whether JSON is an array, values that may each take many lines, or values one to a line; without reading it."""
    if part.start:
        return "lines"
    head = stream.peek(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        return "array"
    line, newline, _ = head.partition(b"\n")
    if newline and head.startswith(b"{") and (line.strip() == b"{" or (part.ending == ".json" and not _is_json(line))):
        return "values"
    return "lines"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_lines(stream: io.BufferedReader, part: "Part") -> Located:
    blank = 0  # the first of the blank lines above, which are nothing at the end of a file
    if part.start:
        stream.seek(part.start)
    number, position = part.number - 1, stream.tell() if part.stop else 0
    while (part.stop is None or position < part.stop) and (line := stream.readline(MAX_BYTES)):
        number, position = number + 1, position + len(line)
        if line.isspace():
            blank = blank or number
            continue
        if blank:
            where = f"{part.label}:{blank}"
            yield where, BadRecord(where, "blank line", "the line is blank; remove it")
            blank = 0
        where = f"{part.label}:{number}"
        if len(line) == MAX_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            yield where, BadRecord(where, "too long", f"the line is {_SIZE}; each line holds one JSON object")
            continue
        try:
            yield where, json.loads(line.decode("utf-8-sig"))  # of bytes, json would guess another encoding
        except UnicodeDecodeError:
            yield where, _refuse_bytes(where)
        except (ValueError, RecursionError) as error:  # malformed JSON
            yield (
                where,
                BadRecord(where, "not JSON", f"not JSON ({shorten(str(error))}); each line holds one JSON object"),
            )


def _skip_line(stream: io.BufferedReader) -> int:
    """Reads to the end of a line; how many bytes that was."""
    skipped = 0
    while line := stream.readline(BUFFER_BYTES):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _read_values(stream: io.BufferedReader, part: "Part") -> Located:
    """JSON values one after another, each over as many lines as it takes."""
    with _decode(stream) as text:
        scanner = _Scanner(text, part)
        while scanner.skip_space():
            yield scanner.read_value()


def _read_array(stream: io.BufferedReader, part: "Part") -> Located:
    """The values of one JSON array."""
    with _decode(stream) as text:
        scanner = _Scanner(text, part)
        scanner.skip_space()
        scanner.take("[", "an array")
        if scanner.skip_space() != "]":
            yield scanner.read_value()
            while scanner.skip_space() != "]":
                scanner.take(",", "a comma, or the end of the array,")
                if scanner.skip_space() == "]":
                    scanner.refuse("a comma comes before the end of the array")
                yield scanner.read_value()
        scanner.take("]", "the end of the array")
        if scanner.skip_space():
            scanner.refuse("more follows the end of the array")


@contextlib.contextmanager
def _decode(stream: io.BufferedReader) -> Iterator[io.TextIOWrapper]:
    """The stream as text. Bytes that are not UTF-8 become halves of surrogate pairs, which are looked for later."""
    text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="")
    try:
        yield text
    finally:
        text.detach()  # who opened the stream closes it


class _Scanner:
    """Takes JSON values from text that is read in parts, of which the part that is not yet taken is kept."""

    _SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, text: io.TextIOWrapper, part: "Part") -> None:
        self._text, self._part, self._decode = text, part, json.JSONDecoder().raw_decode
        self._buffer, self._position, self._line, self._ended = "", 0, 1, False

    def _read_more(self) -> None:
        """Makes the buffer longer, by as much as it has, so that long values are not decoded too often."""
        rest = self._buffer[self._position :]
        if len(rest) > MAX_BYTES:
            self.refuse(f"the value is {_SIZE}; write one document to a line: {_write_query('.[]', self._part)}")
        more = self._text.read(max(BUFFER_BYTES, len(rest)))
        self._buffer, self._position, self._ended = rest + more, 0, not more

    def _advance(self, position: int) -> None:
        self._line += self._buffer.count("\n", self._position, position)
        self._position = position

    def skip_space(self) -> str:
        """The next character that is not space, which is not taken; "" at the end."""
        while True:
            match = self._SPACE.match(self._buffer, self._position)
            assert match is not None
            self._advance(match.end())
            if self._position < len(self._buffer) or self._ended:
                return self._buffer[self._position : self._position + 1]
            self._read_more()

    def take(self, character: str, name: str) -> None:
        """Takes a character that has to come next."""
        if (found := self._buffer[self._position : self._position + 1]) != character:
            self.refuse(f"{name} was to come, and {found!r} came" if found else f"the file ends before {name}")
        self._position += 1

    def read_value(self) -> tuple[str, object]:
        """Takes the next value; where it begins, and the value."""
        where = f"{self._part.label}:{self._line}"
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # A value whose end has not been read looks malformed at the buffer's end, or in an open string.
                is_open = error.msg.startswith("Unterminated string")
                is_near = error.pos >= len(self._buffer) - len("-Infinity")
                if self._ended or not (is_near or is_open):
                    at_end = is_open or error.pos >= len(self._buffer)
                    self._advance(min(error.pos, len(self._buffer)))
                    self.refuse("the file ends within a value" if at_end else error.msg)
            except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
                self.refuse(str(error))
            else:
                if end + len("e+") < len(self._buffer) or self._ended:  # what 1 is of 1e+9
                    text = self._buffer[self._position : end]
                    self._advance(end)
                    return where, value if _is_unicode(text) else _refuse_bytes(where)
            self._read_more()

    def refuse(self, reason: str) -> None:
        """Raises ValueError: nothing after this place can be read."""
        raise ValueError(
            f"{self._part.label}:{self._line}: not JSON ({reason}), and nothing after it can be told apart; mend the "
            "file"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_bytes(where: str) -> BadRecord:
    return BadRecord(
        where, "not UTF-8", "has bytes that are not UTF-8; convert the file, as iconv -f WINDOWS-1252 -t UTF-8 does"
    )


def _read_table(stream: io.BufferedReader, part: "Part") -> Located:
    """The rows of a file whose first line names the columns, separated by commas, tabs or semicolons."""
    csv.field_size_limit(MAX_BYTES)
    head = stream.peek(_HEAD_BYTES).lstrip(b"\xef\xbb\xbf")
    first = _QUOTED.sub(b"", head).lstrip(b"\r\n").partition(b"\n")[0]
    usual = b"\t" if part.ending == ".tsv" else b","
    separator = max((usual, *map(str.encode, _SEPARATORS)), key=first.count).decode()
    with _decode(stream) as text:
        rows = csv.reader(_take_lines(text, part), delimiter=separator, strict=True)
        yield from _read_rows(rows, part, _SEPARATORS[separator])


def _take_lines(text: io.TextIOWrapper, part: "Part") -> Iterator[str]:
    """The lines of a table. Raises ValueError for one that is longer than any document may be."""
    while line := text.readline(MAX_BYTES):
        if len(line) == MAX_BYTES:
            raise ValueError(f"{part.label} has a line that is {_SIZE}; mend the file")
        yield line


def _read_rows(rows: Any, part: "Part", separators: str) -> Located:
    """The rows of a table, less its header. `separators` is what its columns are separated by."""
    blank = 0
    header: list[str] = []
    while True:
        line = rows.line_num + 1
        where = f"{part.label}:{line}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ValueError(f"{where}: a quote in this row is not closed before the end of the file") from error
            sentence = f"not CSV ({error}); a quote within quotes is written twice"
            if not header:
                raise ValueError(f"{where}: the line that names the columns is {sentence}") from error
            yield where, BadRecord(where, "not CSV", sentence)
            continue
        if not row:
            blank = blank or line
            continue
        if not header:
            header = _check_header(row, part)
            continue
        if blank:
            yield (
                f"{part.label}:{blank}",
                BadRecord(f"{part.label}:{blank}", "blank line", "the line is blank; remove it"),
            )
            blank = 0
        yield where, _make_row(row, header, where, separators)


def _check_header(header: list[str], part: "Part") -> list[str]:
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{part.label} has two columns {quote(twice[0])}; its first line must name each column once")
    if not all(map(_is_unicode, header)):
        raise ValueError(str(_refuse_bytes(part.label)))
    return header


def _make_row(row: list[str], header: list[str], where: str, separators: str) -> object:
    if len(row) != len(header):
        counted = f"has {describe_count(len(row), 'column')}, and the first line names {len(header):,}"
        return BadRecord(where, "columns", f"{counted}; quote what has {separators} in it")
    return dict(zip(header, row, strict=True)) if _is_unicode("".join(row)) else _refuse_bytes(where)


def _read_text(stream: io.BufferedReader, part: "Part") -> Located:
    """One document: all of the file."""
    text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f'{part.label} is {_SIZE}; write its documents as lines {{"text": ...}} of a .jsonl file')
    try:
        yield part.label, {"text": text.decode()}
    except UnicodeDecodeError:
        yield part.label, _refuse_bytes(part.label)


_READERS = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
COMPRESSIONS = {".gz": ("gzip", "gzip -dk"), ".zst": ("Zstandard", "zstd -d")}  # names, and commands that unpack
LINE_ENDINGS = (".jsonl", ".ndjson", ".json")  # of files that may have a record to a line
TEXT_ENDINGS = tuple(_READERS)
