"""What to do about a record whose columns are none of a document's: which --data.columns would name them.

Columns are named only where their own names or contents tell what they hold. `records` raises the error.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from gemma2_jax.data.wording import is_short

# What columns are often called, beside the names that documents have, in lower case.
_QUESTIONS = ("user", "prompt", "question", "query", "instruction", "input", "human", "request", "problem", "q")
_ANSWERS = ("assistant", "completion", "answer", "response", "output", "reply", "solution", "target", "gpt", "a")
_TABLE = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?:\d+$")  # where a row of a table is


def suggest_columns(record: dict, names: Mapping[str, str], shapes: Sequence[tuple[str, ...]], where: str) -> str:
    """The remedy for a record of no shape. `names` is data.column_names, `shapes` the columns of each shape.

    The record has its columns renamed already, and no nulls.
    """
    if names:
        return _complete_names(record, names, shapes)
    if _TABLE.search(where) and any(re.search(r"\s", name.strip()) for name in record):
        return "where those are a row and no names, put a first line before them that names the columns: user,assistant"
    if isinstance(record.get("text"), str):
        return "to train on its 'text' as plain text, give --data.kind text"
    if messages := [name for name, value in record.items() if _is_conversation(value) and _is_plain(name)]:
        return f"to train on the messages in {messages[0]!r}, give {_write_option(messages=messages[0])}"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    questions, answers = ([name for name in texts if name.lower() in known] for known in (_QUESTIONS, _ANSWERS))
    if len(questions) == len(answers) == 1:
        question, answer = questions[0], answers[0]
        return (
            f"{_write_option(user=question, assistant=answer)} writes them by the chat template, and "
            f"{_write_option(prompt=question, completion=answer)} joins them as they are"
        )
    if len(texts) > 1:
        return (
            "say which of them hold what: --data.columns user=COLUMN,assistant=COLUMN writes two by the chat template, "
            "and prompt=COLUMN,completion=COLUMN joins them as they are"
        )
    if texts and not _is_plain(texts[0]):
        return "rename the column that holds its text to 'text', to train on it as plain text with --data.kind text"
    if texts:
        return f"to train on its {texts[0]!r} as plain text, give --data.kind text {_write_option(text=texts[0])}"
    return "none of them is a text; write documents of one of these shapes"


def suggest_text(record: dict) -> str:
    """The option that names the column of a plain text: the only text, if there is one."""
    texts = [name for name, value in record.items() if isinstance(value, str)]
    return _write_option(text=texts[0] if len(texts) == 1 and _is_plain(texts[0]) else "COLUMN")


def _complete_names(record: dict, names: Mapping[str, str], shapes: Sequence[tuple[str, ...]]) -> str:
    """The remedy where data.columns names some columns of a shape, and not all."""
    missing = min(([name for name in shape if name not in record] for shape in shapes), key=len)
    known = {*missing, *_ANSWERS} if {*missing} & {*_ANSWERS} else {*missing, *_QUESTIONS}
    free = [name for name, value in record.items() if name not in names and isinstance(value, str) and _is_plain(name)]
    likely = [name for name in free if name.lower() in known]
    column = likely[0] if len(missing) == len(likely) == 1 else "COLUMN"
    option = _write_option(**names, **dict.fromkeys(missing, column))
    return f"name what holds {' and '.join(map(repr, missing))} too: {option}"


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and {"role", "from"} & {*value[0]} != set()
    )


def _is_plain(name: str) -> bool:
    """Whether data.columns can name a column, in a command that is read."""
    return is_short(name) and not re.search("[=,]", name)


def _write_option(**names: str) -> str:
    return "--data.columns " + shlex.quote(",".join(f"{name}={column}" for name, column in names.items()))
