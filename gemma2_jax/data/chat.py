"""A conversation as the tokenizer's chat template writes it, in pieces of which some are learned.

What a template does not take is found by trying it once: Gemma 2's has no place for a system prompt, and has the two
sides alternate. `encoding` makes tokens of the pieces.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from gemma2_jax.data.records import BadRecord, Example, Turn
from gemma2_jax.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM_MOVED = "the system prompt was put before the next user turn, as the chat template has no place for it"
TURNS_MERGED = "consecutive turns of one role were merged (data.repeated_roles)"

_MOST_WRITTEN = 1_000_000  # characters; the descriptions of tools that a template has in it are a few thousand


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A chat template, and which conversations it takes."""

    tokenizer: "PreTrainedTokenizerFast"
    takes_system: bool
    takes_repeats: bool
    repeated_roles: Literal["refuse", "merge"]

    def write(self, turns: Sequence[Turn], *, cue: bool = False) -> str:
        """The conversation's text, with the beginning of an answer if `cue`. Raises ValueError as `write_messages`."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return write_messages(messages, self.tokenizer, cue=cue)


def write_messages(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerFast", *, cue: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them, with the beginning of an answer if `cue`.

    Raises ValueError with the reason where the template refuses them, fails, or writes far more than they hold.
    """
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue))
    except ImportError:  # of this machine, not of the template
        raise
    except Exception as error:  # a template is a program, and may raise whatever Python does
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(reason.partition("\n")[0]) from error
    given = sum(len(message["content"]) for message in messages)
    if len(text) > _MOST_WRITTEN + 10 * given:
        raise ValueError(f"it writes {len(text):,} characters for {given:,}")
    return text


def open_chat_format(tokenizer: "PreTrainedTokenizerFast", repeated_roles: Literal["refuse", "merge"]) -> ChatFormat:
    """The format of a tokenizer's chat template."""
    chat = ChatFormat(tokenizer=tokenizer, takes_system=True, takes_repeats=True, repeated_roles=repeated_roles)
    user, answer = Turn(role="user", content="a"), Turn(role="assistant", content="b")
    system = Turn(role="system", content="c")
    return replace(
        chat, takes_system=_takes(chat, [system, user, answer], "c"), takes_repeats=_takes(chat, [user, user, answer])
    )


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
        whole, done = chat.write(turns), ""
        pieces = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = chat.write(turns[:number], cue=True)
            after = (chat.write(turns[: number + 1]) if number + 1 < len(turns) else whole).rstrip()
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
        turns = _move_system(turns)
        report.change(SYSTEM_MOVED, example.where)
    if not chat.takes_repeats and chat.repeated_roles == "merge" and _has_repeats(turns):
        turns = _merge_repeats(turns, example.where)
        report.change(TURNS_MERGED, example.where)
    return turns


def _move_system(turns: list[Turn]) -> list[Turn]:
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
