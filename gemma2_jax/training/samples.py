"""Samples: what the model says to fixed prompts while it is trained, made on the run's own shards of its weights.

One program, compiled before the first step, reads the prompts and then adds token after token. It takes the weights as
a training step does: stacked, in the dtype they are trained in, with adapters beside them, each layer gathered where it
is used. So there is no second copy of them, as `inference.decoder` makes to be fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.sampling import RowSettings
from gemma2_jax.inference.settings import GREEDY
from gemma2_jax.inference.steps import PAD, Parts, add_tokens, bucket_length, empty_state, pad_stops, read_parts
from gemma2_jax.inference.text import decode_text, encode_prompt
from gemma2_jax.model.gemma2 import rebuild_model
from gemma2_jax.training.step import Program, State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_SHAPES = {"text", "prompt and completion", "prompt template"}  # of documents that no chat template writes


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of `config.sample` as tokens."""

    texts: tuple[str, ...]
    tokens: list[list[int]]  # of each
    stop: list[int]  # tokens that end a text
    chat: bool  # whether the chat template writes them, as a user's turn

    def describe(self, new_tokens: int) -> str:
        """What samples are made, in words."""
        count, form = len(self.texts), "questions to the model" if self.chat else "beginnings of texts"
        return f"{count} prompt(s), as {form}, each with {new_tokens} new tokens at most, at every evaluation"


def encode_prompts(
    config: Config, source: Checkpoint | None, tokenizer: "PreTrainedTokenizerFast", shapes: Sequence[str]
) -> Prompts:
    """The prompts of a run that starts from `source`, and whose documents have these shapes, where that is known.

    They are written as the documents are. Raises ValueError for a prompt that leaves no room in the model's context.
    """
    is_plain = bool(shapes) and PLAIN_SHAPES.issuperset(shapes)
    chat = config.data.kind == "instructions" and tokenizer.chat_template is not None and not is_plain
    tokens = [encode_prompt(prompt, tokenizer, chat=chat) for prompt in config.sample.prompts]
    longest = max(map(len, tokens))
    if longest + config.sample.tokens > config.model.max_length:
        raise ValueError(
            f"the longest of sample.prompts has {longest} tokens, with sample.tokens {config.sample.tokens} new ones "
            f"{longest + config.sample.tokens}, and the model's context is {config.model.max_length}; shorten the "
            "prompt, or ask for fewer tokens"
        )
    checkpoint = source or Checkpoint(format="run", path=config.output)
    stop = sorted(stop_tokens(checkpoint, tokenizer, chat=chat))
    return Prompts(texts=config.sample.prompts, tokens=tokens, stop=stop, chat=chat)


class Sampler:
    """Makes samples of a run's state. The constructor compiles the program. All processes take part in a call."""

    def __init__(self, program: Program, prompts: Prompts, tokenizer: "PreTrainedTokenizerFast"):
        self._program, self._prompts, self._tokenizer = program, prompts, tokenizer
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        lowered = jax.jit(self._generate, out_shardings=everywhere).lower(program.state)
        self.compiled: jax.stages.Compiled = lowered.compile(program.compiler_options)

    def __call__(self, state: State) -> list[dict[str, str]]:
        """The text that follows each prompt, as a line of metrics has it."""
        tokens_BC, counts_B = jax.device_get(self.compiled(state))
        completions = [
            decode_text(row[:count].tolist(), self._tokenizer) for row, count in zip(tokens_BC, counts_B, strict=True)
        ]
        pairs = zip(self._prompts.texts, completions, strict=False)  # the last rows only fill up the shards
        return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]

    def _generate(self, state: State) -> tuple[jax.Array, jax.Array]:
        """New tokens, int32 [B, 1 + C], and how many of them each row has, int32 [B]; the others are padding."""
        program, new_tokens = self._program, self._program.config.sample.tokens
        model = rebuild_model(program.graph, state.params, state.frozen)
        parts = self._make_parts(new_tokens)
        context = bucket_length(int(parts.length_B.max()) + new_tokens)
        rows = empty_state(model, rows=parts.row_B.size, context=context)
        rows, begin, _ = read_parts(model, rows, jax.tree.map(jnp.asarray, parts))
        _, rest = add_tokens(model, rows, new_tokens - 1, new_tokens)
        return jnp.concatenate([begin.tokens_BC, rest.tokens_BC], axis=1), begin.counts_B + rest.counts_B

    def _make_parts(self, new_tokens: int) -> Parts[np.ndarray | np.generic]:
        """The prompts as the parts of rows; the last is repeated until all shards have as many."""
        shape, tokens = self._program.mesh.shape, self._prompts.tokens
        rows = [*tokens, *tokens[-1:] * (-len(tokens) % (shape["data"] * shape["fsdp"]))]
        lengths_B = np.array([len(row) for row in rows], np.int32)
        tokens_BT = np.full((len(rows), bucket_length(int(lengths_B.max()))), PAD, np.int32)
        for padded, row in zip(tokens_BT, rows, strict=True):
            padded[: len(row)] = row
        none_B = np.zeros(len(rows), np.int32)
        return Parts(
            row_B=none_B,
            tokens_BT=tokens_BT,
            next_B=none_B,
            start_B=none_B,
            length_B=lengths_B,
            new_B=none_B + new_tokens,
            stop_BE=np.tile(pad_stops(self._prompts.stop), (len(rows), 1)),
            is_scored_B=none_B > 0,
            is_echoed_B=none_B > 0,
            adapter_B=none_B,
            settings=jax.tree.map(lambda x: np.stack([x] * len(rows)), RowSettings.of(GREEDY)),
        )
