"""`python -m gemma2_jax.generate --checkpoint PATH --prompt TEXT`: text from any checkpoint. The command line only.

It opens the checkpoint (`convert`), hands prompts to the generator (`inference`), and prints what comes.
Nothing here imports JAX before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from gemma2_jax import command_line, megatron_bridge
from gemma2_jax.cluster import platforms
from gemma2_jax.model_config import DType

if TYPE_CHECKING:
    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.inference.completion import Completion
    from gemma2_jax.inference.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Command:
    """Continues prompts, or answers them (--chat), with a Gemma 2 checkpoint of any format.

    Text goes to standard output; how fast it came, to standard error.
    """

    checkpoint: str  # a training run's folder, a Hugging Face, Orbax or Megatron folder, or a Hub id
    adapter: str | None = None  # an adapter to put on it: a PEFT or Orbax folder, or a run
    hf_config: str | None = None  # folder or Hub id with the config.json and tokenizer that a Megatron checkpoint lacks
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # give it again for several; none: standard input is one
    chat: bool = False  # prompts are what a user says: write them as the tokenizer's chat template does
    max_new_tokens: int = 100  # a text ends after so many, or with an eos_token_id or (--chat) the end of a turn
    temperature: float = 0.0  # logits are divided by it; 0 takes the most likely token, whatever else is set
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # of those, from the fewest, most likely first, with this much of the probability
    seed: int = 0  # of the draws
    dtype: DType | None = None  # of weights and arithmetic; None: float32 on CPU, bfloat16 elsewhere

    def __post_init__(self) -> None:
        command_line.check_paths(self, "checkpoint", "adapter", "hf_config")


def main(program: str = "python -m gemma2_jax.generate") -> None:
    """Parses, loads, generates; exits with a sentence where that cannot be done."""
    arguments = megatron_bridge.translate_generate_arguments(sys.argv[1:])
    command = command_line.parse(Command, arguments, program)
    platforms.prepare_process()
    with command_line.exit_with_sentence():
        platforms.check_platform()
        _generate(command)


def _generate(command: Command) -> None:
    from gemma2_jax.data import encoding

    encoding.hide_torch()
    from gemma2_jax.convert.formats.companions import load_tokenizer
    from gemma2_jax.inference.completion import Completion
    from gemma2_jax.inference.defaults import stop_tokens
    from gemma2_jax.inference.engine import Request, make_engine
    from gemma2_jax.inference.loaded import load_decoder
    from gemma2_jax.inference.sampling import Sampling
    from gemma2_jax.inference.text import encode_prompt

    sampling = Sampling(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p, seed=command.seed)
    checkpoint = _open_checkpoint(command)
    assert checkpoint.tokenizer is not None  # _open_checkpoint made sure
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    prompts = command.prompt or (_read_prompt(),)
    tokens = [encode_prompt(prompt, tokenizer, chat=command.chat) for prompt in prompts]
    stop = stop_tokens(checkpoint, tokenizer, chat=command.chat)
    _print_defaults(command, checkpoint, stop, tokenizer)
    requests = [
        Request(prompt=row, max_new_tokens=command.max_new_tokens, sampling=sampling, stop=frozenset(stop))
        for row in tokens
    ]
    engine = make_engine(load_decoder(checkpoint, command.dtype), requests)
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


def _open_checkpoint(command: Command) -> "Checkpoint":
    """The checkpoint that the command names. Raises ValueError without its model or its tokenizer."""
    from gemma2_jax.convert.opening import open_checkpoint
    from gemma2_jax.inference.loaded import complete_config

    model = open_checkpoint(command.checkpoint, hf_config=command.hf_config)
    checkpoint = open_checkpoint(command.adapter, base=model) if command.adapter else model
    complete_config(checkpoint)
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer; copy tokenizer.json and tokenizer_config.json of its model there"
        )
    for note in checkpoint.notes:
        print(f"note: {command_line.escape(note)}", file=sys.stderr)
    if targets := checkpoint.adapter.unmergeable_targets:
        print(
            f"the adapter of {' and '.join(targets)} is added after the post-norm (adapter.after_norm), where no "
            "weight can take it in; it is computed beside the weights, which slows down every step",
            file=sys.stderr,
        )
    return checkpoint


def _print_defaults(command: Command, checkpoint: "Checkpoint", stop: set[int], tokenizer) -> None:
    """Says what ends a text, and what the checkpoint suggests in place of the most likely tokens."""
    from gemma2_jax.inference.defaults import describe_stop, describe_suggestion, suggested_sampling

    print(command_line.escape(describe_stop(stop, tokenizer, command.max_new_tokens)), file=sys.stderr)
    if command.temperature == 0 and (settings := suggested_sampling(checkpoint)) and _is_usable(settings):
        print(describe_suggestion(settings), file=sys.stderr)


def _is_usable(settings: dict[str, Any]) -> bool:
    from gemma2_jax.inference.sampling import Sampling

    try:
        Sampling(**settings)
    except ValueError:
        return False
    return True


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
