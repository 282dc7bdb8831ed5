"""`python -m gemma2_jax.generate --checkpoint PATH --prompt TEXT`: text from any checkpoint. The command line only.

It opens the checkpoint (`convert`), hands prompts to the generator (`inference`), and prints what comes.
Nothing here imports JAX before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gemma2_jax import command_line, megatron_bridge
from gemma2_jax.cluster import platforms
from gemma2_jax.inference.settings import GREEDY, Sampling, TextSettings
from gemma2_jax.inference.source import Source, load_source, open_source, print_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.inference.batch import Answers, Batch, Survey
    from gemma2_jax.inference.completion import Completion
    from gemma2_jax.inference.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Command:
    """Continues prompts, or answers them (--chat), with a checkpoint of any format.

    Text goes to standard output; how fast it came, to standard error.

    --prompts and --out answer a file into a file; the same command goes on.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # give it again for several; none: standard input is one
    prompts: str | None = None  # or a file of them: JSON lines, each with a "prompt" or the "messages" of a chat
    out: str | None = None  # the file that answers to --prompts are added to, as JSON lines
    strict: bool = False  # with --prompts: generate nothing if any of them cannot be answered
    chat: bool = False  # prompts are what a user says: write them as the tokenizer's chat template does
    max_new_tokens: int = 100  # a text ends after so many, or with an eos_token_id or (--chat) the end of a turn
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # a text ends before this; give it again for several
    samples: int = 1  # texts of each prompt
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY

    def __post_init__(self) -> None:
        command_line.check_paths(self, "prompts", "out")
        self.make_settings()  # which checks them
        if self.prompts and (self.prompt or not self.out):
            raise ValueError("prompts and prompt are both given" if self.prompt else "prompts is given, and out is not")
        if self.prompts and self.out and os.path.realpath(self.prompts) == os.path.realpath(self.out):
            raise ValueError(f"prompts and out are both {self.out}; name another file for the answers")
        if not self.prompts and (self.out or self.strict):
            raise ValueError(f"{'out' if self.out else 'strict'} is given, and prompts, which it is for, is not")

    def make_settings(self) -> TextSettings:
        """How texts are generated. Raises ValueError where they cannot be."""
        return TextSettings(
            max_new_tokens=self.max_new_tokens, sampling=self.sampling, stop=self.stop, samples=self.samples
        )


def main(program: str = "python -m gemma2_jax.generate") -> None:
    """Parses, loads, generates; exits with a sentence where that cannot be done."""
    arguments = megatron_bridge.translate_generate_arguments(sys.argv[1:])
    command = command_line.parse(Command, arguments, program)
    platforms.prepare_process()
    with command_line.exit_with_sentence("; the same command goes on behind what is there" if command.prompts else ""):
        platforms.check_platform()
        checkpoint, tokenizer = open_source(command.source)
        if command.prompts:
            _answer_file(command, checkpoint, tokenizer)
        else:
            _generate(command, checkpoint, tokenizer)


def _generate(command: Command, checkpoint: "Checkpoint", tokenizer: "PreTrainedTokenizerFast") -> None:
    from gemma2_jax.inference.completion import Completion
    from gemma2_jax.inference.defaults import stop_tokens
    from gemma2_jax.inference.engine import Request, make_engine
    from gemma2_jax.inference.text import encode_prompt

    prompts = command.prompt or (_read_prompt(),)
    tokens = [encode_prompt(prompt, tokenizer, chat=command.chat) for prompt in prompts]
    stop = frozenset(stop_tokens(checkpoint, tokenizer, chat=command.chat))
    print_defaults(checkpoint, tokenizer, stop, command.sampling, command.max_new_tokens)
    new_request = partial(Request, max_new_tokens=command.max_new_tokens, sampling=command.sampling, stop=stop)
    requests = [new_request(prompt=row, sample=sample) for row in tokens for sample in range(command.samples)]
    engine = make_engine(load_source(command.source, checkpoint), requests)
    for request in requests:
        engine.submit(request)
    samples = [f".{sample}" for sample in range(1, command.samples + 1)] if command.samples > 1 else [""]
    labels = [f"[{number}{sample}] {prompt}" for number, prompt in enumerate(prompts, 1) for sample in samples]
    _print_texts(engine, labels, [Completion(request, tokenizer, command.stop) for request in requests])


def _read_prompt() -> str:
    if sys.stdin is None:
        raise ValueError("standard input is closed; give the prompt as --prompt TEXT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}); give the prompt as UTF-8") from error


def _print_texts(engine: "Engine", labels: Sequence[str], completions: "list[Completion]") -> None:
    """Prints one text as its tokens come, several when they are whole and labeled, and how fast they came."""
    from gemma2_jax.inference.clock import Clock, describe_speed

    clock = Clock()
    began = clock()
    first, first_tokens = None, 0
    while not engine.is_idle:
        engine.advance()
        pieces = [completion.take() for completion in completions]
        if len(labels) == 1:
            print(pieces[0], end="", flush=True)
        if first is None and all(completion.request.tokens for completion in completions):
            first, first_tokens = clock(), sum(len(completion.request.tokens) for completion in completions)
    if len(labels) == 1:
        print()
    else:
        for label, completion in zip(labels, completions, strict=True):
            print(f"{label}\n{completion.text}\n")
    assert first is not None
    prompt_tokens = sum(len(completion.request.prompt) for completion in completions)
    new_tokens = sum(len(completion.request.tokens) for completion in completions)
    prefill = describe_speed(prompt_tokens, first - began)
    decode = describe_speed(new_tokens - first_tokens, clock() - first)
    print(f"prefill {prefill}; decode {decode}; compiled in {clock.compiling:.1f} s", file=sys.stderr)


def _answer_file(command: Command, checkpoint: "Checkpoint", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Answers the prompts of a file into another. Ends with a status that says whether all of them were answered."""
    from rich.console import Console
    from rich.text import Text

    from gemma2_jax.inference.batch import Answers, Batch, describe_settings
    from gemma2_jax.inference.prompts import Encoder, find_prompts

    assert command.prompts and command.out  # Command made sure
    find_prompts(command.prompts)  # before a file of answers is made
    encoder = Encoder(checkpoint, tokenizer, command.chat, command.make_settings())
    batch = Batch(path=command.prompts, encoder=encoder)
    settings = describe_settings(batch, command.source)
    with (
        command_line.catch_signals(signal.SIGINT, signal.SIGTERM) as caught,
        contextlib.closing(Answers(Path(command.out), settings)) as answers,
    ):
        with Console(stderr=True).status(Text(f"reading {command.prompts}")):
            survey = batch.survey(answers, is_stopped=lambda: bool(caught))
        for doubt in survey.doubts.values():
            command_line.notify(f"note: {command_line.escape(doubt)}")
        if command.strict and survey.errors:
            raise ValueError(f"{survey.describe_errors()}; nothing was generated, as --strict asks")
        done = survey.done if caught else _write_answers(command, batch, answers, survey, lambda: bool(caught))
    if caught:
        name = "interrupted" if caught[0] == signal.SIGINT else caught[0].name
        command_line.notify(f"{name}: {command.out} has {done:,} texts; the same command goes on behind them")
        sys.exit(command_line.EXIT_INTERRUPTED if caught[0] == signal.SIGINT else command_line.EXIT_STOPPED)
    if survey.errors:
        raise ValueError(survey.describe_errors())


def _write_answers(
    command: Command, batch: "Batch", answers: "Answers", survey: "Survey", is_stopped: Callable[[], bool]
) -> int:
    """Generates what is not there yet, and shows how far it is. Returns how many texts there are then."""
    from rich.console import Console

    from gemma2_jax.inference.batch import run_jobs
    from gemma2_jax.inference.clock import Clock, describe_speed
    from gemma2_jax.training.progress import PLAIN_LINE_SECONDS, progress_bar

    command_line.notify(f"{command.prompts}: {survey.texts:,} texts, {survey.done:,} of them in {command.out}")
    jobs = batch.list_jobs(survey)
    if survey.longest:
        jobs = run_jobs(_make_engine(command, batch, survey), jobs, is_stopped=is_stopped)
    done, tokens, console, clock = survey.done, 0, Console(stderr=True), Clock()
    began = told = clock()
    with progress_bar(console, "texts", hidden=not console.is_terminal) as bar:
        task = bar.add_task("generate", total=survey.texts, completed=done, text="")
        for job in jobs:
            answers.add(job.to_json())
            done, tokens, now = done + 1, tokens + job.tokens, clock()
            speed = f"{tokens / (now - began):,.0f} tokens/s"
            bar.update(task, completed=done, text=speed)
            if bar.disable and now - told > PLAIN_LINE_SECONDS:
                told = now
                command_line.notify(f"{done:,}/{survey.texts:,} texts  {speed}")
    command_line.notify(f"{done - survey.done:,} texts written; {describe_speed(tokens, clock() - began)}")
    return done


def _make_engine(command: Command, batch: "Batch", survey: "Survey") -> "Engine":
    """An engine with room for the longest prompt, and as many slots as fit."""
    from gemma2_jax.inference.engine import Engine, count_slots
    from gemma2_jax.inference.steps import bucket_length

    decoder = load_source(command.source, batch.encoder.checkpoint)
    context = min(bucket_length(survey.longest), decoder.config.max_length)
    return Engine(decoder, slots=min(survey.texts - survey.done, count_slots(decoder, context)), context=context)


if __name__ == "__main__":
    main()
