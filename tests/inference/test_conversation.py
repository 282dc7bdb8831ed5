"""Conversations: what the model sees of them, answers that are stopped or cut, and files that training reads."""

import json
import resource
from functools import cache
from pathlib import Path

import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data.chat import open_chat_format
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.data.records import make_example
from gemma2_jax.inference.conversation import Conversation
from gemma2_jax.inference.settings import TextSettings

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
SETTINGS = TextSettings(max_new_tokens=20)
TURN = "<start_of_turn>{}\n{}<end_of_turn>\n"


@cache
def tiny_tokenizer():
    return load_tokenizer(ASSETS)


def encode(text: str) -> list[int]:
    return tiny_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids


class RepeatingEngine:
    """In place of an engine: the n-th request is answered by the n-th answer, a token at a time, and then ended."""

    def __init__(self, *answers: str, context: int = 512):
        self.context, self.answers, self.requests = context, [encode(answer) for answer in answers], []

    def submit(self, request):
        self.requests.append(request)

    @property
    def is_idle(self):
        return not self.requests or self.requests[-1].has_ended

    def advance(self):
        request = self.requests[-1]
        answer = [*self.answers[len(self.requests) - 1], 5]
        request.tokens.append(answer[len(request.tokens)])
        ended = request.tokens[-1] in request.stop
        request.reason = "stop" if ended else "length" if len(request.tokens) == request.max_new_tokens else None
        return [request]

    def seen(self) -> list[str]:
        """The prompts."""
        return [tiny_tokenizer().decode(request.prompt) for request in self.requests]


def converse(*answers: str, context: int = 512) -> tuple[Conversation, RepeatingEngine]:
    engine = RepeatingEngine(*answers, context=context)
    return Conversation(engine, open_chat_format(tiny_tokenizer(), "refuse"), frozenset([5])), engine


def ask(conversation: Conversation, message: str, settings=SETTINGS) -> str:
    return "".join(conversation.stream(conversation.ask(message, settings)))


def written(*turns: str) -> str:
    sides = [TURN.format(("user", "model")[number % 2], turn) for number, turn in enumerate(turns)]
    return f"<bos>{''.join(sides)}<start_of_turn>model\n"


def test_the_model_sees_the_whole_conversation():
    conversation, engine = converse("Yes.", "No.", "Maybe.")
    assert [ask(conversation, message) for message in ("A", "B")] == ["Yes.", "No."]
    assert conversation.undo() == "B"
    assert ask(conversation, "C") == "Maybe."
    assert engine.seen() == [written("A"), written("A", "Yes.", "B"), written("A", "Yes.", "C")]
    assert len({request.sample for request in engine.requests}) == 3  # a question again is not the same draw
    conversation.reset()
    with pytest.raises(ValueError, match="there is nothing to take back"):
        conversation.undo()


def test_a_system_prompt_comes_before_the_first_message():
    conversation, engine = converse("Yes.", "No.")
    conversation.system = "S"
    ask(conversation, "A")
    ask(conversation, "B")
    assert engine.seen() == [written("S\n\nA"), written("S\n\nA", "Yes.", "B")]


def test_what_outgrows_the_context_is_left_out_and_told():
    """Of a context of 64 tokens, until half of it is free."""
    conversation, engine = converse(*["word " * 8] * 7, context=64)
    conversation.system = "S"
    told = []
    for number in range(6):
        reply = conversation.ask(f"Q{number}", SETTINGS)
        list(conversation.stream(reply))
        told.append(reply.left_out)
    assert told[0] == 0 and sum(told) == conversation.left_out > 1 and 0 in told[1:]
    for request, prompt, left_out in zip(engine.requests, engine.seen(), told, strict=True):
        assert prompt.startswith("<bos><start_of_turn>user\nS\n\nQ") and len(request.prompt) < 64
        assert len(request.prompt) <= 32 or not left_out
    assert len(conversation.turns) == 12  # what /save writes is whole
    with pytest.raises(ValueError, match=r"the message has [0-9]+ tokens .*, and the context is 64; shorten it"):
        conversation.ask("word " * 80, SETTINGS)
    assert len(conversation.turns) == 12
    while len(conversation.turns) > 4:
        conversation.undo()
    ask(conversation, "Q6")
    assert "Q1" in engine.seen()[-1]  # the last that is there, although it was left out before


def test_an_answer_has_the_room_that_there_is():
    conversation, engine = converse("word " * 80, context=64)
    reply = conversation.ask("A", TextSettings(max_new_tokens=500))
    text = "".join(conversation.stream(reply))
    assert reply.tokens == reply.room == 64 - len(engine.requests[0].prompt)
    assert reply.completion.reason == "length" and conversation.turns[-1].content == text


@pytest.mark.parametrize("pieces", [0, 3])
def test_an_answer_that_is_stopped_is_what_there_is_of_it(pieces):
    """Nothing of it is no answer, and takes the question back."""
    conversation, engine = converse("one two three four five six", "Yes.")
    taken = []
    reply = conversation.ask("A", SETTINGS)
    if not pieces:
        engine.answers[0] = encode("日")[:1] * 20  # which is no text before the character is whole
    for piece in conversation.stream(reply, lambda: len(taken) >= pieces):
        taken.append(piece)
    assert reply.is_stopped and engine.requests[0].is_canceled and len(taken) == pieces
    assert [turn.content for turn in conversation.turns] == (["A", "".join(taken)] if pieces else [])
    assert ask(conversation, "B") == "Yes."


def test_stop_strings_end_an_answer():
    conversation, _ = converse("one two three")
    assert ask(conversation, "A", TextSettings(max_new_tokens=20, stop=(" t",))) == "one"
    assert conversation.turns[-1].content == "one"


def test_what_is_saved_is_read_by_training(tmp_path):
    """An empty answer too, of which nothing is learned; a file's last line may lack its end."""
    conversation, _ = converse("Yes.", "", "é\n")
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": []}')
    with pytest.raises(ValueError, match="there is nothing to save"):
        conversation.save(path)
    conversation.system = "S"
    for message in ("A", "B", "C"):
        ask(conversation, message)
    conversation.save(path)
    conversation.save(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and lines[1] == lines[2]
    turns = make_example(json.loads(lines[1]), "here", DataConfig()).turns
    assert [(turn.role, turn.content) for turn in turns] == [
        ("system", "S"), ("user", "A"), ("assistant", "Yes."), ("user", "B"), ("assistant", ""), ("user", "C"),
        ("assistant", "é\n"),
    ]  # fmt: skip
    assert [turn.is_learned for turn in turns if turn.role == "assistant"] == [True, False, True]
    with pytest.raises(ValueError, match="does not end with"):
        conversation.save(tmp_path / "chats")


def test_a_full_disk_leaves_what_was_saved_before(tmp_path):
    conversation, _ = converse("Yes.")
    ask(conversation, "A")
    path = tmp_path / "chats.jsonl"
    conversation.save(path)
    saved, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*chats\.jsonl'"):
            conversation.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == saved
