"""`python -m gemma2_jax.chat --checkpoint PATH`: a conversation with any checkpoint, in a terminal or by a script.

`inference.conversation` holds the conversation; here are the keys, the commands, and what is printed. Answers go to
standard output, all else to standard error. Nothing here imports JAX before the arguments are understood.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gemma2_jax import command_line
from gemma2_jax.cluster import platforms
from gemma2_jax.inference.settings import GREEDY, NUMBERS, Sampling, TextSettings
from gemma2_jax.inference.source import Source, find_suggestion, load_source, open_source

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.inference.conversation import Conversation, Reply

_STEPS = 4  # tokens that come at a time, at most: more would come in jerks
_KEYS = "Enter sends, Alt-Enter begins a line; Ctrl-C stops an answer, Ctrl-D ends; /help lists the commands"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Holds a conversation with a Gemma 2 checkpoint of any format.

    Of standard input that is no terminal, each line is a message.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    max_new_tokens: int = 1024  # an answer ends after so many, or with an eos_token_id or the end of a turn
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # an answer ends before this; give it again for several
    context: int | None = None  # tokens of the conversation; None: as many as the model takes
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY

    def __post_init__(self) -> None:
        self.make_settings()  # which checks them

    def make_settings(self) -> TextSettings:
        """How answers are generated. Raises ValueError where they cannot be."""
        return TextSettings(max_new_tokens=self.max_new_tokens, sampling=self.sampling, stop=self.stop)


def main(program: str = "python -m gemma2_jax.chat") -> None:
    """Parses, loads, and talks until the user ends it; exits with a sentence where that cannot be done."""
    command = command_line.parse(Command, sys.argv[1:], program)
    platforms.prepare_process()
    with command_line.exit_with_sentence():
        if sys.stdin is None:
            raise ValueError("standard input is closed; give messages, one a line")
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        prompt = open_prompt() if is_terminal else None
        platforms.check_platform()
        chat = _open_chat(command, is_terminal=is_terminal)
        if prompt is None:
            _read_script(chat)
        else:
            talk(chat, prompt)


def _open_chat(command: Command, *, is_terminal: bool) -> "Chat":
    checkpoint, tokenizer = open_source(command.source)
    from rich.console import Console

    from gemma2_jax.data.chat import open_chat_format
    from gemma2_jax.inference.clock import Clock
    from gemma2_jax.inference.conversation import Conversation
    from gemma2_jax.inference.defaults import stop_tokens
    from gemma2_jax.inference.engine import Engine, count_slots
    from gemma2_jax.training.progress import print_block

    if tokenizer.chat_template is None:
        raise ValueError(
            f"{checkpoint.path} has no chat template; use the checkpoint of a model that answers, such as "
            "google/gemma-2-2b-it, or continue texts: python -m gemma2_jax.generate"
        )
    console, clock = Console(stderr=True, highlight=False), Clock()
    with console.status("loading weights"):
        decoder = load_source(command.source, checkpoint)
    context = decoder.config.max_length if command.context is None else command.context
    with console.status("compiling"):
        slots = min(count_slots(decoder, max(context, 1)), 1)  # which raises ValueError where not even one fits
        engine = Engine(decoder, slots=slots, context=context, steps=_STEPS)
        engine.warm()
    stop = frozenset(stop_tokens(checkpoint, tokenizer, chat=True))
    conversation = Conversation(engine, open_chat_format(tokenizer, "refuse"), stop)
    chat = Chat(conversation, command.make_settings(), console, is_terminal=is_terminal)
    print_block(console, [*_describe_start(command, checkpoint, chat, decoder.place, clock.compiling)])
    return chat


def _describe_start(
    command: Command, checkpoint: "Checkpoint", chat: "Chat", place: str, compiling: float
) -> Iterator[tuple[str, str]]:
    from gemma2_jax.inference.loaded import default_dtype

    adapter = f" with {command.source.adapter}" if command.source.adapter else ""
    yield "model", command_line.escape(f"{checkpoint.format} {command.source.checkpoint}{adapter}")
    weights = ", weights in int8" if command.source.int8 else ""
    yield "computes", f"{command.source.dtype or default_dtype()}{weights} on {place}; compiled in {compiling:.1f} s"
    yield "context", f"{chat.conversation.context:,} tokens"
    yield "settings", chat.describe_settings()
    if suggestion := find_suggestion(checkpoint, command.sampling):
        yield "suggested", ", ".join(f"/set {name} {value}" for name, value in suggestion.items())
    if chat.is_terminal:
        yield "keys", _KEYS


class Chat:
    """What is said to a conversation, message or command, and what is printed of it."""

    def __init__(self, conversation: "Conversation", settings: TextSettings, console: "Console", *, is_terminal: bool):
        self.conversation = conversation
        self.settings = settings
        self.console = console
        self.is_terminal = is_terminal
        self.has_ended = False

    def take(self, text: str) -> None:
        """Answers a message, or does what a command says. Raises ValueError where that cannot be done."""
        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            self._run(text)
        else:
            self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def say(self, text: str) -> None:
        """Prints a remark, which is no part of the conversation."""
        self.console.print(command_line.escape(text, "\n"), style="dim", markup=False, soft_wrap=not self.is_terminal)

    def _answer(self, message: str) -> None:
        reply = self.conversation.ask(message, self.settings)
        if reply.left_out:
            self.say(
                "(the conversation has outgrown the context: its beginning "
                f"({_count(self.conversation.left_out, 'exchange')}) is left out from here on; /reset begins anew)"
            )
        with contextlib.ExitStack() as stack:
            caught = stack.enter_context(command_line.catch_signals(signal.SIGINT)) if self.is_terminal else []
            for piece in self.conversation.stream(reply, lambda: bool(caught)):
                print(command_line.escape(piece, "\n\t") if self.is_terminal else piece, end="", flush=True)
        print(flush=True)
        self.say(self._describe_reply(reply))

    def _describe_reply(self, reply: "Reply") -> str:
        """How fast an answer came, and why it ended where that is not for the model to say."""
        seconds = reply.seconds - reply.first_seconds
        speed = f", {(reply.tokens - 1) / seconds:,.0f} tokens/s" if reply.tokens > 1 and seconds > 0 else ""
        words = f"({_count(reply.tokens, 'token')}, the first after {reply.first_seconds:.2f} s{speed}"
        if reply.is_stopped:
            words += (
                "; stopped" if reply.completion.text else "; stopped before there was any, and the question with it"
            )
        elif reply.completion.reason == "length" and reply.tokens == reply.room:
            words += "; cut, as the context is full: /reset begins anew"
        elif reply.completion.reason == "length":
            words += "; cut after max_new_tokens: /set max_new_tokens gives more"
        elif not reply.completion.text.strip():
            words += "; the answer is empty"
        return f"{words})"

    def _run(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if name not in _COMMANDS:
            near = command_line.suggest(name, _COMMANDS)
            near = near.replace("mean ", "mean /")
            raise ValueError(
                f"there is no command /{name}{near or ';'} /help lists them, and a message that begins with / is "
                "written with //"
            )
        _COMMANDS[name].run(self, rest.strip())

    def describe_settings(self) -> str:
        """The settings that differ from those of no option, and how long an answer may be."""
        sampling = self.settings.sampling
        names = [name for name in NUMBERS if getattr(sampling, name, None) != getattr(GREEDY, name, None)]
        words = [f"{name} {getattr(sampling, name)}" for name in names]
        if sampling.temperature == 0:
            words.insert(0, "the most likely tokens (temperature 0)")
        if sampling.logit_bias:
            words.append(f"logit_bias of {_count(len(sampling.logit_bias), 'token')}")
        words += [f"stop {string!r}" for string in self.settings.stop]
        return ", ".join([*words, f"max_new_tokens {self.settings.max_new_tokens}"])

    def list_commands(self, rest: str) -> None:
        width = max(len(command.usage) for command in _COMMANDS.values()) + 2
        self.say("\n".join(f"{command.usage:{width}}{command.summary}" for command in _COMMANDS.values()))
        if self.is_terminal:
            self.say(_KEYS)

    def reset(self, rest: str) -> None:
        self.conversation.reset()
        self.say("(a new conversation)")

    def change_setting(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name and name not in NUMBERS:
            near = command_line.suggest(name, NUMBERS)
            raise ValueError(f"there is no setting {name}{near or ';'} there are {', '.join(NUMBERS)}")
        if not name or not value.strip():
            raise ValueError("give a setting and its value, as in /set temperature 0.7; none is the default")
        self.settings = self.settings.change({name: _read_number(value.strip())})
        self.say(f"({self.describe_settings()})")

    def show(self, rest: str) -> None:
        talk = self.conversation
        seen = f", {talk.left_out} of them left out" if talk.left_out else ""
        self.say(f"settings  {self.describe_settings()}")
        self.say(f"system    {talk.system or 'none'}")
        self.say(f"exchanges {len(talk.turns) // 2}{seen}; {talk.count_tokens():,} of {talk.context:,} tokens")

    def set_system(self, rest: str) -> None:
        self.conversation.system = rest
        if not rest:
            self.say("(no system prompt)")
        elif self.conversation.chat.takes_system:
            self.say("(the system prompt is set)")
        else:
            self.say(
                "(the system prompt is put before your first message, as in training: this model's chat template has "
                "no place for one)"
            )

    def undo(self, rest: str) -> None:
        question = self.conversation.undo()
        self.say(f"(taken back: {command_line.escape(question)[:60]})")

    def save(self, rest: str) -> None:
        if not rest:
            raise ValueError("name a file, as in /save chats.jsonl")
        path = Path(rest).expanduser()
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}; make it, or name another file")
        self.conversation.save(path)
        self.say(f"(the conversation is a line of {path} now; python -m gemma2_jax.train --data.train reads it)")

    def quit(self, rest: str) -> None:
        self.has_ended = True


@dataclass(frozen=True)
class _ChatCommand:
    usage: str
    summary: str
    run: Callable[[Chat, str], None]


_COMMANDS = {
    command.usage[1:].partition(" ")[0]: command
    for command in (
        _ChatCommand("/help", "list the commands", Chat.list_commands),
        _ChatCommand("/reset", "begin a new conversation", Chat.reset),
        _ChatCommand("/undo", "take the last question and its answer back", Chat.undo),
        _ChatCommand("/system TEXT", "what the model is told first; without TEXT, nothing", Chat.set_system),
        _ChatCommand("/set NAME VALUE", "change a setting, such as temperature 0.7", Chat.change_setting),
        _ChatCommand("/show", "the settings, and how full the context is", Chat.show),
        _ChatCommand("/save FILE", "add the conversation to FILE, as training reads it", Chat.save),
        _ChatCommand("/quit", "end", Chat.quit),
    )
}


def _read_number(text: str) -> int | float | str | None:
    if text.lower() == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def talk(chat: Chat, prompt: "PromptSession[str]") -> None:
    """Takes what the user types, until the user ends it."""
    while not chat.has_ended:
        try:
            text = prompt.prompt()
        except KeyboardInterrupt:  # which clears what is typed
            continue
        except EOFError:
            return
        try:
            chat.take(text)
        except (ValueError, OSError) as error:
            chat.say(f"error: {command_line.describe_error(error)}")


def _read_script(chat: Chat) -> None:
    """Takes each line of standard input. Raises ValueError at the end where one of them was refused."""
    refused = 0
    try:
        for number, line in enumerate(sys.stdin, 1):
            try:
                chat.take(line.rstrip("\n"))
            except ValueError as error:
                refused += 1
                chat.say(f"error: line {number}: {error}")
            if chat.has_ended:
                break
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}); give messages as UTF-8") from error
    if refused:
        raise ValueError(f"{_count(refused, 'line')} of standard input could not be taken")


def open_prompt(**options) -> "PromptSession[str]":
    """Where messages are typed, with those of earlier conversations. `options` are of `PromptSession`.

    Raises ValueError without prompt_toolkit.
    """
    try:
        from prompt_toolkit import PromptSession
    except ImportError as error:
        raise ValueError(
            "the chat in a terminal needs prompt_toolkit: pip install 'gemma2-jax[chat]'; without it, give messages on "
            "standard input, one a line"
        ) from error
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=_open_history(),
        enable_history_search=True,
        **options,
    )


def _open_history():
    """The file of what was typed before; in memory where there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    states = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = states / "gemma2_jax" / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        command_line.notify(f"note: what you type is not kept for the next time ({path}: {error.strerror})")
        return InMemoryHistory()
    return FileHistory(path)


if __name__ == "__main__":
    main()
