"""A conversation as the tokenizer's chat template writes it, in pieces of which some are learned.

What a template does not take is found by trying it once: Gemma 2's has no place for a system prompt, and has the two
sides alternate. `encoding` makes tokens of the pieces.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from gemma2_jax.data.message_bounds import BoundedTemplate, bound_messages
from gemma2_jax.data.records import BadRecord, Example, Turn
from gemma2_jax.data.report import Report
from gemma2_jax.data.wording import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM_MOVED = "the system prompt was put before the next user turn, as the chat template has no place for it"
TURNS_MERGED = "consecutive turns of one role were merged (data.repeated_roles)"

_TRIED = (("user", " a\n"), ("assistant", "\tb "), ("user", "<c>\n\n"), ("assistant", "d"))  # a conversation
_MOST_WRITTEN = 1_000_000  # characters; the descriptions of tools that a template has in it are a few thousand


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A chat template, and which conversations it takes."""

    tokenizer: "PreTrainedTokenizerFast"
    takes_system: bool
    takes_repeats: bool
    repeated_roles: Literal["refuse", "merge"]
    bounded: BoundedTemplate | None = None  # of a template that need not write a conversation's beginnings one by one

    def write(self, turns: Sequence[Turn], *, cue: bool = False) -> str:
        """The conversation's text, with the beginning of an answer if `cue`. Raises ValueError as `write_messages`."""
        return write_messages(_as_messages(turns), self.tokenizer, cue=cue)

    def open_beginnings(self, turns: Sequence[Turn]) -> Callable[[int, bool], str]:
        """The function that writes so many of the first turns, and a cue if asked. Both raise ValueError as `write`."""
        if self.bounded is None or turns[0].role == "assistant":  # whose cue comes after no message
            return lambda count, cue: self.write(turns[:count], cue=cue)
        messages = _as_messages(turns)
        with _explain_refusal():
            *pieces, end = self.bounded.write(messages)
            cue_end = self.bounded.cue_end

        def write_beginning(count: int, cue: bool) -> str:
            text = "".join([*pieces[: count + 1], cue_end if cue else end])
            _check_size(text, messages[:count])
            return text

        return write_beginning


def _as_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def write_messages(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerFast", *, cue: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them, with the beginning of an answer if `cue`.

    Raises ValueError with the reason where the template refuses them, fails, or writes far more than they hold.
    """
    with _explain_refusal():
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue))
    _check_size(text, messages)
    return text


@contextlib.contextmanager
def _explain_refusal() -> Iterator[None]:
    """Raises ValueError with the reason for whatever a template raises."""
    try:
        yield
    except ImportError:  # of this machine, not of the template
        raise
    except Exception as error:  # a template is a program, and may raise whatever Python does
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(shorten(reason.partition("\n")[0])) from error


def _check_size(text: str, messages: list[dict[str, str]]) -> None:
    given = sum(len(message["content"]) for message in messages)
    if len(text) > _MOST_WRITTEN + 10 * given:
        raise ValueError(f"it writes {len(text):,} characters for {given:,}")


def open_chat_format(tokenizer: "PreTrainedTokenizerFast", repeated_roles: Literal["refuse", "merge"]) -> ChatFormat:
    """The format of a tokenizer's chat template."""
    chat = ChatFormat(tokenizer=tokenizer, takes_system=True, takes_repeats=True, repeated_roles=repeated_roles)
    user, answer = Turn(role="user", content="a"), Turn(role="assistant", content="b")
    system = Turn(role="system", content="c")
    return replace(
        chat,
        takes_system=_takes(chat, [system, user, answer], "c"),
        takes_repeats=_takes(chat, [user, user, answer]),
        bounded=_find_bounded(chat),
    )


def _find_bounded(chat: ChatFormat) -> BoundedTemplate | None:
    """The template with the bounds of its messages, where it has them and writes what the tokenizer writes."""
    if chat.tokenizer.chat_template is None:
        return None
    try:
        source, special_tokens = chat.tokenizer.get_chat_template(), chat.tokenizer.special_tokens_map
        bounded = bound_messages(source, {name: str(token) for name, token in special_tokens.items()})
    except ValueError:  # of several templates, none is the default
        return None
    faster, tried = replace(chat, bounded=bounded), [Turn(role=role, content=text) for role, text in _TRIED]
    try:
        write, reference = faster.open_beginnings(tried), chat.open_beginnings(tried)
        beginnings = itertools.product(range(1, len(tried) + 1), (False, True))
        is_same = all(write(count, cue) == reference(count, cue) for count, cue in beginnings)
    except ValueError:  # the template takes no such conversation
        return None
    return bounded if is_same else None


def _takes(chat: ChatFormat, turns: list[Turn], written: str = "") -> bool:
    """Whether the template writes these turns, and this text among them."""
    if chat.tokenizer.chat_template is None:
        return False
    try:
        return written in chat.write(turns)
    except ValueError:
        return False


def split_conversation(example: Example, chat: ChatFormat, report: Report) -> list[tuple[str, bool]]:
    """Splits a conversation, as the chat template writes it, before and after what the assistant says.

    Says of each piece whether it is learned. The model learns what follows the generation prompt
    (`add_generation_prompt`), up to the end-of-turn token but without the newline that the template adds after it: that
    is what it is to generate. Raises BadRecord if the template refuses the conversation.
    """
    if chat.tokenizer.chat_template is None:
        raise ValueError(
            f"{example.where}: a conversation needs a chat template, and {chat.tokenizer.name_or_path} has none; "
            "set data.tokenizer to one that has, such as google/gemma-2-2b-it"
        )
    turns = _arrange_turns(example, chat, report)
    try:
        write, done = chat.open_beginnings(turns), ""
        whole = write(len(turns), False)
        pieces = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = write(number, True)
            after = (write(number + 1, False) if number + 1 < len(turns) else whole).rstrip()
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                raise ValueError(f"it writes what leads up to message {number + 1} in another way when more follows")
            pieces += [(before.removeprefix(done), False), (after.removeprefix(before), turn.is_learned)]
            done = after
    except ValueError as error:
        raise BadRecord(
            example.where,
            "refused by the chat template",
            f"the chat template does not take these messages: {error}{_suggest_merging(turns, chat)}",
        ) from error
    return [*pieces, (whole.removeprefix(done), False)]


def _arrange_turns(example: Example, chat: ChatFormat, report: Report) -> list[Turn]:
    """The turns as the template takes them: system prompts moved, and consecutive turns of one role merged if asked."""
    turns = list(example.turns)
    if not chat.takes_system and any(turn.role == "system" for turn in turns):
        turns = move_system(turns)
        report.change(SYSTEM_MOVED, example.where)
    if not chat.takes_repeats and chat.repeated_roles == "merge" and _has_repeats(turns):
        turns = _merge_repeats(turns, example.where)
        report.change(TURNS_MERGED, example.where)
    return turns


def move_system(turns: Sequence[Turn]) -> list[Turn]:
    """Puts each system prompt before the user turn that follows it, or makes it one where none follows."""
    moved: list[Turn] = []
    for turn in turns:
        if moved and moved[-1].role == "system" and turn.role in ("system", "user"):
            moved[-1] = replace(turn, content=f"{moved[-1].content}\n\n{turn.content}")
        else:
            moved.append(turn)
    return [replace(turn, role="user") if turn.role == "system" else turn for turn in moved]


def _has_repeats(turns: list[Turn]) -> bool:
    return any(turn.role == following.role for turn, following in itertools.pairwise(turns))


def _merge_repeats(turns: list[Turn], where: str) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        if not merged or merged[-1].role != turn.role:
            merged.append(turn)
        elif merged[-1].is_learned == turn.is_learned:
            merged[-1] = replace(turn, content=f"{merged[-1].content}\n\n{turn.content}")
        else:
            raise BadRecord(
                where, "weight", "has consecutive answers of which one alone is learned; give them one weight"
            )
    return merged


def _suggest_merging(turns: list[Turn], chat: ChatFormat) -> str:
    if chat.takes_repeats or chat.repeated_roles == "merge" or not _has_repeats(turns):
        return ""
    return "; --data.repeated_roles merge joins consecutive turns of one role"
