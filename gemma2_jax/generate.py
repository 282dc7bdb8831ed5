"""`python -m gemma2_jax.generate --checkpoint PATH --prompt TEXT`: text from any checkpoint. The command line only.

It opens the checkpoint (`convert`), makes tokens of text and text of tokens, and prints; `decode` does the work.
Nothing here imports JAX before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from gemma2_jax.cluster import platforms
from gemma2_jax.config import ComputeConfig, DType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.inference.generator import Generator


@dataclass(frozen=True, kw_only=True)
class Command:
    """Continues prompts, or answers them (--chat), with a Gemma 2 checkpoint of any format.

    Text goes to standard output; how fast it came, to standard error.
    """

    checkpoint: str  # a training run's folder, a Hugging Face or Orbax folder, or a Hub id
    adapter: str | None = None  # an adapter to put on it: a PEFT or Orbax folder, or a run
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # give it again for several; none: standard input is one
    chat: bool = False  # prompts are what a user says: write them as the tokenizer's chat template does
    max_new_tokens: int = 100  # a text ends after so many, or with <eos> or <end_of_turn>
    temperature: float = 0.0  # logits are divided by it; 0 takes the most likely token, whatever else is set
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # of those, from the fewest, most likely first, with this much of the probability
    seed: int = 0  # of the draws
    dtype: DType | None = None  # of weights and arithmetic; None: float32 on CPU, bfloat16 elsewhere


def main() -> None:
    """Parses, loads, generates; exits with a sentence where that cannot be done."""
    command = tyro.cli(Command, prog="python -m gemma2_jax.generate")
    platforms.prepare_process()
    try:
        _generate(command)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _generate(command: Command) -> None:
    from gemma2_jax.convert.checkpoints import open_checkpoint
    from gemma2_jax.data.encoding import load_tokenizer
    from gemma2_jax.inference.generator import Sampling

    sampling = Sampling(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p, seed=command.seed)
    path = command.adapter or command.checkpoint
    checkpoint = open_checkpoint(path, base=command.checkpoint if command.adapter else None)
    if checkpoint.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; copy tokenizer.json and tokenizer_config.json of its model there")
    tokenizer = load_tokenizer(str(checkpoint.tokenizer))
    prompts = command.prompt or (sys.stdin.read(),)
    tokens = [encode_prompt(prompt, tokenizer, chat=command.chat) for prompt in prompts]
    if apart := checkpoint.adapter.unmergeable_targets:
        print(
            f"the adapter stays apart, which slows down every step: that of {' and '.join(apart)} is added after the "
            "post-norm (adapter.after_norm), so that no weight can take it in",
            file=sys.stderr,
        )
    generator = load_generator(checkpoint, command.dtype)
    chunks = generator.stream(
        tokens, max_new_tokens=command.max_new_tokens, sampling=sampling, stop=stop_tokens(tokenizer)
    )
    clock = Clock()
    times, counts = [clock()], []
    texts = [TextStream(tokenizer) for _ in prompts]
    for new in chunks:
        times.append(clock())
        counts.append(sum(map(len, new)))
        pieces = [text.add(tokens) for text, tokens in zip(texts, new, strict=True)]
        if len(prompts) == 1:
            print(pieces[0], end="", flush=True)
    if len(prompts) == 1:
        print(texts[0].rest())
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if len(prompts) > 1:
            print(f"[{number}] {prompt}\n{text.whole}\n")
    prefill, decode = (
        describe_speed(sum(map(len, tokens)), times[1] - times[0]),
        describe_speed(sum(counts[1:]), times[-1] - times[1]),
    )
    print(f"prefill {prefill}; decode {decode}; compiled in {clock.compiling:.1f} s", file=sys.stderr)


def load_generator(checkpoint: "Checkpoint", dtype: DType | None = None) -> "Generator":
    """The model of a checkpoint, ready to generate, on the first device.

    An adapter is added into the weights if it can be: apart it slows down every step, and no other takes its place.
    """
    import jax
    from flax import nnx

    from gemma2_jax.convert import checkpoints
    from gemma2_jax.inference.generator import Generator
    from gemma2_jax.model import gemma2 as model, lora
    from gemma2_jax.model.attention.choice import choose_attention

    config = checkpoint.model
    if config is None:
        raise ValueError(
            f"{checkpoint.path} is an adapter whose model is not at hand; give both, as --checkpoint MODEL "
            f"--adapter {checkpoint.path}"
        )
    compute = ComputeConfig(dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    attention, _ = choose_attention(config, compute, jax.devices()[0])

    def create() -> model.Gemma2:
        whole = model.Gemma2(config, attention=attention, dtype=compute.dtype, rngs=nnx.Rngs(0))
        lora.attach_adapters(whole, checkpoint.adapter, rngs=nnx.Rngs(0))
        return whole

    graph, shapes = nnx.split(nnx.eval_shape(create))
    wanted = {
        path: jax.ShapeDtypeStruct(w.shape, w.dtype if "norm/" in path or "/adapter/" in path else compute.dtype)
        for path, w in model.flatten_state(shapes).items()
    }
    weights = checkpoints.load_weights(checkpoint, wanted)
    if checkpoint.adapter.kind != "none" and not checkpoint.adapter.unmergeable_targets:
        whole = model.rebuild_model(graph, weights)
        weights.clear()
        lora.merge_adapters(whole)
        graph, state = nnx.split(whole)
        weights = model.flatten_state(state)
    return Generator(graph, weights)


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerFast", *, chat: bool) -> list[int]:
    """A prompt's tokens from <bos> on; with `chat` as a user's turn, with the model's turn opened after it."""
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave out --chat")
        turn = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    tokens = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)  # load_tokenizer made sure
    return tokens if tokens[:1] == [bos] else [bos, *tokens]


def stop_tokens(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Tokens after which there is no more: <eos>, and <end_of_turn> where the tokenizer has it."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[token] for token in (tokenizer.eos_token, "<end_of_turn>") if token in vocabulary}


class TextStream:
    """The text of tokens that come a few at a time."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    @property
    def whole(self) -> str:
        """All of it so far."""
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def add(self, tokens: list[int]) -> str:
        """What can be shown now that it could not before: a character may be spread over tokens yet to come."""
        self._tokens += tokens
        return self._from(self.whole.rstrip("\ufffd"))

    def rest(self) -> str:
        """What is left to show when no more comes."""
        return self._from(self.whole)

    def _from(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new


class Clock:
    """Seconds, but for those that JAX spends compiling."""

    def __init__(self):
        import jax.monitoring

        self.compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def __call__(self) -> float:
        return time.perf_counter() - self.compiling

    def _listen(self, event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compiling += duration_secs


def describe_speed(tokens: int, seconds: float) -> str:
    """How many tokens, and how many of them a second."""
    return f"{tokens:,} tokens" + (f" at {tokens / seconds:,.0f} tokens/s" if tokens else "")


if __name__ == "__main__":
    main()
