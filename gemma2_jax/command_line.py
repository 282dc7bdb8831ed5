"""What the commands share: arguments in, and one sentence where they are not understood. Nothing here knows a command.

tyro parses; the sentences are ours, so that a mistake reads alike whoever finds it, in a terminal and in a log.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import tyro

# What a command ends with, besides 0. A launcher starts the same command again after EXIT_STOPPED and EXIT_STUCK.
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # told to stop (the temporary failure of sysexits.h)
EXIT_STUCK = 76  # a step, a save or a batch took longer than it may
EXIT_NOT_FINITE = 77
EXIT_INTERRUPTED = 130  # as of SIGINT
EXIT_CLOSED_PIPE = 141  # as of SIGPIPE
_MOST_CHARACTERS = 10_000  # of a message
_SHORTEST = 5  # characters of an option that is taken for the beginning of another: --max


class _ParseFailure(Exception):
    """What tyro found wrong: an event of one of its own classes."""


def parse[T](kind: type[T], arguments: list[str], program: str, default: T | None = None) -> T:
    """The arguments of a command as a dataclass. Exits with `exit_usage` where they are not understood."""
    given: Any = {} if default is None else {"default": default}
    if repeated := _find_repeated(kind, arguments):
        exit_usage(repeated, program)
    try:
        with _catch_failures(), _flush_after():
            return tyro.cli(kind, args=arguments, prog=program, **given)
    except _ParseFailure as failure:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], prog=program, **given)
        options = [*dict.fromkeys(re.findall(r"--[a-z][\w-]*(?:\.[\w-]+)*", shown.getvalue()))]
        exit_usage(_explain_failure(failure.args[0], arguments, options), program)
    except ValueError as error:  # of the dataclass itself
        exit_usage(str(error), program)
    except BrokenPipeError:  # of what --help prints
        exit_closed_pipe()
    except OSError as error:
        exit_error(error)


@contextlib.contextmanager
def _flush_after() -> Iterator[None]:
    """Raises BrokenPipeError where nobody reads what the block prints, however short it is."""
    try:
        yield
    except SystemExit:  # after --help
        print(end="", flush=True)
        raise


def capitalize_booleans(arguments: list[str], kind: type) -> list[str]:
    """--data.packing false as --data.packing False, after a space or =, as shells and Megatron-Bridge write it.

    `kind` is the dataclass whose fields the options name.
    """
    words: list[str] = []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator and words:
            name, value = words[-1], argument
        is_boolean = value.lower() in ("true", "false") and _find_type(kind, name) is bool
        words.append(argument.removesuffix(value) + value.capitalize() if is_boolean else argument)
    return words


def _find_type(kind: Any, option: str) -> Any:
    """The type of the field that an option names; None where there is none."""
    for part in option.removeprefix("--").replace("-", "_").split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def exit_usage(reason: str, program: str) -> NoReturn:
    """Says why the arguments are not understood and which command lists them, and exits with status 2."""
    end = "" if reason.endswith("?") else "."
    print(fold(f"error: {reason}{end} {program} --help lists the options"), file=sys.stderr)
    sys.exit(EXIT_USAGE)


def exit_error(error: Exception) -> NoReturn:
    """Ends with status 1 and the message of an error."""
    sys.exit(fold(escape(f"error: {describe_error(error)}")))


def describe_error(error: Exception) -> str:
    """The message of an error. The operating system's has the file first, what is wrong with it, and what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.filename is None:  # of a print, or of reading a prompt: files have their names
        return f"standard input or output cannot be used ({error.strerror}); redirect it to somewhere else"
    remedy = _REMEDIES.get(error.errno or 0, "mend that, and give the same command again")
    return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}); {remedy}"


_REMEDIES = {
    errno.EACCES: "have its owner give you the right to (chmod), or copy it to where you have it",
    errno.ENOENT: "it may have been moved or deleted meanwhile; give the same command again once it is there",
    errno.ELOOP: "it is a link that leads back to itself; delete it, or copy the file again",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EISDIR: "it is a folder where a file is meant; move it away, or name another",
    errno.ENOTDIR: "a part of it is a file where a folder is meant; move that away, or name another",
}


@contextlib.contextmanager
def exit_with_sentence(after_interrupt: str = "") -> Iterator[None]:
    """Ends a command whose block fails with a sentence and a status, where it is the user who can mend it.

    After Ctrl-C, `after_interrupt` says how to go on.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        exit_closed_pipe()
    except (ValueError, OSError) as error:
        exit_error(error)
    except KeyboardInterrupt:
        print(f"interrupted{after_interrupt}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def catch_signals(*numbers: signal.Signals) -> Iterator[list[signal.Signals]]:
    """Notes these signals in the list that it gives, for the block to end when it can.

    The second Ctrl-C raises KeyboardInterrupt at once. Signals are left as they are outside the main thread, which
    alone may change them.
    """
    caught: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, note) for number in numbers} if is_main else {}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def print_commands(program: str, lines: Iterable[str]) -> None:
    """Prints the commands of a program, each with its summary on a line, as the program's --help."""
    with exit_with_sentence():
        print(f"usage: {program} COMMAND [OPTIONS]\n", *lines, "\nEach command has a --help.", sep="\n")


def exit_closed_pipe() -> NoReturn:
    """Ends without a word, as Unix programs do when nobody reads their standard output: with 141, as of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
    sys.exit(EXIT_CLOSED_PIPE)


def check_paths(command: Any, *names: str) -> None:
    """Raises ValueError where one of these fields is an empty string, which would mean the current folder."""
    for name in names:
        if getattr(command, name) == "":
            raise ValueError(f"{name} is empty; name a folder ('.' is the current one)")


def write_whole(path: Path, text: str) -> None:
    """Writes a file, which appears whole or not at all. Raises OSError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # JSON may have half a pair of surrogates, which is no text.
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:  # which of a full disk names no file
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def escape(text: str, kept: str = "") -> str:
    """The text with what would command a terminal, or is no character, as Python writes it: \\x1b. `kept` stays.

    Names in files that others wrote may have such characters in them.
    """
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def notify(text: str) -> None:
    """Prints a sentence to standard error, at once. Where its disk is full or its reader gone, work goes on without."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def fold(message: str) -> str:
    """A message for standard error, cut into lines between words where that is a terminal."""
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[: _MOST_CHARACTERS // 2]} ... {message[-_MOST_CHARACTERS // 2 :]}"
    if sys.stderr is None or not sys.stderr.isatty():
        return message
    width = shutil.get_terminal_size().columns
    lines = (textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in message.split("\n"))
    return "\n".join("\n".join(line) for line in lines)


def suggest(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """ "; did you mean NAME?" with the known name that is most like this one; empty where none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _find_repeated(kind: type, arguments: list[str]) -> str:
    """What is wrong where an option that is not a list of its values is given more than once; else empty."""
    hints = typing.get_type_hints(kind, include_extras=True)
    lists = {name for name, hint in hints.items() if tyro.conf.UseAppendAction in getattr(hint, "__metadata__", ())}
    counts = Counter(_option_name(argument) for argument in arguments if re.match("--[a-z]", argument))
    for name, count in counts.items():
        if count > 1 and name.removeprefix("--").replace("-", "_") not in lists:
            return f"{name} is given {count} times; give it once"
    return ""


def _option_name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _catch_failures() -> contextlib.AbstractContextManager:
    """Has tyro raise _ParseFailure instead of printing a box.

    tyro has no public name for that. A release that lacks what 1.0.17 has prints its boxes.
    """
    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", None)
    return hook(_raise_failure) if hook else contextlib.nullcontext()


def _raise_failure(event: Any) -> NoReturn:
    raise _ParseFailure(event)


def _explain_failure(event: Any, arguments: list[str], options: list[str]) -> str:
    """What is wrong with the arguments. Unknown options come before the failures that may follow from them."""
    names = [_option_name(argument) for argument in arguments if re.match("--[a-z]", argument)]
    if unknown := [name for name in names if name not in options]:
        return "; ".join(f"there is no option {name}{_suggest_options(name, options)}" for name in unknown)
    kind = type(event).__name__
    if kind == "UnrecognizedArgs":
        return f"{' '.join(event.tokens)} is not an option, nor the value of one"
    if kind == "MissingArgs":
        return f"{' and '.join(_describe_argument(missing.arg) for missing in event.missing_arguments)} must be given"
    if kind == "InvalidChoice":
        near = suggest(event.value, event.choices, cutoff=0.6) or "."
        choices = " or ".join(choice or "empty" for choice in event.choices)
        return f"{event.argument.display_name()} is {event.value!r}{near} It may be {choices}"
    if kind == "BadValue":
        return f"{_describe_argument(event.argument)} lacks its value"
    if event.argument is None:
        return event.message
    return _explain_value(event.argument, event.message)


_VALUES = re.compile(  # as tyro and Python write those that are no value of the option's type
    r"(?:invalid literal for int\(\) with base 10: |could not convert string to float: |"
    r"Could not find valid parse for arguments: \[|no type matching .* could be instantiated from \[)('.*?')\]?\.?$",
    re.MULTILINE,
)
_NUMBERS = {int: "a whole number", float: "a number"}


def _explain_value(argument: Any, message: str) -> str:
    """What is wrong with the value of an option, and what it takes."""
    found = _VALUES.search(message)
    if not found:
        return f"{_describe_argument(argument)} is not understood: {message}"
    kinds = typing.get_args(argument.field.type) or (argument.field.type,)
    numbers = [_NUMBERS[kind] for kind in kinds if kind in _NUMBERS]
    needed = " or ".join(numbers) if numbers else str(argument.lowered.metavar)
    return f"{argument.lowered.name_or_flags[-1]} is {found[1]}; it must be {needed}"


def _describe_argument(argument: Any) -> str:
    """An option with what it takes, as --help writes it: --optim.lr FLOAT; or a positional argument: SRC."""
    name, value = argument.lowered.name_or_flags[-1], argument.lowered.metavar
    return str(value) if argument.is_positional() else f"{name} {value}"


def _suggest_options(name: str, options: list[str]) -> str:
    """The options that are most like this one.

    Those of the same last part, else spelled alike, else longer ones, else of a last part alike.
    """

    def last_part(option: str) -> str:
        return option.lstrip("-").rpartition(".")[2]

    group = name.rpartition(".")[0]
    parts = {last_part(option) for option in options if option.startswith(f"{group}.")} if group else set()
    everywhere = {last_part(option) for option in options}
    near = (
        [option for option in options if last_part(option) == last_part(name)]
        or difflib.get_close_matches(name, options, n=2, cutoff=0.8)
        or [option for option in options if len(name) >= _SHORTEST and option.startswith(name)]
        or [
            o
            for part in difflib.get_close_matches(last_part(name), parts, n=2)
            for o in options
            if o == f"{group}.{part}"
        ]
        or [
            o
            for part in difflib.get_close_matches(last_part(name), everywhere, n=2, cutoff=0.75)
            for o in options
            if last_part(o) == part
        ]
    )
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""
