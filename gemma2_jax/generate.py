"""`python -m gemma2_jax.generate --checkpoint PATH --prompt TEXT`: text from any checkpoint. The command line only.

It opens the checkpoint (`convert`), hands prompts to the generator (`inference`), and prints what comes.
Nothing here imports JAX before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from gemma2_jax import command_line, megatron_bridge
from gemma2_jax.cluster import platforms
from gemma2_jax.inference.settings import GREEDY, Sampling
from gemma2_jax.inference.source import Source, open_source, print_defaults

if TYPE_CHECKING:
    from gemma2_jax.inference.completion import Completion
    from gemma2_jax.inference.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Command:
    """Continues prompts, or answers them (--chat), with a checkpoint of any format.

    Text goes to standard output; how fast it came, to standard error.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # give it again for several; none: standard input is one
    chat: bool = False  # prompts are what a user says: write them as the tokenizer's chat template does
    max_new_tokens: int = 100  # a text ends after so many, or with an eos_token_id or (--chat) the end of a turn
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY


def main(program: str = "python -m gemma2_jax.generate") -> None:
    """Parses, loads, generates; exits with a sentence where that cannot be done."""
    arguments = megatron_bridge.translate_generate_arguments(sys.argv[1:])
    command = command_line.parse(Command, arguments, program)
    platforms.prepare_process()
    with command_line.exit_with_sentence():
        platforms.check_platform()
        _generate(command)


def _generate(command: Command) -> None:
    checkpoint, tokenizer = open_source(command.source)
    from gemma2_jax.inference.completion import Completion
    from gemma2_jax.inference.defaults import stop_tokens
    from gemma2_jax.inference.engine import Request, make_engine
    from gemma2_jax.inference.loaded import load_decoder
    from gemma2_jax.inference.text import encode_prompt

    prompts = command.prompt or (_read_prompt(),)
    tokens = [encode_prompt(prompt, tokenizer, chat=command.chat) for prompt in prompts]
    stop = frozenset(stop_tokens(checkpoint, tokenizer, chat=command.chat))
    print_defaults(checkpoint, tokenizer, stop, command.sampling, command.max_new_tokens)
    requests = [
        Request(prompt=row, max_new_tokens=command.max_new_tokens, sampling=command.sampling, stop=stop)
        for row in tokens
    ]
    engine = make_engine(load_decoder(checkpoint, command.source.dtype), requests)
    for request in requests:
        engine.submit(request)
    _print_texts(engine, prompts, [Completion(request, tokenizer) for request in requests])


def _read_prompt() -> str:
    if sys.stdin is None:
        raise ValueError("standard input is closed; give the prompt as --prompt TEXT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}); give the prompt as UTF-8") from error


def _print_texts(engine: "Engine", prompts: Sequence[str], completions: "list[Completion]") -> None:
    """Prints one text as its tokens come, several when they are whole, and how fast they came."""
    from gemma2_jax.inference.clock import Clock, describe_speed

    clock = Clock()
    began = clock()
    first, first_tokens = None, 0
    while not engine.is_idle:
        engine.advance()
        pieces = [completion.take() for completion in completions]
        if len(prompts) == 1:
            print(pieces[0], end="", flush=True)
        if first is None and all(completion.request.tokens for completion in completions):
            first, first_tokens = clock(), sum(len(completion.request.tokens) for completion in completions)
    if len(prompts) == 1:
        print()
    else:
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            print(f"[{number}] {prompt}\n{completion.text}\n")
    assert first is not None
    prompt_tokens = sum(len(completion.request.prompt) for completion in completions)
    new_tokens = sum(len(completion.request.tokens) for completion in completions)
    prefill = describe_speed(prompt_tokens, first - began)
    decode = describe_speed(new_tokens - first_tokens, clock() - first)
    print(f"prefill {prefill}; decode {decode}; compiled in {clock.compiling:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
