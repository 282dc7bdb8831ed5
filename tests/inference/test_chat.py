"""The chat: keys and commands, by a pipe in place of a terminal; a script of messages, against transformers."""

import io
import os
import re
import signal
import sys

import pytest
import torch
import transformers
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from test_conversation import ASSETS, SETTINGS, converse, written

from gemma2_jax import chat as chats
from gemma2_jax.chat import Chat
from gemma2_jax.inference import engine as engines


@pytest.fixture
def type_keys(monkeypatch, tmp_path, capsys):
    """Types keys into a chat whose answers are given; gives the chat, its engine, and what it printed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def run(keys: str, *answers: str, context: int = 512) -> tuple[Chat, object, str, str]:
        conversation, engine = converse(*answers, context=context)
        chat = Chat(conversation, SETTINGS, Console(stderr=True, width=200), is_terminal=True)
        with create_pipe_input() as pipe:
            pipe.send_text(keys)
            chats.talk(chat, chats.open_prompt(input=pipe, output=DummyOutput()))
        return chat, engine, *capsys.readouterr()

    return run


def test_messages_may_have_several_lines(type_keys, tmp_path):
    """Alt-Enter begins a line, and what is pasted is one message; Ctrl-C clears a line, and Ctrl-D ends."""
    keys = "a\x1b\rb\rwrong\x03\x1b[200~c\nd\x1b[201~\r//e\r   \r\x04"
    _, engine, out, _ = type_keys(keys, "Yes.", "No.", "\x1b[2J!")
    talk = ["a\nb", "Yes.", "c\nd", "No.", "/e"]
    assert engine.seen() == [written(*talk[:1]), written(*talk[:3]), written(*talk)]
    assert out == "Yes.\nNo.\n\\x1b[2J!\n"
    history = tmp_path / "gemma2_jax" / "chat_history"
    assert "+a\n+b\n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_an_answer_and_not_the_chat(type_keys, monkeypatch):
    stream = chats.command_line.escape
    seen = []

    def escape_and_interrupt(text, kept=""):
        seen.append(text)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return stream(text, kept)

    monkeypatch.setattr(chats.command_line, "escape", escape_and_interrupt)
    _, engine, out, said = type_keys("a\rb\r/quit\r", "one two three four five", "Yes.")
    first, second = out.splitlines()
    assert "one two three four five".startswith(first) and 0 < len(first) < 20 and second == "Yes."
    assert "; stopped)" in said
    assert engine.seen()[1] == written("a", first, "b")


def test_commands(type_keys, tmp_path):
    lines = [
        "/set temperature 0.5", "/set top_k none", "/set max_new_tokens 2", "a", "/set top_p 3", "/set zzz 3",
        "/set seed x", "/set", "/show", "/undo", "/undo", "/system S", "b", "/system", "/sav x", "/save",
        f"/save {tmp_path}/c.jsonl", "/save no/c.jsonl", "/help", "/reset", "/show", "/quit", "never",
    ]  # fmt: skip
    chat, engine, out, said = type_keys("".join(f"{line}\r" for line in lines), "one two three", "Yes")
    assert out == "one two\nYes\n"
    assert [request.sampling.temperature for request in engine.requests] == [0.5, 0.5]
    for sentence in (
        "(temperature 0.5, max_new_tokens 2)",
        "cut after max_new_tokens: /set max_new_tokens gives more)",
        "error: top_p is 3; it must be above 0 and at most 1, or unset",
        "error: there is no setting zzz; there are max_new_tokens, temperature",
        "error: seed is 'x'; it must be a whole number",
        "error: give a setting and its value, as in /set temperature 0.7; none is the default",
        "exchanges 1; ",
        "(taken back: a)",
        "error: there is nothing to take back",
        "(the system prompt is put before your first message, as in training: ",
        "(no system prompt)",
        "error: there is no command /sav; did you mean /save? /help lists them",
        "error: name a file, as in /save chats.jsonl",
        "error: there is no folder no; make it, or name another file",
        "c.jsonl now; python -m gemma2_jax.train --data.train reads it)",
        "/undo            take the last question and its answer back",
        "(a new conversation)",
        "exchanges 0; 0 of 512 tokens",
    ):
        assert sentence in said, sentence
    assert not chat.conversation.turns and len(engine.requests) == 2


def test_outgrowing_the_context_is_told(type_keys):
    _, _, _, said = type_keys(
        "".join(f"{letter}\r" for letter in "abcde") + "/show\r\x04", *["word " * 8] * 5, context=64
    )
    assert "(the conversation has outgrown the context: its beginning (" in said
    assert re.search(r"exchanges 5, [1-4] of them left out; ", said)
    _, _, _, said = type_keys("a\r" + "word " * 80 + "\r\x04", "word " * 80, context=64)
    assert "error: the message has" in said and "shorten it" in said


def test_a_terminal_needs_prompt_toolkit(monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(ValueError, match=r"pip install 'gemma2-jax\[chat\]'; without it, give messages on standard"):
        chats.open_prompt()


def test_a_chat_goes_without_its_history(type_keys, tmp_path):
    (tmp_path / "gemma2_jax").write_text("")
    *_, out, said = type_keys("a\r\x04", "Yes.")
    assert out == "Yes.\n" and "note: what you type is not kept for the next time (" in said


def transformers_chat(*messages: str, new: int) -> list[str]:
    """The answers of transformers, each with all of the conversation before it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS)
    model = transformers.Gemma2ForCausalLM.from_pretrained(ASSETS, attn_implementation="eager", dtype=torch.float32)
    talk, answers = [], []
    for message in messages:
        talk.append({"role": "user", "content": message})
        tokens = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = model.generate(**tokens, do_sample=False, max_new_tokens=new, eos_token_id=[1, 5])
        answers.append(tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
        talk.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_script_is_answered_as_transformers_answers(monkeypatch, capsys):
    """Of the conversation, the engine reads what is new; a line that is refused is told at the end."""
    messages = ["What is the abc module?", "abc"]
    read, read_parts = [], engines._read_parts

    def count_tokens(graph, weights, state, parts):
        read.append(int(parts.length_B.sum()))
        return read_parts(graph, weights, state, parts)

    monkeypatch.setattr(engines, "_read_parts", count_tokens)
    monkeypatch.setattr(engines.Engine, "warm", lambda self: None)  # half of the programs are not used here
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{messages[0]}\n/nope\n\n{messages[1]}\n"))
    arguments = "--checkpoint", str(ASSETS), "--context", "64", "--max-new-tokens", "8"
    monkeypatch.setattr(sys, "argv", ["chat", *arguments])
    with pytest.raises(SystemExit, match=r"error: 1 line of standard input could not be taken"):
        chats.main()
    out, said = capsys.readouterr()
    assert out == "".join(f"{answer}\n" for answer in transformers_chat(*messages, new=8))
    assert "error: line 2: there is no command /nope;" in said
    assert "model     huggingface " in said and "context   64 tokens" in said
    first, second = read
    assert second < first < 20  # of both prompts: 16 tokens; and 8 of the answer, and another turn
