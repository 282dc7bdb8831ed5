"""A file of prompts, line by line, as requests: JSON lines and the other text formats that training data has.

A line has a `prompt`, or the `messages` of a conversation; it may have settings of its own (`settings.NUMBERS`), and
whatever else its owner wants to find beside the answer. One that cannot be answered says why, and holds up no other.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.data.chat import ChatFormat, open_chat_format
from gemma2_jax.data.reading import files, formats, places
from gemma2_jax.data.reading.places import Part, Piece
from gemma2_jax.data.records import BadRecord, read_turns
from gemma2_jax.data.wording import describe_kind, quote, quote_list
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.engine import Request
from gemma2_jax.inference.loaded import complete_config
from gemma2_jax.inference.settings import NUMBERS, TextSettings
from gemma2_jax.inference.text import encode_prompt, encode_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWER_KEYS = ("line", "sample", "text", "reason", "tokens", "error")  # that a line of answers has besides its prompt's
_OPTIONS = ("stop", "samples", "logit_bias")  # that are of all lines
_SHORTEST = 4  # letters of a key that is taken for the beginning of a setting: temp
_ENDINGS = tuple(ending for ending in formats.TEXT_ENDINGS if ending != ".txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a file of prompts."""

    where: str  # file:line
    record: Mapping[str, Any]  # empty where it holds no object
    error: str = ""  # why it is none

    @property
    def number(self) -> int:
        """In the file, from 1."""
        return int(self.where.rpartition(":")[2])


def find_prompts(path: str) -> Part:
    """A file of prompts, unread. Raises ValueError where there is none."""
    ending, _ = places.split_ending(path)
    if ending not in _ENDINGS:
        raise ValueError(f"{path} is no file of prompts by its name; they end with {', '.join(_ENDINGS)}, or .gz")
    found = files.list_files(path).files
    if len(found) != 1 or found[0].below:
        kind = "a folder" if found else "no file but a pipe or a device" if os.path.exists(path) else "not there"
        raise ValueError(f"{path} is {kind}; name a file of prompts")
    return Part(path=found[0].path, size=found[0].size, mark=found[0].mark, label=path)


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a file, in bounded memory. Raises ValueError where there is no such file, or it cannot be read."""
    for where, record, _ in places.read_piece(Piece(parts=(find_prompts(path),))):
        if isinstance(record, BadRecord):
            yield Line(where=where, record={}, error=str(record))
        elif isinstance(record, dict):
            yield Line(where=where, record=record)
        else:
            error = f'{where}: holds {describe_kind(record)}; a line is an object, such as {{"prompt": "..."}}'
            yield Line(where=where, record={}, error=error)


def list_doubtful_keys(line: Line) -> Iterator[tuple[str, str]]:
    """Keys of a line that may be meant as settings and are none, each with a sentence on it."""
    for key in line.record:
        near = _find_setting(key) if isinstance(key, str) else ""
        if near and (near == key or near not in line.record):
            kept = f"{line.where} has {quote(key)}, which is no setting of a line, and is repeated beside the answer"
            meant = f"--{near.replace('_', '-')} sets it for all lines" if near in _OPTIONS else f"did you mean {near}?"
            yield key, f"{kept}; {meant}"


@lru_cache(1024)
def _find_setting(key: str) -> str:
    """The setting that a key is most like, which is none itself; empty where it is like none."""
    if key in NUMBERS:
        return ""
    if key in _OPTIONS:
        return key
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, NUMBERS, n=1, cutoff=0.8)
    longer = [name for name in NUMBERS if len(plain) >= _SHORTEST and name.startswith(plain)]
    return [*near, *longer, ""][0]


@dataclass(frozen=True)
class Encoder:
    """Makes requests of lines. What a line does not say itself is as given here."""

    checkpoint: Checkpoint
    tokenizer: "PreTrainedTokenizerFast"
    chat: bool  # a `prompt` is what a user says
    settings: TextSettings

    def make_request(self, line: Line) -> Request:
        """The request of a line. Raises ValueError, with the line's place, where it is none."""
        if line.error:
            raise ValueError(line.error)
        if reserved := [key for key in ANSWER_KEYS if key in line.record]:
            raise ValueError(
                f"{line.where}: has {quote_list(reserved)}, which the answer has too; call it something else"
            )
        try:
            settings = self.settings.change({key: x for key, x in line.record.items() if x is not None})
            is_talk, prompt = self._encode(line)
            self._check_length(len(prompt), settings.max_new_tokens)
        except BadRecord:
            raise
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
        stop = self._chat_stop if is_talk else self._stop
        return Request(prompt=prompt, max_new_tokens=settings.max_new_tokens, sampling=settings.sampling, stop=stop)

    def _encode(self, line: Line) -> tuple[bool, list[int]]:
        """Whether a line is of a conversation, and its tokens."""
        record = line.record
        if ("prompt" in record) == ("messages" in record):
            has = f"it has {quote_list(record) or 'nothing'}"
            raise ValueError(f"a line has either a 'prompt' or 'messages', and {has}")
        if "prompt" in record:
            if not isinstance(record["prompt"], str):
                raise ValueError(f"'prompt' is {describe_kind(record['prompt'])}; it must be a text")
            return self.chat, encode_prompt(record["prompt"], self.tokenizer, chat=self.chat)
        turns = read_turns(dict(record), "messages", line.where)
        if not turns or turns[-1].role == "assistant":
            ends = "end with an answer" if turns else "are none"
            raise ValueError(f"'messages' {ends}; the last is to be one that the model answers")
        return True, encode_turns(turns, self._format)

    def _check_length(self, prompt: int, new: int) -> None:
        context = complete_config(self.checkpoint).max_length
        if prompt + new > context:
            raise ValueError(
                f"the prompt has {prompt} tokens, with {new} new ones {prompt + new}, and the model's context is "
                f"{context}; shorten the prompt, or ask for fewer"
            )

    @cached_property
    def _format(self) -> ChatFormat:
        return open_chat_format(self.tokenizer, "refuse")

    @cached_property
    def _stop(self) -> frozenset[int]:
        return frozenset(stop_tokens(self.checkpoint, self.tokenizer, chat=self.chat))

    @cached_property
    def _chat_stop(self) -> frozenset[int]:
        return frozenset(stop_tokens(self.checkpoint, self.tokenizer, chat=True))


def copy_keys(record: Mapping[str, Any], without: Sequence[str] = ANSWER_KEYS) -> dict[str, Any]:
    """A line's own keys, as its answer repeats them."""
    return {key: value for key, value in record.items() if key not in without}
