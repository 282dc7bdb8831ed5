"""What data holds, as sentences about it say it: names and values that are quoted, however long, and plain words.

A column may have a name of a megabyte, and a record thousands of columns; a sentence on them stays one that is read.
"""

from collections.abc import Iterable

_QUOTED = 60  # characters of a name or value, at most
_LISTED = 10  # names in a list, at most
_REASON = 300  # characters of a library's message, which may quote the data
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
}


def quote(value: object) -> str:
    """A name or value of the data in quotes, without its middle where it is long."""
    return shorten(repr(value), _QUOTED)


def shorten(text: str, most: int = _REASON) -> str:
    """A text of at most so many characters: its beginning and its end."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[3 + most * 2 // 3 - most :]}"


def quote_list(names: Iterable[object]) -> str:
    """The first of some names, and how many more there are; "" of none."""
    names = [*names]
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(map(quote, names[:_LISTED])) + more


def is_short(name: str) -> bool:
    """Whether a sentence, or a command in it, has the whole of a name."""
    return len(name) <= _QUOTED


def describe_kind(value: object) -> str:
    """What a value is, as JSON has it: null, a number, a text, a list, an object."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def describe_count(number: int, noun: str, plural: str = "") -> str:
    """A number of things, such as 1 column or 5,000 columns."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
