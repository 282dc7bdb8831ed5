"""Records of Parquet and Arrow files, read a few rows at a time; and how many rows each group or batch of a file has.

Arrow files are those of IPC, as files or as streams: `datasets` writes streams, in save_to_disk and in its cache.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2_jax.data.reading.files import BUFFER_BYTES, is_url, open_file
from gemma2_jax.data.records import BadRecord
from gemma2_jax.data.wording import shorten

if TYPE_CHECKING:
    import pyarrow

    from gemma2_jax.data.reading.places import Part

_MAX_ROWS, _BATCH_BYTES = 1024, 1 << 24  # of the rows that are Python objects at one time
_ARROW_FILE = b"ARROW1"  # how a file of Arrow's IPC begins, and a stream does not
_CONTINUATION = b"\xff\xff\xff\xff"  # before each message of a stream, and before the zero that ends it


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rows that lie together in a file: a row group of Parquet, a record batch of Arrow."""

    rows: int
    size: int  # bytes of their values


def list_groups(part: "Part") -> list[Group]:
    """The groups of rows of a file, in their order. Raises ValueError where it is damaged."""
    with _open(part) as file:
        if part.ending == ".parquet":
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            return [Group(rows=group.num_rows, size=group.total_byte_size) for group in groups]
        return [Group(rows=batch.num_rows, size=batch.nbytes) for batch in _read_batches(file, 0, None)]


def read_rows(part: "Part") -> Iterator[tuple[str, object]]:
    """Yields where a row is, and the row, of some groups of a file. Raises ValueError where the file is damaged."""
    number = part.number - 1
    with _open(part) as file:
        for batch in _read_slices(file, part):
            for row in _to_rows(batch):
                number += 1
                where = f"{part.label} row {number}"
                if isinstance(row, UnicodeDecodeError):
                    row = BadRecord(where, "not UTF-8", f"has a text that is not UTF-8 ({row}); convert it")
                yield where, row


@contextlib.contextmanager
def _open(part: "Part") -> Iterator[Any]:
    """A ParquetFile, or a reader of Arrow's IPC. Raises ValueError for what pyarrow raises of damaged files."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ValueError(f"{part.label} needs pyarrow: pip install 'gemma2-jax[parquet]'") from error
    path, kind = part.path, "Parquet" if part.ending == ".parquet" else "Arrow"
    with contextlib.ExitStack() as stack:
        try:
            if kind == "Parquet":
                source = stack.enter_context(open_file(path)) if is_url(path) else path
                # Behind a URL, a row group is read at one time, as each request takes a while; else a part of it is.
                file = parquet.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=is_url(path))
                yield stack.enter_context(file)
                return
            file = stack.enter_context(open_file(path))
            is_file = file.peek(len(_ARROW_FILE)).startswith(_ARROW_FILE)
            if not is_file:
                _check_end(file, part)
            source = stack.enter_context(pyarrow.PythonFile(file) if is_url(path) else pyarrow.memory_map(path))
            if is_file:
                yield stack.enter_context(ipc.open_file(source))
            else:
                yield _Stream(reader=stack.enter_context(ipc.open_stream(source)), source=source, label=part.label)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{part.label}: not {kind}, or cut short ({_summarize(error)}); copy it again") from error
        except OSError as error:
            if error.errno is not None:  # of the disk, not of what the file holds
                raise
            raise ValueError(f"{part.label}: damaged ({_summarize(error)}); copy it again") from error


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """A reader of an Arrow stream, for which an end mark in the middle of its file is no end."""

    reader: Any
    source: Any  # pyarrow's file
    label: str

    def read_next_batch(self) -> "pyarrow.RecordBatch":
        """Raises StopIteration at the end of the file, and ValueError where there is more behind the end mark."""
        try:
            return self.reader.read_next_batch()
        except StopIteration:
            if self.source.tell() != self.source.size():
                raise ValueError(f"{self.label}: damaged, as it goes on behind its end mark; copy it again") from None
            raise


def _check_end(stream: io.BufferedReader, part: "Part") -> None:
    """Raises ValueError where an Arrow stream has no end mark: cut between two batches, it would just be shorter."""
    has_marks = stream.peek(len(_CONTINUATION)).startswith(_CONTINUATION)  # which those from before Arrow 0.15 lack
    mark = (_CONTINUATION if has_marks else b"") + bytes(4)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - len(mark)))
    end = stream.read()
    stream.seek(0)
    if end != mark:
        raise ValueError(f"{part.label}: an Arrow stream without its end mark, so that it is cut short; copy it again")


def _summarize(error: Exception) -> str:
    return shorten(str(error).partition("\n")[0].rstrip("."))


def _read_slices(file: Any, part: "Part") -> Iterator["pyarrow.RecordBatch"]:
    """The rows of the part's groups, in batches that take little memory as Python objects."""
    if part.ending == ".parquet":
        stop = file.metadata.num_row_groups if part.stop is None else part.stop
        for group in range(part.start, stop):
            described = file.metadata.row_group(group)
            rows = _count_rows(described.num_rows, described.total_byte_size)
            yield from file.iter_batches(batch_size=rows, row_groups=[group])
        return
    for batch in _read_batches(file, part.start, part.stop):
        _validate(batch)
        rows = _count_rows(batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _validate(batch: "pyarrow.RecordBatch") -> None:
    """Raises pyarrow.ArrowInvalid where reading the batch would read beyond its buffers.

    Texts that are not UTF-8 are left to `_to_rows`. What is decoded from Parquet has been checked.
    """
    for column in batch.columns:
        column.view(_replace_texts(column.type)).validate(full=True)


def _replace_texts(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type with bytes in place of texts, of which arrays have the same buffers."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind) or types.is_large_string(kind):
        return pyarrow.binary() if types.is_string(kind) else pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_replace_texts(field.type)) for field in kind])
    for is_list, make in ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_replace_texts(kind.value_type)))
    return kind  # texts in maps, unions and dictionaries, of which records are not made, must be UTF-8


def _count_rows(rows: int, size: int) -> int:
    """How many rows take about _BATCH_BYTES, of so many that take so much."""
    return max(1, min(_MAX_ROWS, rows * _BATCH_BYTES // max(size, 1)))


def _read_batches(file: Any, start: int, stop: int | None) -> Iterator["pyarrow.RecordBatch"]:
    if hasattr(file, "get_batch"):
        for number in range(start, file.num_record_batches if stop is None else stop):
            yield file.get_batch(number)
        return
    number = 0
    with contextlib.suppress(StopIteration):
        while stop is None or number < stop:
            batch = file.read_next_batch()  # of a stream, those before are passed too
            if number >= start:
                yield batch
            number += 1


def _to_rows(batch: "pyarrow.RecordBatch") -> list:
    """The rows as dictionaries; a row of which a text is not UTF-8 is the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for number in range(batch.num_rows) for row in _to_rows(batch.slice(number, 1))]
    except (OverflowError, ValueError):  # dates beyond Python's, which are no texts
        return batch.select([name for name in batch.schema.names if _has_python_values(batch, name)]).to_pylist()


def _has_python_values(batch: "pyarrow.RecordBatch", name: str) -> bool:
    try:
        batch.column(name).to_pylist()
    except UnicodeDecodeError:
        return True
    except (OverflowError, ValueError):
        return False
    return True
