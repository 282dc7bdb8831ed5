"""From a record, as a data set has it, to a document: a plain text, a prompt and its completion, or a conversation.

Which shape a record has is found by its columns, record by record: `SHAPES` has a row for each. A record that makes no
document is a `BadRecord`, which says where it is and why. `sources` reads the records, and decides which documents are
trained on.
"""

import hashlib
import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gemma2_jax.config import DataConfig
from gemma2_jax.data.column_advice import suggest_columns, suggest_text
from gemma2_jax.data.wording import describe_kind, quote, quote_list

# What data sets call the sides of a conversation, in lower case.
_ROLE_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "gemma"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "function_response", "observation", "ipython"),
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
_CONTENT_KEYS = ("content", "value", "parts")  # of OpenAI's messages, of ShareGPT's, and of Gemini's


class BadRecord(ValueError):
    """A record that makes no document."""

    def __init__(self, where: str, reason: str, sentence: str) -> None:
        """`reason` is what such records are counted under; `sentence` says what is wrong with this one, and the fix."""
        super().__init__(f"{where}: {sentence}")
        self.where, self.reason = where, reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says in a conversation."""

    role: str  # user, assistant, system or tool
    content: str
    is_learned: bool = True  # whether the model learns it, where it is the assistant's


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One document: a prompt and its completion, of which the completion is learned; or a conversation's turns."""

    where: str  # file:line, for errors
    prompt: str = ""  # empty for plain text
    completion: str = ""
    turns: tuple[Turn, ...] = ()  # if any, they are the document
    name: str = ""  # of the document, where its source has names
    shape: str = ""  # what the record's row in SHAPES is called

    @property
    def digest(self) -> int:
        """A hash of the document's name, or of its text if it has no name: evenly distributed below 2**64."""
        messages = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        key = self.name or json.dumps([self.prompt, self.completion, messages])
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


Reader = Callable[[dict, str], Example]  # of a record without nulls, and where it is


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One way in which data sets write a document."""

    name: str
    columns: tuple[str, ...]  # that a record of this shape has
    optional: tuple[str, ...] = ()  # that it may have
    read: Reader


def make_example(record: object, where: str, data: DataConfig, name: str = "") -> Example:
    """The document of a record. Raises BadRecord if it makes none, ValueError if `data` asks for what does not exist.

    Columns that `data.columns` names are read under the names that `SHAPES` has. Columns that are null count as absent,
    as Parquet files have them where other rows have a value.
    """
    if not isinstance(record, dict):
        raise BadRecord(where, "not an object", f"holds {describe_kind(record)}; a document is a JSON object")
    record = {column: value for column, value in record.items() if value is not None}
    if not record:
        raise BadRecord(where, "no columns", "has no columns, or nulls alone; remove the document")
    record = _rename_columns(record, data.column_names, where)
    if data.kind == "text":
        example = _read_plain_text(record, where)
    elif data.prompt_template:
        prompt, completion = (
            _fill_template(data.prompt_template, record, where),
            _read_answer(record, "completion", where),
        )
        example = Example(where=where, prompt=prompt, completion=completion, shape="prompt template")
    else:
        shape = _find_shape(record, data.column_names, where)
        example = replace(shape.read(record, where), shape=shape.name)
    _check_characters(example)
    return replace(example, name=name) if name else example


def _rename_columns(record: dict, names: Mapping[str, str], where: str) -> dict:
    if not names:
        return record
    if unknown := names.keys() - _KNOWN_COLUMNS:
        raise ValueError(f"data.columns names {sorted(unknown)}; it may name {', '.join(sorted(_KNOWN_COLUMNS))}")
    # Of two columns for the same part of a document, one may be there in some records, the other in others.
    renamed = {name: record[column] for name, column in names.items() if column in record}
    if not renamed:
        missing = ", ".join(map(repr, names.values()))
        raise BadRecord(where, "missing column", f"has no {missing} (data.columns); it has {_list_columns(record)}")
    return {column: value for column, value in record.items() if column not in names.values()} | renamed


def _find_shape(record: dict, names: Mapping[str, str], where: str) -> Shape:
    """The first row of SHAPES whose columns the record has; of those with a column that is named, where any is."""
    shapes = [shape for shape in SHAPES if not names or names.keys() & {*shape.columns, *shape.optional}]
    for shape in shapes:
        if record.keys() >= set(shape.columns):
            return shape
    # All shapes would be too many to read; these are the commonest.
    known = "; ".join(" and ".join(map(repr, shape.columns)) for shape in (shapes if names else _COMMON_SHAPES))
    remedy = suggest_columns(record, names, [shape.columns for shape in shapes], where)
    raise BadRecord(
        where,
        "unknown columns",
        f"its columns {_list_columns(record)} are none of a document's ({known}{'' if names else '; ...'}); {remedy}",
    )


def _read_plain_text(record: dict, where: str) -> Example:
    if "text" not in record and any(record.keys() >= set(shape.columns) for shape in SHAPES):
        raise BadRecord(
            where,
            "unknown columns",
            f"has no 'text'; it has {_list_columns(record)}; to train on prompts and their answers, give --data.kind "
            "instructions",
        )
    if "text" not in record:
        raise BadRecord(
            where,
            "missing column",
            f"has no 'text'; it has {_list_columns(record)}; name the column of the text, as in {suggest_text(record)}",
        )
    return Example(where=where, completion=_read_answer(record, "text", where), shape="text")


def _read_text(record: dict, column: str, where: str) -> str:
    if column not in record:
        raise BadRecord(where, "missing column", f"has no {quote(column)}; it has {_list_columns(record)}")
    if not isinstance(record[column], str):
        kind = describe_kind(record[column])
        raise BadRecord(where, "not a text", f"{quote(column)} is {kind}; it must be a text")
    return record[column]


def _read_answer(record: dict, column: str, where: str) -> str:
    text = _read_text(record, column, where)
    if not text.strip():
        raise BadRecord(where, "empty", f"{column!r} is empty, which leaves nothing to learn; remove the document")
    return text


def _fill_template(template: str, record: dict, where: str) -> str:
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"data.prompt_template {template!r}: {error}; write a brace itself twice") from error
    keys = [key for _, key, _, _ in fields if key is not None]
    if extra := next((key for _, key, width, conversion in fields if width or conversion), None):
        raise ValueError(
            f"data.prompt_template {template!r} has more than a name in the braces of {extra!r}; write {{{extra}}}"
        )
    return template.format_map({key: _read_text(record, key, where) for key in keys})


def _read_completion(record: dict, where: str) -> Example:
    """A prompt and its completion: two texts that are joined as they are, or TRL's two lists of messages.

    Of messages, the completion's alone are learned (huggingface.co/docs/trl/dataset_formats).
    """
    if isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        return Example(where=where, prompt=record["prompt"], completion=_read_answer(record, "completion", where))
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        before = [replace(turn, is_learned=False) for turn in read_turns(record, "prompt", where)]
        return Example(where=where, turns=_check_turns([*before, *read_turns(record, "completion", where)], where))
    kinds = " and ".join(describe_kind(record[column]) for column in ("prompt", "completion"))
    raise BadRecord(
        where, "not a text", f"'prompt' and 'completion' are {kinds}; they must be two texts, or two lists of messages"
    )


def _read_conversation(record: dict, where: str, *, column: str) -> Example:
    """A list of messages, which a system prompt in a column of its own may precede."""
    turns = read_turns(record, column, where)
    if record.get("system") and turns and turns[0].role != "system":
        turns.insert(0, Turn(role="system", content=_read_text(record, "system", where)))
    return Example(where=where, turns=_check_turns(turns, where))


def _read_exchange(record: dict, where: str, *, question: str, answer: str, context: str = "") -> Example:
    """One question and its answer. A context follows the question after an empty line, as in Alpaca's prompts."""
    text = _read_text(record, question, where)
    if context and record.get(context):
        text = f"{text}\n\n{_read_text(record, context, where)}"
    turns = [Turn(role="user", content=text), Turn(role="assistant", content=_read_answer(record, answer, where))]
    if record.get("system"):
        turns.insert(0, Turn(role="system", content=_read_text(record, "system", where)))
    return Example(where=where, turns=tuple(turns))


def _refuse_preference(record: dict, where: str) -> Example:
    column = "messages" if isinstance(record["chosen"], list) else "completion"
    raise BadRecord(
        where,
        "preference",
        "is a preference (chosen over rejected), and there is no training objective for it yet; to train on the chosen "
        f"answers alone, give --data.columns {column}=chosen",
    )


def read_turns(record: dict, column: str, where: str) -> list[Turn]:
    """The messages in a column of a record, as OpenAI, ShareGPT or Gemini write them. Raises BadRecord for others."""
    messages = record[column]
    if isinstance(messages, str):  # as tables have lists
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise BadRecord(
                where, "not messages", f"{column!r} is a text that is not JSON; it must be a list of messages"
            ) from None
    if not isinstance(messages, list):
        kind = describe_kind(messages)
        raise BadRecord(where, "not messages", f"{column!r} is {kind}; it must be a list of messages")
    return [_read_turn(message, f"message {number}", where) for number, message in enumerate(messages, start=1)]


def _read_turn(message: object, label: str, where: str) -> Turn:
    if not isinstance(message, dict):
        kind = describe_kind(message)
        raise BadRecord(where, "not messages", f"{label} is {kind}; it must be an object with role and content")
    role = message.get("role") or message.get("from")
    content = next((message[key] for key in _CONTENT_KEYS if message.get(key) is not None), None)
    if message.get("tool_calls") or message.get("function_call"):
        raise BadRecord(
            where, "tool calls", f"{label} calls a tool, for which a Gemma 2 chat has no place; write it as text"
        )
    if not isinstance(role, str) or content is None:
        if nulls := [key for key in ("role", "from", *_CONTENT_KEYS) if key in message and message[key] is None]:
            keys = " and ".join(map(repr, nulls))
            raise BadRecord(
                where, "null in a message", f"{keys} of {label} is null; write a text, or remove the message"
            )
        keys = quote_list(message)
        raise BadRecord(
            where,
            "not messages",
            f"{label} has {keys or 'nothing'}; it must have 'role' and 'content', or 'from' and 'value'",
        )
    if role.lower() not in _ROLES:
        raise BadRecord(where, "unknown role", f"{label} has the role {quote(role)}; roles are {', '.join(_ROLES)}")
    return Turn(
        role=_ROLES[role.lower()],
        content=_join_parts(content, label, where),
        is_learned=_read_weight(message, label, where),
    )


def _join_parts(content: Any, label: str, where: str) -> str:
    """A message's text, of which the parts are joined where it is a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = describe_kind(content)
        raise BadRecord(where, "not a text", f"the content of {label} is {kind}; it must be a text or a list of parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = f"that is {describe_kind(part)}"
            if isinstance(part, dict):
                kind = f"of type {quote(part['type'])}" if part.get("type") else "without text"
            raise BadRecord(where, "content other than text", f"{label} has a part {kind}; Gemma 2 takes text alone")
        texts.append(text)
    return "".join(texts)


def _read_weight(message: Mapping[str, Any], label: str, where: str) -> bool:
    """Whether a message may be learned: its `weight`, as OpenAI has it, or its `train`, as others do."""
    weights = [message[key] for key in ("weight", "train") if message.get(key) is not None]
    for weight in weights:
        if weight not in (0, 1):  # as False and True are
            raise BadRecord(
                where, "weight", f"{label} has the weight {quote(weight)}; a message is learned (1) or not (0)"
            )
    return all(weights)


def _check_turns(turns: list[Turn], where: str) -> tuple[Turn, ...]:
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        roles = ", ".join(repr(role) for role in dict.fromkeys(turn.role for turn in turns))
        remedy = f"its roles are {roles}; name the one to learn from 'assistant'" if roles else "it has no messages"
        raise BadRecord(
            where, "no answer", f"no message has the role 'assistant', which leaves nothing to learn: {remedy}"
        )
    if not any(turn.is_learned for turn in answers):
        raise BadRecord(
            where, "no answer", "every answer has weight 0, which leaves nothing to learn; remove the document"
        )
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and turn.is_learned and not turn.content.strip():
            raise BadRecord(where, "empty", f"message {number} is an empty answer; remove the document")
    return tuple(turns)


def _check_characters(example: Example) -> None:
    """Raises BadRecord for text that is not Unicode: half of a surrogate pair, as a cut emoji leaves in JSON."""
    for text in (example.prompt, example.completion, *(turn.content for turn in example.turns)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            character = f"\\u{ord(text[error.start]):04x}"
            raise BadRecord(
                example.where,
                "lone surrogate",
                f"has {character} without its other half (a cut emoji?), which no tokenizer takes; mend the document",
            ) from None


def _list_columns(record: dict) -> str:
    return quote_list(record) or "no columns"


def _exchange_shape(name: str, question: str, answer: str, context: str = "") -> Shape:
    optional = (context, "system") if context else ("system",)
    read = partial(_read_exchange, question=question, answer=answer, context=context)
    return Shape(name=name, columns=(question, answer), optional=optional, read=read)


def _conversation_shape(name: str, column: str) -> Shape:
    return Shape(name=name, columns=(column,), optional=("system",), read=partial(_read_conversation, column=column))


# The first row whose columns a record has is its shape. Each but prompt and completion goes through the chat template.
SHAPES = (
    _conversation_shape("messages", "messages"),
    _conversation_shape("ShareGPT", "conversations"),
    _conversation_shape("ShareGPT", "conversation"),
    Shape(name="prompt and completion", columns=("prompt", "completion"), read=_read_completion),
    Shape(name="preference", columns=("chosen", "rejected"), optional=("prompt",), read=_refuse_preference),
    _exchange_shape("Alpaca", "instruction", "output", context="input"),
    _exchange_shape("Dolly", "instruction", "response", context="context"),
    _exchange_shape("prompt and response", "prompt", "response"),
    _exchange_shape("question and answer", "question", "answer", context="context"),
    _exchange_shape("query and response", "query", "response"),
    _exchange_shape("input and output", "input", "output"),
    _exchange_shape("user and assistant", "user", "assistant"),
)
_COMMON_SHAPES = [
    shape for shape in SHAPES if shape.name in ("messages", "prompt and completion", "question and answer")
]
_KNOWN_COLUMNS = {"text"} | {column for shape in SHAPES for column in (*shape.columns, *shape.optional)}
