"""A conversation with a model: its turns, and the model's answers as they come. It knows no terminal.

The whole conversation is the prompt of each answer. The engine finds what of it is in the row of its slot already, so
that only what is new is read, however long the conversation has become.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from gemma2_jax.data.chat import ChatFormat
from gemma2_jax.data.records import Turn
from gemma2_jax.inference.completion import Completion
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.inference.settings import TextSettings
from gemma2_jax.inference.text import encode_turns

_LEAST_SHARE = 4  # an answer has room for the context's length divided by this, unless fewer tokens are asked for


@dataclass
class Reply:
    """An answer: how it came, once it is whole."""

    completion: Completion
    room: int  # tokens that the context has for it
    left_out: int  # exchanges at the beginning that the model does not see any more, and did until now
    is_stopped: bool = False
    first_seconds: float = 0.0  # until its first token was there
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """How many it has, with the one that ends it."""
        return len(self.completion.pieces)


class Conversation:
    """Turns of a user and a model, on an engine of one slot."""

    def __init__(self, engine: Engine, chat: ChatFormat, stop: frozenset[int]):
        """`stop` has the tokens that end an answer."""
        self.turns: list[Turn] = []  # of user and assistant, in turn
        self.system = ""
        self.chat = chat
        self.context = engine.context
        self._engine, self._stop = engine, stop
        self._first = 0  # of the turns, that the model sees
        self._asked = 0  # so that a question that is asked again is answered otherwise, where answers are drawn

    def ask(self, message: str, settings: TextSettings) -> Reply:
        """Begins an answer, which `stream` gives. Raises ValueError where there can be none."""
        turns = [*self.turns, Turn(role="user", content=message)]
        first, prompt = self._fit(turns, settings.max_new_tokens)
        room = self.context - len(prompt)
        request = Request(
            prompt=prompt,
            max_new_tokens=min(settings.max_new_tokens, room),
            sampling=settings.sampling,
            sample=self._asked,
            stop=self._stop,
        )
        completion = Completion(request, self.chat.tokenizer, settings.stop)
        self._engine.submit(request)
        left_out, self._first = max(first - self._first, 0) // 2, first
        self._asked += 1
        self.turns = turns
        return Reply(completion, room, left_out)

    def stream(self, reply: Reply, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The text of an answer as it comes. Stopped, the answer is what there is of it; nothing of it is no answer."""
        completion, began = reply.completion, time.perf_counter()
        while completion.reason is None and not reply.is_stopped:
            self._engine.advance()
            piece = completion.take()
            if completion.pieces and not reply.first_seconds:
                reply.first_seconds = time.perf_counter() - began
            if piece:
                yield piece
            reply.is_stopped = completion.reason is None and is_stopped()
        reply.seconds = time.perf_counter() - began
        completion.request.is_canceled = reply.is_stopped
        while not self._engine.is_idle:  # a call may be under way
            self._engine.advance()
        if reply.is_stopped and not completion.text:
            del self.turns[-1:]
        else:
            self.turns.append(Turn(role="assistant", content=completion.text))

    def _fit(self, turns: list[Turn], new: int) -> tuple[int, list[int]]:
        """The first turn that the model sees, and the prompt.

        Where the context has no room for an answer, as many exchanges are left out at the beginning as leave half of
        it free, so that the next questions need not leave out more.
        """
        first = self._first
        prompt = self._encode(turns[first:])
        if len(prompt) + min(new, self.context // _LEAST_SHARE) > self.context:
            while len(prompt) > self.context // 2 and first < len(turns) - 1:
                first += 2
                prompt = self._encode(turns[first:])
        if len(prompt) >= self.context:
            raise ValueError(
                f"the message has {len(prompt):,} tokens as the chat template writes it, and the context is "
                f"{self.context:,}; shorten it"
            )
        return first, prompt

    def _encode(self, turns: list[Turn]) -> list[int]:
        system = [Turn(role="system", content=self.system)] if self.system else []
        return encode_turns([*system, *turns], self.chat)

    def count_tokens(self) -> int:
        """How many tokens of the context the conversation takes."""
        return min(len(self._encode(self.turns[self._first :])), self.context) if self.turns else 0

    @property
    def left_out(self) -> int:
        """Exchanges at the beginning that the model does not see any more."""
        return self._first // 2

    def undo(self) -> str:
        """Takes the last question and its answer back; returns the question. Raises ValueError where there is none."""
        if not self.turns:
            raise ValueError("there is nothing to take back")
        question = self.turns[-2].content
        del self.turns[-2:]
        self._first = min(self._first, max(len(self.turns) - 2, 0))  # so that the model sees an exchange, where one is
        return question

    def reset(self) -> None:
        """Begins a new conversation, with the same system prompt."""
        self.turns, self._first = [], 0

    def save(self, path: Path) -> None:
        """Adds the conversation to a file as a line that training reads.

        An empty answer gets the weight 0, with which training learns nothing of it.
        """
        if path.suffix not in (".jsonl", ".ndjson"):
            raise ValueError(f"{path} does not end with .jsonl, as the data of training does; give such a name")
        if not self.turns:
            raise ValueError("there is nothing to save")
        turns = [Turn(role="system", content=self.system)] if self.system else []
        messages = [_to_message(turn) for turn in (*turns, *self.turns)]
        line = json.dumps({"messages": messages}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with path.open("a+b", buffering=0) as file:
            end = file.tell()
            if end:
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line
            _write_all(file, line, end, path)


def _write_all(file: FileIO, text: bytes, end: int, path: Path) -> None:
    """Adds a text to a file of so many bytes. Raises OSError, after which the file is as it was, as on a full disk."""
    rest = memoryview(text)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(end)
        error.filename = str(path)
        raise


def _to_message(turn: Turn) -> dict[str, str | int]:
    message: dict[str, str | int] = {"role": turn.role, "content": turn.content}
    return message if turn.content.strip() or turn.role != "assistant" else message | {"weight": 0}
